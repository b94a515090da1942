"""How soon an answer is there, beside what one would otherwise run.

    python benchmarks/speed.py --out benchmarks/results/speed.json
    python benchmarks/speed.py --parts spans answers steps masks codec grammar --spans 200
    python benchmarks/speed.py --parts large --rounds 3 --batches 1

All sides of a comparison take turns in one process, after one round that does not count; figures are medians of CPU
seconds (on a GPU: seconds). The sides are

- `peers`: stock InternVL's `generate` on the same weights with a processor that allows one code at a time (AURORA's
  constrained greedy), the [SEG] states from one more pass, and SAM2 anew for every [SEG] (Sa2VA);
- `loop`: our `generate` in transformers' own loop, one code a pass, the whole vocabulary at every step;
- `sequential` and `parallel`: our `generate` with that `spatial_decoding`.

`large` is a model of 152 M parameters with a vocabulary of 151,674 and random weights. These would write [SEG] and
nothing else, and their spans would not converge, since every code hangs on the one before. All is computed, but when
[SEG] and the span come is arranged (`writing`), and which codes a pass predicts (`converging`), so that an answer is
three masks, a span that takes the passes of the shipped weights, and words.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from codec_speed import AiTEncoder
from large import cut_internvl_config
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    InternVLForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    Sam2Config,
    Sam2Model,
)

import perceptio_hf
from perceptio_hf import DepthVQVAE, DepthVQVAEConfig, PerceptioForConditionalGeneration
from perceptio_hf.files import out_file, write_json
from perceptio_hf.modeling.modeling_perceptio import CACHE
from perceptio_hf.modeling.span_grammar import SpanGrammar
from perceptio_hf.modeling.spans import spatial_loop
from perceptio_hf.modeling.spans.grammar_state import GrammarState, LoopGrammar
from perceptio_hf.world import HELD_OUT_SEED, render_scene
from perceptio_hf.world.questions import refer_often

SHARE = 0.3  # of the codes of a span: a little more passes than those that the shipped weights take, in float32
PARTS = ("spans", "answers", "steps", "masks", "codec", "second", "grammar", "large")
STEPS = 32  # outside of spans
MASKS, WORDS = 3, 32  # in an answer of the large model, beside its span
QUESTIONS = ("Which is closer, A or B?", "How many objects are there?", "Give me the depth map.")


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each side; they take turns, and the first round does not count."""
    spent = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            before = seconds(device)
            run()
            if number:
                spent[name].append(seconds(device) - before)
    return {name: statistics.median(values) for name, values in spent.items()}


