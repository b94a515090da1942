"""Rendered scenes as training sequences: one picture, many question turns in one row.

A row is the picture's prefix and then the turns. Every turn sees the prefix and itself, never another turn, and its
positions start right behind the prefix: to the model each turn is a conversation of its own, at a fraction of the cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.world import Question, Scene, ask, draw_points, render_scene
from ..processing.processing_perceptio import PerceptioProcessor
from ..tokens import SEG_TOKEN, depth_span

# Scenes with these seeds and above are never trained on: evaluation, then the demo.
HELD_OUT_SEED = 1_000_000_000

_COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
_SHAPES = ("ball", "box", "cylinder", "cone")
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Response:
    """What the assistant is to write: a mask for each of `masks` (instance ids), a depth span if asked, words."""

    question: str
    masks: tuple[int, ...]
    depth: bool
    words: str
    kind: str


def response_to(question: Question, spatial: str = "auto") -> Response:
    """The response that teaches the order of spans: masks where objects are named, depth where distance matters.

    spatial: "auto" for the question's own form, "none" for words only, "full" for masks and depth.
    """
    masks = question.targets if spatial != "none" else ()
    depth = spatial == "full" or (spatial == "auto" and question.kind in ("depth", "closer_object", "closest_point"))
    return Response(question.text, masks, depth, question.answer, question.kind)


def choose_responses(questions: list[Question], rng: np.random.Generator) -> list[Response]:
    """One depth span for the depth question and one for another: a span costs as many tokens as four questions."""
    responses = []
    with_span = [index for index, q in enumerate(questions) if q.kind in ("refer", "closer_object", "closest_point")]
    chosen = rng.choice(with_span) if with_span else -1
    for index, question in enumerate(questions):
        if index == chosen:
            responses.append(response_to(question, "full"))
        elif question.kind not in ("closer_object", "closest_point"):
            responses.append(response_to(question))
    return responses


@dataclass
class PackedScene:
    """One row: token ids, the turn each token belongs to (0: the prefix), positions, labels, and the targets."""

    image: np.ndarray  # (H, W, 3) uint8, with marked points if any
    depth: np.ndarray  # (H, W) float32 metres
    instances: np.ndarray  # (H, W) uint8
    cells: np.ndarray  # (g * g, 4) shape, colour, size, material of what each image token sees; 0 = background
    ids: np.ndarray
    turns: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    masks: list[int]  # instance ids in the order of the [SEG] tokens


class ScenePacker:
    """Turns scenes into rows for one processor; the depth codes are filled in later, by the codec."""

    def __init__(self, processor: PerceptioProcessor, size: int):
        self.processor, self.size = processor, size
        self.grid = int(processor.image_seq_length**0.5)
        tokenizer = processor.tokenizer
        picture = (
            processor.start_image_token + processor.image_token * processor.image_seq_length + processor.end_image_token
        )
        self.prefix = self._encode(f"<|im_start|>user\n{picture}\n")
        self.blank_span = depth_span([0] * processor.num_depth_tokens)
        self.end = tokenizer.eos_token_id

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(self, response: Response) -> tuple[list[int], list[int]]:
        """Token ids of the question with the template's markers, and of the answer."""
        asked = self._encode(f"{response.question}<|im_end|>\n<|im_start|>assistant\n")
        span = self.blank_span if response.depth else ""
        return asked, [*self._encode(SEG_TOKEN * len(response.masks) + span + response.words), self.end]

    def pack(self, seed: int) -> PackedScene:
        """Render a scene, ask about it, and lay everything out in one row."""
        rng = np.random.default_rng([seed, 1])
        scene = render_scene(seed, size=self.size)
        questions = ask(scene, rng)
        image = scene.image
        for question in questions:
            if question.points:
                image = draw_points(image, question.points, question.letters)
        responses = choose_responses(questions, rng)
        ids, turns = list(self.prefix), [0] * len(self.prefix)
        positions, labels = list(range(len(ids))), [_IGNORED_LABEL] * len(ids)
        for number, response in enumerate(responses, start=1):
            asked, answer = self.turn(response)
            count = len(asked) + len(answer)
            ids += asked + answer
            turns += [number] * count
            positions += range(len(self.prefix), len(self.prefix) + count)
            labels += [_IGNORED_LABEL] * len(asked) + answer
        return PackedScene(
            image=image,
            depth=scene.depth,
            instances=scene.instances,
            cells=describe_cells(scene, self.grid),
            ids=np.array(ids),
            turns=np.array(turns),
            positions=np.array(positions),
            labels=np.array(labels),
            masks=[instance for response in responses for instance in response.masks],
        )


