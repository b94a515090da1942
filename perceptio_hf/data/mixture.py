"""Mixing tasks by weight, deterministically and so that a stopped run goes on with the sample it had come to."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .rows import as_rows, check_no_transform, import_datasets

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_STREAM_SHARDS = 256  # parts of a map-style data set in a stream: shared out to processes, shuffled in every epoch


def mix_tasks(
    tasks: "Mapping[str, Dataset | IterableDataset]",
    weights: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    draws: int | None = None,
) -> "Dataset | IterableDataset":
    """One data set out of several tasks, in which each has its share of the samples.

    An epoch lasts until every task has been seen in full; those that are small for their weight are repeated in it.

    If all tasks are map-style data sets, so is the result: it holds each task exactly in proportion to its weight, in
    an order drawn from `seed`; the trainer's sampler shuffles every epoch anew, splits it between processes, and skips
    what was seen before without reading it.

    If one of them is a stream, the result is a stream. Its tasks are drawn one by one from `seed` and the epoch; every
    later epoch shuffles the shards of the sources, whose samples otherwise come in their own order (no shuffle buffer:
    what such a buffer holds is lost when a run stops). It is resumed by the trainer, which reads and drops what was
    seen, or by `state_dict` and `load_state_dict` after `set_epoch`; `datasets.distributed.split_dataset_by_node` and
    the trainer split it between processes.

    Args:
        tasks: name -> data set of samples (see `perceptio_hf.data.samples.Sample`); the name becomes their `task`.
        weights: name -> relative weight, of all tasks; None for equal ones.
        seed: of the order.
        draws: samples in an epoch, instead of as many as it takes to see everything; the same ones in every epoch.

    Raises:
        ValueError: no task; weights for other tasks, or not positive; a data set that is empty or lacks columns.
    """
    shares = _shares(tasks, weights)
    if draws is not None and draws < 1:
        raise ValueError(f"draws is {draws}; an epoch has at least one sample.")
    datasets = {
        name: _named(as_rows(dataset, f"The data set of task {name!r}"), name) for name, dataset in tasks.items()
    }
    if all(hasattr(dataset, "select") for dataset in datasets.values()):
        return _mixed_map(list(datasets.values()), shares, seed, draws)
    return _mixed_stream(list(datasets.values()), shares, seed, draws)


def _shares(tasks: Mapping[str, object], weights: Mapping[str, float] | None) -> np.ndarray:
    """Positive numbers that sum to 1, in the order of the tasks."""
    if not tasks:
        raise ValueError("There is no task to mix; give at least one data set.")
    weights = dict.fromkeys(tasks, 1.0) if weights is None else weights
    if set(weights) != set(tasks):
        unknown, missing = sorted(set(weights) - set(tasks)), sorted(set(tasks) - set(weights))
        raise ValueError(
            f"The weights name unknown tasks {unknown} and lack the tasks {missing}; the tasks are {sorted(tasks)}."
        )
    wrong = {name: weight for name, weight in weights.items() if not (weight > 0 and np.isfinite(weight))}
    if wrong:
        raise ValueError(f"The weights {wrong} are not positive numbers; leave a task out instead of weighting it 0.")
    values = np.array([weights[name] for name in tasks], dtype=np.float64)
    return values / values.sum()


def _named(dataset: "Dataset | IterableDataset", name: str) -> "Dataset | IterableDataset":
    """The data set with `name` as the task of every sample."""
    features = dataset.features
    if hasattr(dataset, "select"):
        check_no_transform(dataset, f"The data set of task {name!r}")
        # `add_column` copies a data set of which rows were left out, pictures that it holds among them, in each process
        # and at every start; so all rows are named, and those that were chosen stay chosen.
        kind = import_datasets().Dataset
        whole = kind(dataset.data, info=dataset.info).remove_columns("task")
        whole = whole.add_column("task", [name] * len(whole), feature=features["task"]).select_columns(list(features))
        return kind(whole.data, info=whole.info, indices_table=dataset._indices)
    return dataset.map(lambda _: {"task": name}, features=features)


def _mixed_map(datasets: "list[Dataset]", shares: np.ndarray, seed: int, draws: int | None) -> "Dataset":
    sizes = np.array([len(dataset) for dataset in datasets])
    total = draws or int(np.ceil((sizes / shares).max() - 1e-9))
    rng = np.random.default_rng(seed)
    starts = np.cumsum(sizes) - sizes
    picked = [
        start + _picks(size, count, rng)
        for start, size, count in zip(starts, sizes, _apportion(total, shares), strict=True)
    ]
    return import_datasets().concatenate_datasets(datasets).select(rng.permutation(np.concatenate(picked)))


def _apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to `total` and lie within 1 of its shares (largest remainders)."""
    exact = total * shares
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _picks(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices below `size`: all of them as often as it goes, and a random part once more."""
    whole, rest = divmod(count, size)
    return np.concatenate([np.tile(np.arange(size), whole), rng.permutation(size)[:rest]])


def _mixed_stream(
    datasets: "list[Dataset | IterableDataset]", shares: np.ndarray, seed: int, draws: int | None
) -> "IterableDataset":
    streams = [
        dataset.shuffle(seed=seed).to_iterable_dataset(num_shards=min(len(dataset), _STREAM_SHARDS))
        if hasattr(dataset, "select")
        else dataset
        for dataset in datasets
    ]
    mixed = import_datasets().interleave_datasets(
        streams, probabilities=shares.tolist(), seed=seed, stopping_strategy="all_exhausted"
    )
    return mixed if draws is None else mixed.take(draws)
