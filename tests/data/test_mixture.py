"""Mixtures: shares, determinism, resuming, processes, epochs."""

from collections import Counter
from itertools import islice

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from perceptio_hf.data.mixture import mix_tasks
from perceptio_hf.data.rows import as_rows, dataset_of, sample_features, to_row

datasets.disable_progress_bars()
SIZES = {"refer": 40, "depth": 15, "plain": 9}
WEIGHTS = {"refer": 5, "depth": 3, "plain": 2}


def sample(name: str) -> dict:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"I am {name}."}]
    return {"id": name, "messages": chat}


def rows(task: str, numbers: list[int]):
    for number in numbers:
        yield to_row(sample(f"{task}{number}"))


def stream(task: str) -> datasets.IterableDataset:
    options = {"features": sample_features(), "gen_kwargs": {"task": task, "numbers": list(range(SIZES[task]))}}
    return datasets.IterableDataset.from_generator(rows, **options)


def table(task: str) -> datasets.Dataset:
    return dataset_of(sample(f"{task}{number}") for number in range(SIZES[task]))


def mixture(streams: tuple[str, ...] = (), **options):
    tasks = {task: stream(task) if task in streams else table(task) for task in SIZES}
    return mix_tasks(tasks, WEIGHTS, **options)


def names(samples) -> list[str]:
    return [item["id"] for item in samples]


def task_of(name: str) -> str:
    return name.rstrip("0123456789")


def test_rows_that_were_chosen_are_not_copied(monkeypatch):
    """A set of tar shards of which a few pictures are missing would be written once more by every process."""

    def flatten(self, *args, **kwargs):
        raise AssertionError("all of it is copied")

    chosen = table("refer").select([1, 3, 5, 7]).select([2, 0])
    monkeypatch.setattr(datasets.Dataset, "flatten_indices", flatten)
    mixed = mix_tasks({"some": chosen, "all": table("plain")}, {"some": 2, "all": 9})
    found = Counter((row["task"], row["id"]) for row in mixed)
    assert found == Counter(
        {("some", "refer5"): 1, ("some", "refer1"): 1} | {("all", f"plain{n}"): 1 for n in range(9)}
    )


def test_map_style_in_map_style_out():
    mixed = mixture(seed=3)
    assert isinstance(mixed, datasets.Dataset) and mixed.features == sample_features()
    assert len(mixed) == 80  # 40 of refer are half of it
    assert Counter(mixed["task"]) == {"refer": 40, "depth": 24, "plain": 16}
    assert all(item["task"] == task_of(item["id"]) for item in mixed)
    assert set(names(mixed)) == {f"{task}{number}" for task, size in SIZES.items() for number in range(size)}
    assert max(Counter(names(mixed)).values()) == 2  # repeated evenly
    assert names(mixed) == names(mixture(seed=3)) != names(mixture(seed=4))
    assert Counter(map(task_of, names(mixed)[:40]))["refer"] < 40  # mixed, not one after the other
    assert len(mixture(draws=33)) == 33 and Counter(mixture(draws=10)["task"]) == {"refer": 5, "depth": 3, "plain": 2}
    assert Counter(mix_tasks({task: table(task) for task in SIZES}, draws=9)["task"]) == dict.fromkeys(SIZES, 3)


def test_a_transform_is_kept_or_refused():
    """It is drawn whenever a row is read, which a mixture and made columns would end without a word."""

    def loud(rows: dict) -> dict:
        return rows | {"id": [name.upper() for name in rows["id"]]}

    whole = table("plain").with_transform(loud)
    assert as_rows(whole)[0]["id"] == "PLAIN0"
    with pytest.raises(ValueError, match=r"The data set of task 'a' has a transform \(set_transform\), which is lost"):
        mix_tasks({"a": whole, "b": table("refer")})
    with pytest.raises(ValueError, match="has a transform"):
        as_rows(table("plain").select_columns(["id", "messages"]).with_transform(loud))


