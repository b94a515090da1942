"""Rendered scenes as training batches: every picture is shown once and asked many questions.

All questions about a picture share its prefix, whose keys and values are computed once; each question and its answer
is a row of its own behind that prefix. Questions never see one another, as if each were a conversation of its own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.world import Question, Scene, ask, draw_points, render_scene
from ..data.world.scene import COLORS, MATERIALS, SHAPES, SIZES
from ..processing.processing_perceptio import PerceptioProcessor
from ..tokens import SEG_TOKEN, depth_span

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
class AskedScene:
    """One scene with its questions: token ids of every turn (question, answer), and the targets."""

    image: np.ndarray  # (H, W, 3) uint8, with marked points if any
    depth: np.ndarray  # (H, W) float32 metres
    instances: np.ndarray  # (H, W) uint8
    kinds: np.ndarray  # (objects + 1, 4) shape, colour, size, material of each instance id; 0 = background
    cells: np.ndarray  # (g * g,) instance id that each image token sees
    turns: list[tuple[list[int], list[int], Response]]


class SceneAsker:
    """Renders scenes and tokenizes their questions for one processor; the depth codes are filled in by the codec."""

    def __init__(self, processor: PerceptioProcessor, size: int):
        self.processor, self.size = processor, size
        self.grid = int(processor.image_seq_length**0.5)
        picture = (
            processor.start_image_token + processor.image_token * processor.image_seq_length + processor.end_image_token
        )
        self.prefix = self._encode(f"<|im_start|>user\n{picture}\n")
        self.blank_span = depth_span([0] * processor.num_depth_tokens)
        self.end = processor.tokenizer.eos_token_id

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(self, response: Response) -> tuple[list[int], list[int]]:
        """Token ids of the question with the chat template's markers, and of the answer."""
        asked = self._encode(f"{response.question}<|im_end|>\n<|im_start|>assistant\n")
        span = self.blank_span if response.depth else ""
        return asked, [*self._encode(SEG_TOKEN * len(response.masks) + span + response.words), self.end]

    def scene(self, seed: int) -> AskedScene:
        """Render one scene, mark its points, and ask about it."""
        rng = np.random.default_rng([seed, 1])
        scene = render_scene(seed, size=self.size)
        questions = ask(scene, rng)
        image = scene.image
        for question in questions:
            if question.points:
                image = draw_points(image, question.points, question.letters)
        return AskedScene(
            image=image,
            depth=scene.depth,
            instances=scene.instances,
            kinds=describe_objects(scene),
            cells=instance_of_cells(scene, self.grid),
            turns=[(*self.turn(response), response) for response in choose_responses(questions, rng)],
        )


def instance_of_cells(scene: Scene, grid: int) -> np.ndarray:
    """(grid * grid,) instance id of what fills most of each cell; an object needs only a third of its cell."""
    side = scene.instances.shape[0] // grid
    blocks = scene.instances.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid * grid, -1)
    counts = np.stack([(blocks == k).sum(1) for k in range(len(scene.objects) + 1)], 1)
    counts[:, 0] //= 2
    return counts.argmax(1)


def describe_objects(scene: Scene) -> np.ndarray:
    """(objects + 1, 4): shape, colour, size and material of every instance id as classes from 1; row 0 is 0."""
    rows = [(0, 0, 0, 0)]
    for thing in scene.objects:
        named = ((SHAPES, thing.shape), (COLORS, thing.color), (SIZES, thing.size), (MATERIALS, thing.material))
        rows.append(tuple(1 + names.index(name) for names, name in named))
    return np.array(rows)


KIND_CLASSES = tuple(1 + len(names) for names in (SHAPES, COLORS, SIZES, MATERIALS))


@dataclass
class TurnBatch:
    """Turns of a batch of scenes, right-padded, each behind the prefix of its scene."""

    input_ids: torch.Tensor  # (n, L)
    labels: torch.Tensor  # (n, L), -100 in questions and padding
    rows: torch.Tensor  # (n,) scene of each turn
    mask_rows: torch.Tensor  # (m,) scene of each [SEG], in reading order
    mask_instances: torch.Tensor  # (m,) instance id each [SEG] stands for
    mask_kinds: torch.Tensor  # (m, 4) what kind of object that is