class Scripted(LogitsProcessor):
    """Allows one prepared token at each step, so that all sides have the same work; also how the peers constrain."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids  # (rows, length)

    def __call__(self, input_ids, scores):
        allowed = self.ids[:, input_ids.shape[1]].to(scores.device)
        masked = torch.full_like(scores, float("-inf"))
        return masked.scatter_(1, allowed[:, None], 0.0)


class Unknown(LogitsProcessor):
    """Changes nothing, and sends generation through transformers' own loop."""

    def __call__(self, input_ids, scores):
        return scores


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Collects how many passes each loop of ours took."""
    counts, decoder = [], spatial_loop.SpanDecoder

    class Counting(decoder):
        def run(self, *args):
            result = super().run(*args)
            counts.append(self.passes)
            return result

    spatial_loop.SpanDecoder = Counting
    try:
        yield counts
    finally:
        spatial_loop.SpanDecoder = decoder


@contextmanager
def converging(ids: torch.Tensor, share: float) -> Iterator[None]:
    """Within, spans come out as in `ids` (rows, length), in the passes of a trained model whatever the weights are.

    A trained model predicts most codes rightly behind wrong ones. The `share` of them that it does not, here the same
    in every row, it predicts rightly where all codes before them are right; each of these costs a pass.
    """
    decoder = spatial_loop.SpanDecoder

    class Converging(decoder):
        hard: torch.Tensor | None = None  # (N,) bool

        def _read_codes(self, code_logits, logits, start):
            length, codes, device = self.words.num_depth_tokens, code_logits.shape[-1], start.device
            if self.hard is None:
                order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
                self.hard = (order < round(share * length)).to(device)
                self.whole = torch.nn.functional.pad(ids.to(device), (0, 1))
            places = start[:, None] + torch.arange(
                code_logits.shape[1] + 1, device=device
            )  # what is read, and one more
            right = self.whole.gather(1, places.clamp(max=self.whole.shape[1] - 1))
            follows = (self.ids.gather(1, places.clamp(max=self.limit)) == right)[:, :-1].long().cumprod(1).bool()
            number = (places[:, 1:] - (self.span_end[:, None] - length)).clamp(0, length - 1)
            code = (right[:, 1:] - self.words.codes[0]).clamp(0, codes - 1)
            code = torch.where(self.hard[number] & ~follows, (code + 1) % codes, code)
            return super()._read_codes(torch.zeros_like(code_logits).scatter_(2, code[..., None], 1.0), logits, start)

    spatial_loop.SpanDecoder = Converging
    try:
        yield
    finally:
        spatial_loop.SpanDecoder = decoder


@contextmanager
def writing(model: PerceptioForConditionalGeneration, start: int, masks: int) -> Iterator[None]:
    """Within, behind prompts of `start` tokens without padding, a model of random weights writes `masks` [SEG], one
    span, and words that end nowhere.

    The last two numbers of a hidden state decide about [SEG] and the span's start, and about nothing else.
    """
    words, head = model.spatial_vocabulary(), model.get_output_embeddings().weight
    with torch.no_grad():
        head[:, -2:] = 0
        head[[words.seg, words.depth_start, model.generation_config.eos_token_id]] = 0
        head[words.seg, -1] = head[words.depth_start, -2] = 1

    def decide(module, given, kwargs, output):
        cache, states = kwargs.get(CACHE), output.last_hidden_state
        length = states.shape[1] if cache is None else int(cache.get_seq_length())
        place = torch.arange(length - states.shape[1], length, device=states.device) + 1 - start  # of what comes next
        states[..., -1] = torch.where((place >= 0) & (place < masks), 20.0, -20.0)
        states[..., -2] = torch.where(place == masks, 20.0, -20.0)
        return output

    hook = model.model.language_model.register_forward_hook(decide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def check_answers(model: PerceptioForConditionalGeneration, ids: torch.Tensor, masks: int) -> None:
    """RuntimeError unless every row of `ids` has so many [SEG] and one span."""
    words = model.spatial_vocabulary()
    for token, expected in ((words.seg, masks), (words.depth_start, 1), (words.depth_end, 1)):
        found = (ids == token).sum(1)
        if not (found == expected).all():
            raise RuntimeError(f"Token {token} comes {found.tolist()} times in the rows, not {expected} times.")


def tiny(device: torch.device):
    folder = perceptio_hf.tiny_checkpoint()
    model = AutoModel.from_pretrained(folder).eval().to(device)
    return model, AutoProcessor.from_pretrained(folder)


def prompts(processor, first: int, count: int, device: torch.device, *, refer: bool = False) -> dict:
    """A batch of questions about rendered scenes; with `refer` each asks for the mask of one object."""
    chats = []
    for number in range(first, first + count):
        scene = render_scene(HELD_OUT_SEED + 5_000_000 + number, size=128)
        picture, text = Image.fromarray(scene.image), QUESTIONS[number % len(QUESTIONS)]
        if refer:
            text = refer_often(scene, np.random.default_rng(number), 1)[0].text
        question = {"type": "text", "text": text}
        chats.append([{"role": "user", "content": [{"type": "image", "image": picture}, question]}])
    return dict(
        processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device)
    )


def span_figures(count: int, device: torch.device) -> dict:
    """Passes of a span, and how many of `count` spans are those of code-by-code decoding, in two precisions."""
    model, processor = tiny(device)
    length = model.spatial_vocabulary().span_length
    inputs = [prompts(processor, number, 1, device) for number in range(count)]
    options = {"spatial": "depth", "do_sample": False, "max_new_tokens": length}
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        expected = [cast.generate(**given, **options, spatial_decoding="sequential") for given in inputs]
        for places in (24, 4096):
            with counted_passes() as passes, replaced(spatial_loop, "_PLACES", {"cpu": places, "cuda": places}):
                spent, same = seconds(device), 0
                for given, right in zip(inputs, expected, strict=True):
                    same += torch.equal(cast.generate(**given, **options), right)
                spent = seconds(device) - spent
            figures[f"{str(dtype).removeprefix('torch.')}, {places} places"] = {
                "passes": statistics.mean(passes),
                "of codes": statistics.mean(passes) / model.config.num_depth_tokens,
                "same spans": same,
                "of": count,
                "seconds": spent / count,
            }
    return figures


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def answer_sides(model, inputs: dict, ids: torch.Tensor, spatial: str) -> dict[str, Callable]:
    """Every side makes the answer `ids` (rows, length), whose last token is not read."""
    start = inputs["input_ids"].shape[1]
    length = ids.shape[1] - start
    options = {"do_sample": False, "max_new_tokens": length, "return_dict_in_generate": True}

    def ours(**more):
        return model.generate(**inputs, **options, spatial=spatial, **more)

    return {
        "peers": lambda: peers(model, inputs, ids, length),
        "loop": lambda: ours(logits_processor=LogitsProcessorList([Unknown()])),
        "sequential": lambda: ours(spatial_decoding="sequential"),
        "parallel": lambda: ours(),
    }


def stock(model, inputs: dict, length: int, **more) -> torch.Tensor:
    """InternVL's own `generate`, greedily."""
    given = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    generate = super(PerceptioForConditionalGeneration.__mro__[2], model).generate
    return generate(**given, do_sample=False, max_new_tokens=length, **more)