def describe_cells(scene: Scene, grid: int) -> np.ndarray:
    """(grid * grid, 4): shape, colour, size and material (from 1) of the object that fills most of each cell, or 0."""
    side = scene.instances.shape[0] // grid
    blocks = scene.instances.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid * grid, -1)
    counts = np.stack([(blocks == k).sum(1) for k in range(len(scene.objects) + 1)], 1)
    counts[:, 0] //= 2  # an object that fills a third of its cell is what the cell shows
    rows = [(0, 0, 0, 0)]
    for thing in scene.objects:
        rows.append(
            (
                1 + _SHAPES.index(thing.shape),
                1 + _COLORS.index(thing.color),
                1 + (thing.size == "large"),
                1 + (thing.material == "shiny"),
            )
        )
    return np.array(rows)[counts.argmax(1)]


CELL_CLASSES = (1 + len(_SHAPES), 1 + len(_COLORS), 3, 3)


@dataclass
class SceneBatch:
    """Rows as tensors, right-padded."""

    pixel_values: torch.Tensor  # (b, 3, H, W) normalised as InternVL does
    mask_pixel_values: torch.Tensor  # (b, 3, S, S) normalised as SAM2 does
    inverse_depth: torch.Tensor  # (b, H, W) relative, 1 = nearest
    instances: torch.Tensor  # (b, H, W)
    cells: torch.Tensor  # (b, g * g, 4)
    input_ids: torch.Tensor  # (b, L)
    turns: torch.Tensor  # (b, L); -1 in the padding
    position_ids: torch.Tensor  # (b, L)
    labels: torch.Tensor  # (b, L)
    mask_rows: torch.Tensor  # (n,) row of each mask
    mask_instances: torch.Tensor  # (n,)

    def attention_mask(self) -> torch.Tensor:
        """(b, 1, L, L) bool: a token sees the prefix and its own turn, up to itself."""
        turns = self.turns
        same = (turns[:, :, None] == turns[:, None, :]) | (turns[:, None, :] == 0)
        causal = torch.ones(turns.shape[1], turns.shape[1], dtype=torch.bool).tril()
        return (same & causal)[:, None]

    def mask_targets(self, size: tuple[int, int]) -> torch.Tensor:
        """(n, h, w) share of each cell covered by the object of each [SEG]."""
        inside = (self.instances[self.mask_rows] == self.mask_instances[:, None, None]).float()
        return torch.nn.functional.interpolate(inside[:, None], size=size, mode="bilinear", antialias=True)[:, 0]


def normalise(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, side, side), antialiased bilinear, ImageNet statistics; as the processor does."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] != side:
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def collate(rows: list[PackedScene], *, pad: int, mask_side: int) -> SceneBatch:
    """Pad and stack packed scenes."""

    def stacked(name: str, fill: int) -> torch.Tensor:
        values = [torch.from_numpy(getattr(row, name)).long() for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    pictures = torch.from_numpy(np.stack([row.image for row in rows]))
    inverse = 1 / torch.from_numpy(np.stack([row.depth for row in rows]))
    far, near = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
    return SceneBatch(
        pixel_values=normalise(pictures, pictures.shape[1]),
        mask_pixel_values=normalise(pictures, mask_side),
        inverse_depth=(inverse - far) / (near - far),
        instances=torch.from_numpy(np.stack([row.instances for row in rows])).long(),
        cells=torch.from_numpy(np.stack([row.cells for row in rows])),
        input_ids=stacked("ids", pad),
        turns=stacked("turns", -1),
        position_ids=stacked("positions", 0),
        labels=stacked("labels", _IGNORED_LABEL),
        mask_rows=torch.tensor([index for index, row in enumerate(rows) for _ in row.masks], dtype=torch.long),
        mask_instances=torch.tensor([instance for row in rows for instance in row.masks], dtype=torch.long),
    )


class SceneStream(IterableDataset):
    """Batches of fresh scenes, from `first_seed` on; never the same scene twice."""

    def __init__(self, processor: PerceptioProcessor, size: int, batch_size: int, first_seed: int):
        self.packer = ScenePacker(processor, size)
        self.batch_size, self.first_seed = batch_size, first_seed

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        processor = self.packer.processor
        batch = number
        while True:
            first = self.first_seed + batch * self.batch_size
            rows = [self.packer.pack(seed) for seed in range(first, first + self.batch_size)]
            yield collate(rows, pad=processor.tokenizer.pad_token_id, mask_side=processor.mask_image_size)
            batch += workers


def scene_batches(
    processor: PerceptioProcessor, *, size: int, batch_size: int, first_seed: int, workers: int = 1
) -> Iterator[SceneBatch]:
    """An endless stream of training batches, rendered by `workers` other processes (0: by this one)."""
    stream = SceneStream(processor, size, batch_size, first_seed)
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
