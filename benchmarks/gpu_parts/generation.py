"""Generation: spans in parallel and one by one, their exactness, waiting for the device, the grammar."""

import importlib.util
import platform
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch
from speed import MASKS, SHARE, check_answers, converging, counted_passes, peers, prompts, tiny, writing

from perceptio_hf.modeling.span_grammar import SpanGrammar
from perceptio_hf.modeling.spans.grammar_state import GrammarState, LoopGrammar
from perceptio_hf.tokens import SpatialVocabulary

from .tools import (
    WORDS,
    device_ms,
    part,
    perceptio_config,
    profiled,
    question,
    random_model,
    seconds_of,
    synchronisations,
)

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "triton", "flash_attn")
WAYS = ("sequential", "parallel")


@part(seconds=4)
def environment(setup, record):
    with record.case("software") as figures:
        figures["python"] = platform.python_version()
        for name in PACKAGES:
            try:
                figures[name] = version(name)
            except PackageNotFoundError:
                figures[name] = "in no package" if importlib.util.find_spec(name) else "absent"
        figures["cuda"] = torch.version.cuda
    with record.case("device") as figures:
        if setup.is_cuda:
            about = torch.cuda.get_device_properties(setup.device)
            figures |= {"name": about.name, "gib": about.total_memory / 2**30, "capability": [about.major, about.minor]}
            figures["processors"] = about.multi_processor_count
        figures["host_threads"] = torch.get_num_threads()
    side = setup.size(8192, 64)
    for dtype in (torch.bfloat16, torch.float32):
        with record.case(f"matrix product {side}, {_name(dtype)}") as figures:
            one, other = (torch.randn(side, side, device=setup.device, dtype=dtype) for _ in range(2))
            milliseconds = device_ms(setup, lambda one=one, other=other: one @ other, repeats=10)
            figures["tflops"] = 2 * side**3 / milliseconds / 1e9


@part(seconds=45)
def generation_tiny(setup, record):
    """The embedded checkpoint: rows of a batch converge as trained spans do."""
    model, processor = tiny(setup.device)
    length = model.spatial_vocabulary().span_length + setup.size(12, 2)
    options = {"spatial": "depth", "do_sample": False, "max_new_tokens": length}
    batches = setup.size((1, 8, 32), (1,))
    given = {rows: prompts(processor, 0, rows, setup.device) for rows in batches}
    for dtype in setup.size((torch.float32, torch.bfloat16), (torch.float32,)):
        cast = model.to(dtype)
        for rows, inputs in given.items():
            if dtype == torch.bfloat16 and rows == 1:
                continue  # each case loads kernels of its own for some seconds, and one row says what eight say
            with record.case(f"{_name(dtype)}, batch {rows}") as figures:
                figures |= compare(setup, cast, inputs, options)
    model, _ = tiny(setup.device)
    with record.case("float32, prompts one by one") as figures:
        singles = [prompts(processor, number, 1, setup.device) for number in range(setup.size(16, 1))]
        figures["of"], figures["same"], figures["passes"] = len(singles), 0, []
        for inputs in singles:
            right = model.generate(**inputs, **options, spatial_decoding="sequential")
            with counted_passes() as passes:
                figures["same"] += torch.equal(model.generate(**inputs, **options), right)
            figures["passes"] += passes
    waiting(setup, record, model, given[batches[0]], options, "tiny", setup.size(WAYS, WAYS[1:]))


def compare(setup, model, inputs, options, *, arranged: bool = False) -> dict:
    """Seconds and passes of both ways of decoding, and whether they give the same ids; `arranged`: see
    `converging`."""
    found, rows, ids = {}, len(inputs["input_ids"]), {}
    model.generate(**inputs, **(options | {"spatial": "none", "max_new_tokens": 4}))  # libraries load, memory is taken
    for decoding in WAYS:
        chosen = options | {"spatial_decoding": decoding}
        run = lambda chosen=chosen: ids.update({chosen["spatial_decoding"]: model.generate(**inputs, **chosen)})  # noqa: E731
        spans = converging(ids["sequential"], SHARE) if arranged and ids else nullcontext()
        with spans, counted_passes() as passes:
            found[f"{decoding}_seconds"] = seconds_of(setup, run, warm=1)  # matrices of every new length load code
        new = ids[decoding].shape[1] - inputs["input_ids"].shape[1]
        found[f"{decoding}_passes"] = passes[-1]
        found[f"{decoding}_tokens_per_second"] = rows * new / found[f"{decoding}_seconds"]
        found[f"{decoding}_passes_per_second"] = passes[-1] / found[f"{decoding}_seconds"]
    one, other = (ids[name] for name in WAYS)
    width = min(one.shape[1], other.shape[1])
    found["rows_the_same"] = int((one[:, :width] == other[:, :width]).all(1).sum()) if width else 0
    found["rows"], found["new_tokens"] = rows, width - inputs["input_ids"].shape[1]
    found["parallel_over_sequential"] = found["parallel_seconds"] / found["sequential_seconds"]
    return found