@torch.no_grad()
def peers(model, inputs: dict, ids: torch.Tensor, length: int) -> None:
    """Stock `generate`, [SEG] states from one more pass, SAM2 anew for every [SEG], the codec."""
    out = stock(model, inputs, length, logits_processor=LogitsProcessorList([Scripted(ids)]))
    words = model.spatial_vocabulary()
    rows, places = (out[:, inputs["input_ids"].shape[1] :] == words.seg).nonzero(as_tuple=True)
    if len(rows):
        hidden = model.model(input_ids=out, pixel_values=inputs["pixel_values"]).last_hidden_state
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            state = hidden[row, inputs["input_ids"].shape[1] + place]
            model.predict_masks(state[None], inputs["mask_pixel_values"][row : row + 1], [0])
    first = out == words.depth_start
    for row, place in first.nonzero().tolist():
        span = out[row, place + 1 : place + 1 + words.num_depth_tokens]
        if len(span) == words.num_depth_tokens:
            model.depth_model.decode(span - words.codes[0])


def answer_figures(rounds: int, batches: tuple[int, ...], device: torch.device) -> dict:
    """Whole answers of the embedded checkpoint, by batch."""
    model, processor = tiny(device)
    figures = {}
    for batch in batches:
        for spatial in ("depth", "seg+depth"):
            # Where no mask is asked for and one is forced, several are written, each of which costs the peers SAM2.
            inputs = prompts(processor, 1000, batch, device, refer=spatial == "seg+depth")
            out = model.generate(**inputs, spatial=spatial, do_sample=False, max_new_tokens=100)
            check_answers(model, out, int(spatial == "seg+depth"))
            sides = answer_sides(model, inputs, out, spatial)
            figures[f"{spatial}, batch {batch}"] = in_turns(sides, rounds, device)
    return figures


def step_figures(rounds: int, batches: tuple[int, ...], device: torch.device) -> dict:
    """One step outside of spans at 152 M parameters: ours, and stock InternVL's, which knows no grammar."""
    model, figures = large_model(device), {}
    for batch in batches:
        inputs = large_inputs(model, batch, device)
        spent = in_turns(step_sides(model, inputs, 2) | step_sides(model, inputs, STEPS + 2), rounds, device)
        figures[f"batch {batch}"] = {
            side: (spent[f"{side} {STEPS + 2}"] - spent[f"{side} 2"]) / STEPS for side in ("stock", "loop", "ours")
        }
    return figures