@pytest.mark.parametrize("streams", [("refer",), tuple(SIZES)])
def test_streams(streams):
    mixed = mixture(streams, seed=3)
    assert isinstance(mixed, datasets.IterableDataset)
    seen = names(mixed)
    assert seen == names(mixed) == names(mixture(streams, seed=3)) != names(mixture(streams, seed=4))
    assert set(seen) == {f"{task}{number}" for task, size in SIZES.items() for number in range(size)}
    shares = Counter(map(task_of, seen))
    assert all(abs(shares[task] / len(seen) - WEIGHTS[task] / 10) < 0.15 for task in SIZES)
    longest = max(len(run) for task in SIZES for run in "".join(task_of(n)[0] for n in seen).split(task[0]))
    assert longest < 20  # no long run of other tasks
    assert all(item["task"] == task_of(item["id"]) for item in mixed)
    assert names(mixture(streams, seed=3, draws=12)) == seen[:12]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("streams", [("depth",), tuple(SIZES)])
def test_a_stream_goes_on_where_it_stopped(streams, epoch):
    whole = mixture(streams)
    whole.set_epoch(epoch)
    expected = names(whole)
    for stop in (1, 7, 30):
        first = mixture(streams)
        first.set_epoch(epoch)
        assert names(islice(first, stop)) == expected[:stop]
        state = first.state_dict()
        again = mixture(streams)
        again.set_epoch(epoch)
        again.load_state_dict(state)
        assert names(again) == expected[stop:]
        assert names(islice(whole, stop, None)) == expected[stop:]  # the trainer's way: read and drop


def test_epochs_differ():
    mixed = mixture(("refer",))
    orders = []
    for epoch in (0, 1, 2):
        mixed.set_epoch(epoch)
        orders.append(names(mixed))
    assert orders[0] != orders[1] != orders[2]
    depth = [[name for name in order if task_of(name) == "depth"] for order in orders]
    assert depth[0][:5] != depth[1][:5]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("draws", [None, 30])
def test_processes_share_a_stream(processes, draws):
    """Every draw belongs to one process: the sources are divided, so nothing but their repetitions comes twice."""
    parts = [
        names(split_dataset_by_node(mixture(tuple(SIZES), draws=draws), rank=rank, world_size=processes))
        for rank in range(processes)
    ]
    assert all(parts)
    seen = Counter(name for part in parts for name in part if task_of(name) == "refer")  # the task that is not repeated
    assert max(seen.values()) == 1


def test_workers_share_a_stream():
    loader = DataLoader(mixture(tuple(SIZES)), batch_size=4, num_workers=2, collate_fn=names)
    seen = Counter(name for batch in loader for name in batch)
    assert set(seen) == {f"{task}{number}" for task, size in SIZES.items() for number in range(size)}


def test_other_forms_of_the_same_columns():
    """Data sets with other types for the same things mix."""
    strings = datasets.Dataset.from_list([sample("refer0"), sample("refer1")])
    mixed = mix_tasks({"refer": strings, "plain": table("plain")}, {"refer": 1, "plain": 1}, draws=4)
    assert mixed.features == sample_features()
    mixed = mix_tasks({"refer": strings.to_iterable_dataset(), "plain": table("plain")}, draws=4)
    assert mixed.features == sample_features() and len(list(mixed)) == 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"refer": 1, "depth": 0, "plain": 1}, r"\{'depth': 0\} are not positive"),
        ({"refer": 1, "depth": -2, "plain": 1}, r"\{'depth': -2\} are not positive"),
        ({"refer": 1, "depth": float("nan"), "plain": 1}, "not positive"),
        ({"refer": 1, "depth": 1}, r"lack the tasks \['plain'\]"),
        ({"refer": 1, "depth": 1, "plain": 1, "dpeth": 1}, r"unknown tasks \['dpeth'\]"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        mix_tasks({task: table(task) for task in SIZES}, weights)


def test_bad_tasks():
    empty = datasets.Dataset.from_dict({"messages": []})
    for bad, message in (
        (empty, "data set of task 'x' is empty"),
        (stream("depth").filter(lambda _: False), "data set of task 'x' is empty"),
        (datasets.Dataset.from_dict({"text": ["a"], "mask": ["b"]}), r"columns text, mask; a sample needs `messages`"),
        (datasets.Dataset.from_dict({"image": ["a.png"], "messages": [[]]}), r"rename_column\('image', 'images'\)"),
        (datasets.Dataset.from_dict({"question": ["a"]}).to_iterable_dataset(), "columns question"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_tasks({"x": bad, "depth": table("depth")})
    with pytest.raises(ValueError, match="no task"):
        mix_tasks({})
    with pytest.raises(ValueError, match="draws is 0"):
        mixture(draws=0)
