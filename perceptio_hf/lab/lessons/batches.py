"""Rendered scenes as training batches: every picture is shown once and asked many questions.

All questions about a picture share its prefix, whose keys and values are computed once; each question and its answer
is a row of its own behind that prefix. Questions never see one another, as if each were a conversation of its own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.tokens import SEG_TOKEN, depth_span
from perceptio_hf.training.attention.loss import FIND, FIND_OBJECT, READ, SEGMENT, WRITE
from perceptio_hf.training.losses.labels import IGNORED_LABEL
from perceptio_hf.world import Question, Scene, ask, draw_points, render_scene
from perceptio_hf.world.cells import cell_words
from perceptio_hf.world.scene import COLORS, MATERIALS, SHAPES, SIZES

from .answers import LETTERS, PHRASE, AnswerForm, Marks, Responder, Response, cells_of_objects

_PRACTICE = 5_000_000  # from the first scene that is asked about to the first that is only practised on
_MARKED, _MARKED_ANYWAY = 0.85, 0.5  # how often the points of a question are shown, and points without one


@dataclass
class AskedScene:
    """One scene with its questions: token ids of every turn (question, answer), and the targets."""

    image: np.ndarray  # (H, W, 3) uint8, with marked points if any
    depth: np.ndarray  # (H, W) float32 metres
    instances: np.ndarray  # (H, W) uint8
    kinds: np.ndarray  # (objects + 1, 4) shape, colour, size, material of each instance id; 0 = background
    geometry: np.ndarray  # (objects + 1, 5) where each instance is and how large, see `GEOMETRY`
    shares: np.ndarray  # (objects + 1, g * g) bool, the cells of each instance, see `cells_of_objects`
    cells: np.ndarray  # (g * g,) instance id that each image token sees
    letters: np.ndarray  # (g * g,) 1 + index of the letter of the point marked there, 0 = none
    turns: list[tuple[list[int], list[int], Response]]


class SceneAsker:
    """Renders scenes and tokenizes their questions for one processor; the depth codes are filled in by the codec.

    `phrases` further referring questions about each scene are answered by [SEG] alone.
    """

    def __init__(self, processor: PerceptioProcessor, size: int, form: AnswerForm | None = None, phrases: int = 0):
        self.processor, self.size, self.phrases = processor, size, phrases
        self.grid = int(processor.image_seq_length**0.5)
        picture = (
            processor.start_image_token + processor.image_token * processor.image_seq_length + processor.end_image_token
        )
        self.prefix = self._encode(f"<|im_start|>user\n{picture}\n")
        self.blank_span = depth_span([0] * processor.num_depth_tokens)
        self.end = processor.tokenizer.eos_token_id
        ids = processor.spatial_token_ids()
        self.seg_id, self.start_id = ids["seg_token_id"], ids["depth_start_token_id"]
        words = processor.tokenizer.convert_tokens_to_ids(cell_words(self.grid))
        self.cell_ids = {token: cell for cell, token in enumerate(words)}
        self.responder = Responder(form or AnswerForm(), self.grid)

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(self, response: Response) -> tuple[list[int], list[int]]:
        """Token ids of the question with the chat template's markers, and of the answer."""
        asked = self._encode(f"{response.question}<|im_end|>\n<|im_start|>assistant\n")
        span = self.blank_span if response.depth else ""
        if response.kind == PHRASE:
            return asked, self._encode(SEG_TOKEN * len(response.masks))
        return asked, [*self._encode(SEG_TOKEN * len(response.masks) + span + response.words), self.end]

    def looks(
        self, scene: AskedScene, asked: int, answer: list[int], response: Response
    ) -> Iterator[tuple[int, list[int] | int, int]]:
        """Where each token of an answer had better look: (its place in the turn, places of prefix and turn, why).

        A code of the span looks at its own image token when it is predicted, a [SEG] at those of its object, a cell
        that must be found at its own, or those of its object, when it is predicted; a cell that was written, at its
        code in the span, or where there is no span and the cell is an object's, at its image token.
        """
        picture = self.prefix.index(self.processor.image_token_id)
        segs, found, span = iter(response.masks), iter(response.found), None
        objects = iter(response.objects)
        for place, token in enumerate(answer, start=asked):
            if token == self.seg_id:
                yield place, self._seen(scene, next(segs), picture), SEGMENT
            elif token == self.start_id:
                span = place + 1
                for cell in range(self.grid**2):
                    yield place + cell, picture + cell, WRITE
            elif token in self.cell_ids:
                cell = self.cell_ids[token]
                if response.objects:
                    yield place - 1, self._seen(scene, next(objects), picture), FIND_OBJECT
                elif next(found, None) is not None:
                    yield place - 1, picture + cell, FIND
                if span is not None:
                    yield place, len(self.prefix) + span + cell, READ
                elif response.objects:
                    yield place, picture + cell, READ

    def _seen(self, scene: AskedScene, instance: int, picture: int) -> list[int]:
        """The places of an object's image tokens."""
        return [picture + cell for cell in np.flatnonzero(scene.shares[instance])]

    def _marks(self, questions: list[Question], rng: np.random.Generator) -> Marks | None:
        """The points that a question is about, now and then none: most users' pictures are not marked."""
        marked = [Marks(question.points, question.letters) for question in questions if question.points]
        return marked[0] if marked and rng.random() < _MARKED else None

    def scene(self, seed: int) -> AskedScene:
        """Render one scene, mark points, and ask about it."""
        rng = np.random.default_rng([seed, 1])
        scene = render_scene(seed, size=self.size)
        questions = ask(scene, rng)
        marks = self._marks(questions, rng)
        if marks is None or len(set(marks.cells(self.size, self.grid))) < len(marks.points):
            # Where two points share a cell, the cells cannot tell which is nearer.
            questions = [question for question in questions if not question.points]
            marks = Marks.anywhere(self.size, self.grid, rng) if rng.random() < _MARKED_ANYWAY else Marks((), ())
        responses = self.responder.choose(scene, questions, marks, rng)
        return self._asked(scene, marks, responses + self.responder.phrases(scene, rng, self.phrases))

    def referred(self, seed: int) -> AskedScene:
        """Render one scene without marks and ask only for objects, as often as `phrases` allows."""
        scene, rng = render_scene(seed, size=self.size), np.random.default_rng([seed, 3])
        return self._asked(scene, Marks((), ()), self.responder.phrases(scene, rng, self.phrases))

    def practice(self, seed: int) -> AskedScene:
        """Render one scene that nothing is asked about, every other one crowded with marks.

        A small ViT reads letters of five pixels only after some hundred thousand of them.
        """
        rng = np.random.default_rng([seed, 2])
        marks = Marks.crowd if seed % 2 else Marks.anywhere
        return self._asked(render_scene(seed, size=self.size), marks(self.size, self.grid, rng), [])

    def _asked(self, scene: Scene, marks: Marks, responses: list[Response]) -> AskedScene:
        letters = np.zeros(self.grid**2, dtype=np.int64)
        for cell, letter in zip(marks.cells(self.size, self.grid), marks.letters, strict=True):
            letters[cell] = 1 + LETTERS.index(letter)
        return AskedScene(
            image=draw_points(scene.image, marks.points, marks.letters),
            depth=scene.depth,
            instances=scene.instances,
            kinds=describe_objects(scene),
            geometry=measure_objects(scene),
            shares=cells_of_objects(scene, self.grid),
            cells=instance_of_cells(scene, self.grid),
            letters=letters,
            turns=[(*self.turn(response), response) for response in responses],
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


GEOMETRY = ("x", "y", "depth", "width", "height")


def measure_objects(scene: Scene) -> np.ndarray:
    """(objects + 1, 5) float32, columns as `GEOMETRY`: the centre in [0, 1], 0.3 log of the distance in metres and of
    width and height as shares of the picture's; so scaled all vary by some tenths. Row 0 is 0."""
    rows = [(0.0,) * len(GEOMETRY)]
    for thing in scene.objects:
        (x, y), (left, top, right, bottom) = thing.center, thing.box
        logs = 0.3 * np.log([thing.depth, (right - left) / scene.size, (bottom - top) / scene.size])
        rows.append((x / scene.size, y / scene.size, *logs))
    return np.array(rows, dtype=np.float32)


KIND_CLASSES = tuple(1 + len(names) for names in (SHAPES, COLORS, SIZES, MATERIALS))
CELL_CLASSES = (*KIND_CLASSES, 1 + len(LETTERS))


@dataclass
class TurnBatch:
    """Turns of a batch of scenes, right-padded, each behind the prefix of its scene."""

    input_ids: torch.Tensor  # (n, L)
    labels: torch.Tensor  # (n, L), -100 in questions and padding
    rows: torch.Tensor  # (n,) scene of each turn
    mask_rows: torch.Tensor  # (m,) scene of each [SEG], in reading order
    mask_instances: torch.Tensor  # (m,) instance id each [SEG] stands for
    looks: torch.Tensor  # (n, L, P + L) uint8: where each token had better look, and why, see `SceneAsker.looks`


@dataclass
class SceneBatch:
    """A batch of scenes. Turns with a depth span are four times as long as the others: they are padded apart."""

    pixel_values: torch.Tensor  # (b, 3, H, W) normalised as InternVL does
    mask_pixel_values: torch.Tensor  # (b, 3, S, S) normalised as SAM2 does
    inverse_depth: torch.Tensor  # (b, H, W) relative, 1 = nearest
    instances: torch.Tensor  # (b, H, W)
    cells: torch.Tensor  # (b, g * g, 5) shape, colour, size, material, letter that each image token sees; 0 = none
    geometry: torch.Tensor  # (b, g * g, 5) of the object that each image token sees, see `GEOMETRY`; 0 = none
    prefix_ids: torch.Tensor  # (b, P)
    turns: list[TurnBatch]

    def to(self, device: torch.device) -> "SceneBatch":
        """The same batch on `device`."""
        return _moved(replace(self, turns=[_moved(turns, device) for turns in self.turns]), device)

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


def _moved(batch, device: torch.device):
    """A copy of a batch whose tensors are on `device`."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return replace(batch, **{k: value.to(device) for k, value in values.items() if isinstance(value, torch.Tensor)})


def click_prompts(model: PerceptioForConditionalGeneration, scenes: SceneBatch) -> torch.Tensor:
    """(m, C): SAM2's embedding of a click somewhere on the object of each [SEG]."""
    inside = scenes.instances[scenes.mask_rows] == scenes.mask_instances[:, None, None]
    pixel, size = inside.flatten(1).float().multinomial(1)[:, 0], inside.shape[-1]
    clicks = torch.stack([pixel % size, pixel // size], -1) + 0.5  # (m, 2) x, y
    clicks = clicks * scenes.mask_pixel_values.shape[-1] / size
    labels = torch.ones(len(clicks), 1, 1, dtype=torch.int, device=clicks.device)
    points, _ = model.mask_model.prompt_encoder(clicks[:, None, None], labels, input_boxes=None, input_masks=None)
    return points[:, 0, 0]


def normalise(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, side, side), antialiased bilinear, ImageNet statistics; as the processor does."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def collate(scenes: list[AskedScene], asker: SceneAsker) -> SceneBatch:
    """Stack scenes and pad their turns."""
    processor = asker.processor
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    inverse = 1 / torch.from_numpy(np.stack([scene.depth for scene in scenes]))
    far, near = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
    turns = [(row, *turn) for row, scene in enumerate(scenes) for turn in scene.turns]
    cells = [np.column_stack([scene.kinds[scene.cells], scene.letters]) for scene in scenes]
    groups = [[turn for turn in turns if turn[3].depth], [turn for turn in turns if not turn[3].depth]]
    pixels, same = normalise(pictures, pictures.shape[1]), pictures.shape[1] == processor.mask_image_size
    return SceneBatch(
        pixel_values=pixels,
        mask_pixel_values=pixels if same else normalise(pictures, processor.mask_image_size),
        inverse_depth=(inverse - far) / (near - far),
        instances=torch.from_numpy(np.stack([scene.instances for scene in scenes])).long(),
        cells=torch.from_numpy(np.stack(cells)),
        geometry=torch.from_numpy(np.stack([scene.geometry[scene.cells] for scene in scenes])),
        prefix_ids=torch.tensor([asker.prefix] * len(scenes)),
        turns=[_stack_turns(group, scenes, asker) for group in groups if group],
    )


def _stack_turns(
    turns: list[tuple[int, list[int], list[int], Response]], scenes: list[AskedScene], asker: SceneAsker
) -> TurnBatch:
    ids = [torch.tensor(asked + answer) for _, asked, answer, _ in turns]
    labels = [torch.tensor([IGNORED_LABEL] * len(asked) + answer) for _, asked, answer, _ in turns]
    masks = [(row, instance) for row, *_, response in turns for instance in response.masks]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=asker.processor.tokenizer.pad_token_id)
    looks = torch.zeros(*input_ids.shape, len(asker.prefix) + input_ids.shape[1], dtype=torch.uint8)
    for index, (row, asked, answer, response) in enumerate(turns):
        for query, keys, why in asker.looks(scenes[row], len(asked), answer, response):
            looks[index, query, keys] = why
    return TurnBatch(
        input_ids=input_ids,
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        rows=torch.tensor([row for row, *_ in turns]),
        mask_rows=torch.tensor([row for row, _ in masks], dtype=torch.long),
        mask_instances=torch.tensor([instance for _, instance in masks], dtype=torch.long),
        looks=looks,
    )


class SceneStream(IterableDataset):
    """Batches of fresh scenes, from `first_seed` on; no scene comes twice, in whichever process."""

    def __init__(
        self,
        asker: SceneAsker,
        batch_size: int,
        first_seed: int,
        rank: int,
        processes: int,
        way: str,
        practised: int = 0,
    ):
        self.asker, self.render, self.practised = asker, getattr(asker, way), practised
        self.batch_size, self.first_seed, self.rank, self.processes = batch_size, first_seed, rank, processes

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in itertools.count(number, workers):
            turn = step * self.processes + self.rank
            first = self.first_seed + turn * self.batch_size
            scenes = [self.render(seed) for seed in range(first, first + self.batch_size)]
            first = self.first_seed + _PRACTICE + turn * self.practised
            scenes += [self.asker.practice(seed) for seed in range(first, first + self.practised)]
            yield collate(scenes, self.asker)


def scene_batches(
    processor: PerceptioProcessor,
    *,
    size: int,
    batch_size: int,
    first_seed: int,
    form: AnswerForm | None = None,
    phrases: int = 0,
    practised: int = 0,
    way: str = "scene",
    workers: int = 1,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[SceneBatch]:
    """An endless stream of training batches, rendered by `workers` other processes (0: by this one).

    Of `processes` that train together, number `rank` gets every `processes`-th batch. `way` is the method of
    `SceneAsker` that makes scenes: "scene", "practice" (nothing is asked) or "referred" (objects alone). Behind every
    batch's scenes come `practised` further ones that nothing is asked about.
    """
    asker = SceneAsker(processor, size, form, phrases)
    stream = SceneStream(asker, batch_size, first_seed, rank, processes, way, practised)
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