def step_sides(model, inputs: dict, length: int) -> dict[str, Callable]:
    """Every side writes `length` words."""
    never = {"eos_token_id": model.config.text_config.vocab_size}
    options = inputs | never | {"do_sample": False, "spatial": "none", "max_new_tokens": length}
    return {
        f"stock {length}": lambda: stock(model, inputs, length, **never),
        f"loop {length}": lambda: model.generate(**options, logits_processor=LogitsProcessorList([Unknown()])),
        f"ours {length}": lambda: model.generate(**options),
    }


def codec_figures(rounds: int, device: torch.device) -> dict:
    """Codes of depth maps by our codec and by AiT's, on the same weights; benchmarks/codec_speed.py has more of it."""
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig()).eval().to(device)
    theirs, figures = AiTEncoder(codec).eval(), {}
    for batch in (1, 8):
        depth = torch.rand(batch, 320, 320, device=device)
        sides = {"AiT": lambda d=depth: theirs(d), "ours": lambda d=depth: codec.encode(d)}
        figures[f"batch {batch}"] = in_turns(sides, 4 * rounds, device)
    return figures


def mask_figures(rounds: int, device: torch.device) -> dict:
    """One and eight masks of one picture with SAM2 (Hiera tiny) at 512 pixels."""
    model, side = large_model(device), 512
    states = torch.randn(8, model.config.text_config.hidden_size, device=device)
    pixels = torch.randn(1, 3, side, side, device=device)
    with torch.no_grad():
        sides = {
            "1 mask": lambda: model.predict_masks(states[:1], pixels, [0]),
            "8 masks": lambda: model.predict_masks(states, pixels, [0] * 8),
            "8 masks, one by one": lambda: [model.predict_masks(states[k : k + 1], pixels, [0]) for k in range(8)],
        }
        figures = in_turns(sides, rounds, device)
        with model.keep_mask_features(1):
            figures |= in_turns({"1 mask of a known picture": sides["1 mask"]}, rounds, device)
    return figures


def second_figures(rounds: int, device: torch.device) -> dict:
    """A second question about the same picture, afresh and with what was kept."""
    model, processor = tiny(device)
    inputs = prompts(processor, 2000, 1, device)
    options = {"spatial": "seg", "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    with model.keep_mask_features(1):
        first = model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, inputs["input_ids"][:, -4:]], 1)
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mask_pixel_values": inputs["mask_pixel_values"],
        }
        name = "cache" if "cache" in first else "past_key_values"

        def known():
            return model.generate(**given, **{name: copy.deepcopy(first[name])}, **options)

        figures = in_turns({"known": known}, rounds, device)
    fresh = lambda: model.generate(**given, pixel_values=inputs["pixel_values"], **options)  # noqa: E731
    return figures | in_turns({"afresh": fresh}, rounds, device)


def grammar_figures(rounds: int, device: torch.device) -> dict:
    """One step of the grammar over 32 rows of 151,674 words: as state, where words are allowed and where one of the
    spatial tokens must come, and read off the ids, as in loops of transformers and as in the tests' reference."""
    model = large_model(device)
    words, rows = model.spatial_vocabulary(), 32
    pictures = torch.ones(rows, dtype=torch.long, device=device)
    state = GrammarState(words, "auto", pictures, torch.zeros(rows, dtype=torch.bool, device=device))
    limits = {"prompt_length": 0, "max_length": 400, "num_pictures": pictures, "open_codes": pictures - 2}
    reference, loop = (kind(words, spatial="auto", **limits) for kind in (SpanGrammar, LoopGrammar))
    vocabulary = model.config.text_config.vocab_size
    scores, room = torch.randn(rows, vocabulary, device=device), torch.full_like(pictures, 200)
    ids = torch.randint(1000, 2000, (rows, 100), device=device)
    sides = {
        "state": lambda: state.restrict(scores, room, only=False),
        "state, forced": lambda: state.restrict(scores, room, only=True),
        "in loops of transformers": lambda: loop(ids, scores),
        "reference": lambda: reference(ids, scores),
    }
    return in_turns(sides, 20 * rounds, device)