@dataclass
class SceneBatch:
    """A batch of scenes. Turns with a depth span are four times as long as the others: they are padded apart."""

    pixel_values: torch.Tensor  # (b, 3, H, W) normalised as InternVL does
    mask_pixel_values: torch.Tensor  # (b, 3, S, S) normalised as SAM2 does
    inverse_depth: torch.Tensor  # (b, H, W) relative, 1 = nearest
    instances: torch.Tensor  # (b, H, W)
    cells: torch.Tensor  # (b, g * g, 4) shape, colour, size, material of what each image token sees; 0 = background
    prefix_ids: torch.Tensor  # (b, P)
    turns: list[TurnBatch]

    @property
    def mask_rows(self) -> torch.Tensor:
        """(m,) scene of each [SEG] of all turns."""
        return torch.cat([turns.mask_rows for turns in self.turns])

    @property
    def mask_instances(self) -> torch.Tensor:
        """(m,) instance of each [SEG] of all turns."""
        return torch.cat([turns.mask_instances for turns in self.turns])

    def mask_targets(self, size: tuple[int, int]) -> torch.Tensor:
        """(m, h, w) share of each cell covered by the object of each [SEG]."""
        inside = (self.instances[self.mask_rows] == self.mask_instances[:, None, None]).float()
        return F.interpolate(inside[:, None], size=size, mode="bilinear", antialias=True)[:, 0]


def normalise(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, side, side), antialiased bilinear, ImageNet statistics; as the processor does."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def collate(scenes: list[AskedScene], *, prefix: list[int], pad: int, mask_side: int) -> SceneBatch:
    """Stack scenes and pad their turns."""
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    inverse = 1 / torch.from_numpy(np.stack([scene.depth for scene in scenes]))
    far, near = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
    turns = [(row, *turn) for row, scene in enumerate(scenes) for turn in scene.turns]
    return SceneBatch(
        pixel_values=normalise(pictures, pictures.shape[1]),
        mask_pixel_values=normalise(pictures, mask_side),
        inverse_depth=(inverse - far) / (near - far),
        instances=torch.from_numpy(np.stack([scene.instances for scene in scenes])).long(),
        cells=torch.from_numpy(np.stack([scene.kinds[scene.cells] for scene in scenes])),
        prefix_ids=torch.tensor([prefix] * len(scenes)),
        turns=[
            _stack_turns([turn for turn in turns if turn[3].depth], scenes, pad),
            _stack_turns([turn for turn in turns if not turn[3].depth], scenes, pad),
        ],
    )


def _stack_turns(
    turns: list[tuple[int, list[int], list[int], Response]], scenes: list[AskedScene], pad: int
) -> TurnBatch:
    ids = [torch.tensor(asked + answer) for _, asked, answer, _ in turns]
    labels = [torch.tensor([_IGNORED_LABEL] * len(asked) + answer) for _, asked, answer, _ in turns]
    masks = [(row, instance) for row, *_, response in turns for instance in response.masks]
    kinds = [scenes[row].kinds[instance] for row, instance in masks]
    return TurnBatch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad),
        labels=pad_sequence(labels, batch_first=True, padding_value=_IGNORED_LABEL),
        rows=torch.tensor([row for row, *_ in turns]),
        mask_rows=torch.tensor([row for row, _ in masks], dtype=torch.long),
        mask_instances=torch.tensor([instance for _, instance in masks], dtype=torch.long),
        mask_kinds=torch.from_numpy(np.array(kinds, dtype=np.int64).reshape(-1, len(KIND_CLASSES))),
    )


class SceneStream(IterableDataset):
    """Batches of fresh scenes, from `first_seed` on; no scene comes twice, in whichever process."""

    def __init__(
        self, processor: PerceptioProcessor, size: int, batch_size: int, first_seed: int, rank: int, processes: int
    ):
        self.asker = SceneAsker(processor, size)
        self.batch_size, self.first_seed, self.rank, self.processes = batch_size, first_seed, rank, processes

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        tokenizer, side = self.asker.processor.tokenizer, self.asker.processor.mask_image_size
        for step in itertools.count(number, workers):
            first = self.first_seed + (step * self.processes + self.rank) * self.batch_size
            scenes = [self.asker.scene(seed) for seed in range(first, first + self.batch_size)]
            yield collate(scenes, prefix=self.asker.prefix, pad=tokenizer.pad_token_id, mask_side=side)


def scene_batches(
    processor: PerceptioProcessor,
    *,
    size: int,
    batch_size: int,
    first_seed: int,
    workers: int = 1,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[SceneBatch]:
    """An endless stream of training batches, rendered by `workers` other processes (0: by this one).

    Of `processes` that train together, number `rank` gets every `processes`-th batch.
    """
    stream = SceneStream(processor, size, batch_size, first_seed, rank, processes)
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
