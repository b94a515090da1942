"""Batches of samples that are about equally long, so that little of a batch is padding."""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.data import Sampler

from perceptio_hf.data.encoded import as_list
from perceptio_hf.data.form import split_at_pictures

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import SFTConfig

    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

BY_LENGTH = "group_by_length"  # transformers' name for it, of train_sampling_strategy
_LETTERS = 4  # of a token, in the mean
_POOL = 50  # batches of each process that are sorted together: more is less padding and less chance
_ROWS = 1000


class LengthSampler(Sampler[int]):
    """The order of an epoch in which consecutive batches hold samples of similar length.

    Samples are shuffled, sorted within pools of 50 batches for each process, and cut into groups of one batch for each
    process; then the groups are shuffled. The order follows from the seed and the epoch alone, so that a training that
    was stopped goes on with the sample it had come to.

    Args:
        lengths: of all samples, in any unit.
        batch_size: rows of one process.
        processes: that take batches in turn; each of a group has one of similar length and none waits long.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, processes: int = 1, seed: int = 0):
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.group = batch_size * processes

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng([self.seed, self.epoch])
        order = chance.permutation(len(self.lengths))
        batches = max(1, min(_POOL, len(order) // (4 * self.group)))  # few samples still meet others in every epoch
        pools = np.split(order, range(batches * self.group, len(order), batches * self.group))
        order = np.concatenate([pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools])
        groups = np.split(order, range(self.group, len(order), self.group))
        last = [] if len(groups[-1]) == self.group else [groups.pop()]  # what fills no group comes last
        shuffled = [groups[number] for number in chance.permutation(len(groups))]
        return iter(np.concatenate([*shuffled, *last]).tolist())


def check_has_lengths(args: "SFTConfig", dataset: "Dataset | IterableDataset | None") -> None:
    """ValueError for a stream whose batches shall be of one length: nobody knows yet what comes."""
    if args.train_sampling_strategy == BY_LENGTH and dataset is not None and not hasattr(dataset, "select"):
        raise ValueError(
            f"train_sampling_strategy is {BY_LENGTH}, but a task of the training set is a stream, whose samples are "
            "read in the order in which they come. Leave it out, or give data sets that are not streams."
        )


def sample_lengths(dataset: "Dataset", processor: "PerceptioProcessor", image_options: dict[str, Any]) -> list[int]:
    """About how many tokens each sample has, without decoding a picture: words by their letters, spans by their number,
    pictures by the size that stands at the beginning of their files (and only where large ones become several tiles).

    Args:
        image_options: `crop_to_patches` and, where it is limited, `max_patches`, as the collator has them.

    A sample that cannot be looked at counts as if it had one tile; the collator says what is wrong with it.
    """
    lengths: list[int] = []
    known: dict[str, int] = {}  # tokens of pictures by path: a mixture holds the samples of small tasks many times

    def tokens_of(picture: Any) -> int:
        path = picture["path"] if isinstance(picture, dict) and picture.get("bytes") is None else None
        if path is None:
            return _picture(picture, processor, image_options)
        if path not in known:
            known[path] = _picture(picture, processor, image_options)
        return known[path]

    wanted = dataset.select_columns(["images", "messages"])
    for start in range(0, len(wanted), _ROWS):
        rows = wanted[start : start + _ROWS]
        lengths += [
            _words(messages, processor.num_depth_tokens) + sum(map(tokens_of, as_list(images)))
            for images, messages in zip(rows["images"], rows["messages"], strict=True)
        ]
    return lengths


def _words(messages: Any, num_depth_tokens: int) -> int:
    texts = [text for message in messages or [] for text in _texts(message.get("content"))]
    spans = sum(text.count("<DEPTH_START>") for text in texts)
    written = sum(text.count("<DEPTH_") for text in texts) - 2 * spans  # codes, each far more letters than a token's
    letters = sum(map(len, texts)) - 10 * max(written, 0)
    return letters // _LETTERS + spans * (num_depth_tokens + 2)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [part["text"] for part in split_at_pictures(content) if "text" in part]
    return [part["text"] for part in content or [] if part.get("text")]


def _picture(source: Any, processor: "PerceptioProcessor", options: dict[str, Any]) -> int:
    size = _size(source) if options["crop_to_patches"] else None
    if size is None:
        return processor.image_seq_length
    return processor._get_num_multimodal_tokens([size[::-1]], **options).num_image_tokens[0]


def _size(source: Any) -> tuple[int, int] | None:
    """(width, height), from the beginning of the file."""
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else io.BytesIO(source["bytes"])
    try:
        if isinstance(source, Image.Image):
            return source.size
        with Image.open(source) as picture:
            return picture.size
    except Exception:
        return None