def large_model(device: torch.device) -> PerceptioForConditionalGeneration:
    """152 M parameters in InternVL's shapes cut in depth and width, the vocabulary whole; random weights."""
    torch.manual_seed(0)
    config = cut_internvl_config(448)
    masks = Sam2Config()
    masks.vision_config.backbone_config.image_size = [512, 512]
    masks.vision_config.backbone_feature_sizes = [[128, 128], [64, 64], [32, 32]]
    masks.prompt_encoder_config.image_size = 512
    parts = InternVLForConditionalGeneration(config), Sam2Model(masks), DepthVQVAE(DepthVQVAEConfig())
    model = PerceptioForConditionalGeneration.from_components(*parts).eval().to(device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model


def large_inputs(model, batch: int, device: torch.device) -> dict:
    """A picture and 16 words in each row."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((batch, model.config.image_seq_length), model.config.image_token_id)
    ids = torch.cat([picture, torch.randint(1000, 2000, (batch, 16), generator=generator)], 1).to(device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 448, 448, generator=generator).to(device),
        "mask_pixel_values": torch.randn(batch, 3, 512, 512, generator=generator).to(device),
    }


def large_figures(rounds: int, batches: tuple[int, ...], share: float, device: torch.device) -> dict:
    """Whole answers at 152 M parameters: three masks, a span of 100 codes and 32 words."""
    model = large_model(device)
    words, figures = model.spatial_vocabulary(), {}
    for batch in batches:
        inputs = large_inputs(model, batch, device)
        length, start = MASKS + words.span_length + WORDS, inputs["input_ids"].shape[1]
        sequential = {"spatial_decoding": "sequential", "do_sample": False}
        with writing(model, start, MASKS):
            out = model.generate(**inputs, spatial="seg+depth", max_new_tokens=length, **sequential)
            check_answers(model, out, MASKS)
            rest = inputs | {"spatial": "seg", "do_sample": False, "max_new_tokens": MASKS + WORDS}
            sides = {"without the span": lambda given=rest: model.generate(**given, return_dict_in_generate=True)}
            with converging(out, share), counted_passes() as passes:
                sides |= answer_sides(model, inputs, out, "seg+depth")
                figures[f"batch {batch}"] = in_turns(sides, rounds, device)
        figures[f"batch {batch}"]["passes"] = passes[-1]  # those of the last side, which is the parallel one
    return figures


def table(figures: dict) -> str:
    """One line for each figure, with what each side takes of the slowest."""
    lines = ["| | " + " | ".join(["side", "seconds", "of the slowest"]) + " |", "|---|---|---|---|"]
    for part, values in figures.items():
        groups = values if all(isinstance(value, dict) for value in values.values()) else {"": values}
        for group, sides in groups.items():
            slowest = max(sides.values())
            for side, value in sides.items():
                share = f"{value / slowest:.3f}" if part != "spans" and side != "passes" else ""
                lines.append(f"| {part} {group} | {side} | {value:.4g} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=out_file, help="a JSON file, which keeps what other parts have left in it")
    parser.add_argument("--spans", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--share", type=float, default=SHARE, help="of the large model's codes that cost a pass each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, rounds, batches = torch.device(arguments.device), arguments.rounds, tuple(arguments.batches)
    make = {
        "spans": lambda: span_figures(arguments.spans, device),
        "answers": lambda: answer_figures(rounds, batches, device),
        "steps": lambda: step_figures(rounds, batches, device),
        "codec": lambda: codec_figures(rounds, device),
        "masks": lambda: mask_figures(rounds, device),
        "second": lambda: second_figures(rounds, device),
        "grammar": lambda: grammar_figures(rounds, device),
        "large": lambda: large_figures(rounds, batches, arguments.share, device),
    }
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": arguments.device}
    about["kernels"] = torch.backends.cpu.get_cpu_capability()
    for part in arguments.parts:
        figures = make[part]()
        print(table({part: figures}), flush=True)
        if arguments.out:  # after every part: a run that is stopped has lost nothing
            add(arguments.out, about, part, figures)


def add(path: Path, about: dict, part: str, figures: dict) -> None:
    """Write the figures of a part into the file, which keeps the other parts, and other batches of this one."""
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    known[part] = known.get(part, {}) | figures
    ordered = {name: known[name] for name in PARTS if name in known}
    write_json(path, {"about": about, "figures": ordered})


if __name__ == "__main__":
    main()