def waiting(setup, record, model, inputs, options, name: str, decodings) -> None:
    """Synchronisations a token and a pass, with ids alone and with masks and depth."""
    for decoding in decodings:
        for whole in (False, True):
            with record.case(f"{name}, waiting, {decoding}, {'masks and depth' if whole else 'ids'}") as figures:
                chosen = options | {"spatial_decoding": decoding, "return_dict_in_generate": whole}
                out = []
                with counted_passes() as passes:
                    figures["synchronisations"] = synchronisations(
                        setup, lambda chosen=chosen, out=out: out.append(model.generate(**inputs, **chosen))
                    )
                ids = out[0].sequences if whole else out[0]
                figures["passes"], figures["tokens"] = passes[-1], ids.shape[1] - inputs["input_ids"].shape[1]
                if figures["synchronisations"] is not None:
                    figures["a_pass"] = figures["synchronisations"] / passes[-1]
                    figures["a_token"] = figures["synchronisations"] / figures["tokens"]


@part(seconds=110)
def generation_1b(setup, record):
    """InternVL's 1B shape, a span of 100 codes and 30 words: tokens and passes a second, beside the peers' way."""
    config = perceptio_config(setup)
    model = random_model(setup, config)
    words = model.spatial_vocabulary()
    length = words.span_length + setup.size(30, 2)
    options = {"spatial": "depth", "do_sample": False, "max_new_tokens": length}
    for dtype in (torch.bfloat16, torch.float32):
        cast = model if dtype == torch.float32 else random_model(setup, config, dtype)
        for rows in setup.size((1, 8, 32) if dtype == torch.bfloat16 else (8,), (2,)):
            with record.case(f"{_name(dtype)}, batch {rows}") as figures:
                inputs = question(setup, config, rows, dtype)
                figures |= compare(setup, cast, inputs, options, arranged=True)
        if dtype == torch.bfloat16:
            whole_answers(setup, record, cast, config, words)
        del cast


def whole_answers(setup, record, model, config, words) -> None:
    """Three masks, a depth map and words: ours, SAM2's share of it, the peers' pipeline; and waiting for the device."""
    inputs = question(setup, config, 1, torch.bfloat16, masks=True)
    length = MASKS + words.span_length + setup.size(32, 3)
    options = {"spatial": "seg+depth", "do_sample": False, "max_new_tokens": length}
    with writing(model, inputs["input_ids"].shape[1], MASKS):
        _whole_answers(setup, record, model, config, inputs, options)


def _whole_answers(setup, record, model, config, inputs, options) -> None:
    ids = model.generate(**inputs, **options, spatial_decoding="sequential")
    check_answers(model, ids, MASKS)
    with record.case("whole answer, bfloat16, batch 1") as figures, converging(ids, SHARE):
        for decoding in WAYS:
            chosen = options | {"spatial_decoding": decoding, "return_dict_in_generate": True}
            run = lambda chosen=chosen: model.generate(**inputs, **chosen)  # noqa: E731
            figures[f"{decoding}_seconds"] = seconds_of(setup, run, warm=1)  # matrices of every new length load code
        pixels, state = inputs["mask_pixel_values"], torch.randn(MASKS, config.text_config.hidden_size).to(setup.device)
        with torch.no_grad():
            figures["sam2_seconds"] = seconds_of(
                setup, lambda: model.predict_masks(state, pixels, [0] * MASKS), repeats=3, warm=1
            )
        figures["sam2_share"] = figures["sam2_seconds"] / figures["parallel_seconds"]
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        figures["peers_seconds"] = seconds_of(setup, lambda: peers(model, inputs, ids, new), warm=1)
        figures["peers_over_parallel"] = figures["peers_seconds"] / figures["parallel_seconds"]
    with converging(ids, SHARE):
        waiting(setup, record, model, inputs, options, "1b", WAYS[1:])
    with record.case("1b, profile of 8 words") as figures:  # of 66 passes the profiler's own work took 40 seconds
        few = {"spatial": "none", "do_sample": False, "max_new_tokens": 8}
        with counted_passes() as passes:
            figures |= profiled(setup, lambda: model.generate(**inputs, **few))
        figures["passes"] = passes[-1]


@part(seconds=3)
def grammar(setup, record):
    """A step of the grammar over a vocabulary of real size: as state on the device, and read off the ids."""
    words_in_all, codes = setup.size(WORDS, 800), setup.size(128, 16)
    first = words_in_all - codes - 3
    words = SpatialVocabulary(
        first,
        first + 1,
        words_in_all - 1,
        tuple(range(first + 2, words_in_all - 1)),
        num_depth_tokens=setup.size(100, 16),
        image=0,
    )
    for rows in setup.size((1, 8, 32), (2,)):
        pictures = torch.ones(rows, dtype=torch.long, device=setup.device)
        state = GrammarState(words, "auto", pictures, torch.zeros(rows, dtype=torch.bool, device=setup.device))
        limits = {"prompt_length": 0, "max_length": 400, "num_pictures": pictures, "open_codes": pictures - 2}
        reference, loop = (kind(words, spatial="auto", **limits) for kind in (SpanGrammar, LoopGrammar))
        scores, room = torch.randn(rows, words_in_all, device=setup.device), torch.full_like(pictures, 200)
        ids = torch.randint(1, first, (rows, 100), device=setup.device)
        sides = {
            "state_ms": lambda state=state, scores=scores, room=room: state.restrict(scores, room, only=False),
            "state_forced_ms": lambda state=state, scores=scores, room=room: state.restrict(scores, room, only=True),
            "in_loops_of_transformers_ms": lambda loop=loop, ids=ids, scores=scores: loop(ids, scores),
            "reference_ms": lambda reference=reference, ids=ids, scores=scores: reference(ids, scores),
        }
        with record.case(f"{rows} rows x {words_in_all}") as figures:
            for name, run in sides.items():
                figures[name] = device_ms(setup, run)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
