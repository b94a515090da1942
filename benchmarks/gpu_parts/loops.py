"""The same generation by other means: static caches, compiled graphs, attention kernels, parts on the host."""

import tempfile
from contextlib import nullcontext

import torch
from speed import SHARE, converging, counted_passes, prompts, tiny
from transformers import AutoModel, CompileConfig

import perceptio_hf

from .tools import part, perceptio_config, question, random_model, release, seconds_of

GRAPHS = [(decoding, way) for decoding in ("parallel", "sequential") for way in ("dynamic", "static, CUDA graphs")]
DYNAMIC = {"cache_implementation": "dynamic"}
STATIC = {"cache_implementation": "static"}


def _compiled(setup, mode: str) -> dict:
    """Settings of `generate` for a static cache and a compiled forward; a quick run compiles to Python."""
    backend = {"backend": "eager", "mode": None} if setup.quick else {"mode": mode}
    config = CompileConfig(fullgraph=True, **backend)
    config._compile_all_devices = True
    return STATIC | {"compile_config": config}


def _ways(setup) -> dict[str, dict]:
    """The most telling first. On a GPU transformers compiles a static cache by itself, with CUDA graphs."""
    return {
        "dynamic": DYNAMIC,
        "static, CUDA graphs": _compiled(setup, "reduce-overhead"),
        "static, not compiled": STATIC | {"disable_compile": True},
        "static, inductor alone": _compiled(setup, "default"),
    }


def measure_ways(setup, record, model, inputs, plan: list[tuple[str, str]], *, trained: bool = False) -> None:
    """plan: (decoding, way) -> first and later calls, graphs made, whether the ids are those of the dynamic cache.

    The spans of a model that is not `trained` are made to converge as those of trained ones do, see `converging`.
    """
    ways, dtype = _ways(setup), inputs["pixel_values"].dtype
    length = model.spatial_vocabulary().span_length + setup.size(30, 2)
    options = {"spatial": "depth", "do_sample": False, "max_new_tokens": length}
    first = model.generate(**inputs, **options, spatial_decoding="sequential")
    with nullcontext() if trained else converging(first, SHARE):
        expected = {
            decoding: model.generate(**inputs, **options, spatial_decoding=decoding, **DYNAMIC)
            for decoding in dict(plan)
        }
        for decoding, way in plan:
            with record.case(f"{str(dtype).removeprefix('torch.')}, {decoding}, {way}") as figures:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                chosen, ids = options | ways[way] | {"spatial_decoding": decoding}, []
                run = lambda chosen=chosen, ids=ids: ids.append(model.generate(**inputs, **chosen))  # noqa: E731
                with counted_passes() as passes:
                    figures["first_seconds"] = seconds_of(setup, run)
                    figures["second_seconds"] = seconds_of(setup, run)
                    before = _graphs()
                    figures["seconds"] = seconds_of(setup, run, repeats=setup.size(3, 1))
                figures |= {"passes": passes[-1], "passes_per_second": passes[-1] / figures["seconds"]}
                figures |= {"graphs": _graphs(), "graphs_after_the_second_call": _graphs() - before}
                figures["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
                new = ids[-1].shape[1] - inputs["input_ids"].shape[1]
                figures["tokens_per_second"] = new / figures["seconds"]
                figures["same_ids"] = torch.equal(ids[-1], expected[decoding])


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


@part(seconds=85)
def compiled(setup, record):
    """Eight of the 1B shape's layers, whose compilation takes a third; launching a kernel costs what it costs there.

    float32 shows exactness, bfloat16 speed.
    """
    config = perceptio_config(setup, layers=8, side=512)
    ways = list(_ways(setup))
    plans = {
        torch.bfloat16: [(decoding, way) for way in ways[:2] for decoding in ("parallel", "sequential")],
        torch.float32: [("parallel", "static, CUDA graphs"), *(("parallel", way) for way in ways[2:])],
    }
    for dtype, plan in plans.items():
        model = random_model(setup, config, dtype)
        chosen = plan[setup.size(slice(None), slice(2, 3))]
        measure_ways(setup, record, model, question(setup, config, 1, dtype), chosen)
        del model
        release()
        if setup.quick:
            break


@part(seconds=30)
def compiled_tiny(setup, record):
    """The embedded checkpoint, one question: its layers compile in seconds, and it takes nothing but launches."""
    model, processor = tiny(setup.device)
    inputs = prompts(processor, 0, 1, setup.device)
    measure_ways(setup, record, model, inputs, GRAPHS[: setup.size(4, 2)], trained=True)


@part(seconds=55)
def compiled_1b(setup, record):
    """All layers of the 1B shape, spans in parallel, with CUDA graphs."""
    config = perceptio_config(setup, side=512)
    model = random_model(setup, config, torch.bfloat16)
    measure_ways(setup, record, model, question(setup, config, 1, torch.bfloat16), GRAPHS[: setup.size(2, 1)])


@part(seconds=20)
def attention(setup, record):
    """Attention kernels of vision tower and language model, as far as they are installed: prompts, spans, ids."""
    config = perceptio_config(setup, layers=8, side=512)
    model = random_model(setup, config, torch.bfloat16)
    inputs = question(setup, config, setup.size(8, 2), torch.bfloat16)
    options = {"spatial": "depth", "do_sample": False, "max_new_tokens": model.spatial_vocabulary().span_length}
    expected, ids = None, {}
    for name in ("sdpa", "eager", "flash_attention_2", "flash_attention_3", *setup.size(("flex_attention",), ())):
        with record.case(name) as figures:
            try:
                model.set_attn_implementation(name)
            except (ImportError, ValueError) as error:
                figures["absent"] = str(error)[:300]
                continue
            with torch.no_grad():
                forward = lambda: model(**inputs, logits_to_keep=1).logits  # noqa: E731
                figures["prompt_ms"] = 1000 * seconds_of(setup, forward, repeats=3, warm=1)
                logits = forward().float()
            expected = logits if expected is None else expected
            figures["largest_difference_from_sdpa"] = float((logits - expected).abs().max())
            if name == "flex_attention":  # compiles for every width of a pass
                continue
            run = lambda name=name: ids.update({name: model.generate(**inputs, **options)})  # noqa: E731
            with counted_passes() as passes:
                figures["span_seconds"] = seconds_of(setup, run, warm=1)
            figures["passes"] = passes[-1]
            figures["ids_as_with_sdpa"] = float((ids[name] == ids["sdpa"]).float().mean())


@part(seconds=12)
def device_map(setup, record):
    """The embedded checkpoint with parts on the host, on disk, or as transformers divides it, beside the whole one."""
    model, processor = tiny(setup.device)
    inputs = prompts(processor, 0, setup.size(4, 1), setup.device)
    limit = 40 + model.spatial_vocabulary().span_length
    options = {"spatial": "seg+depth", "do_sample": False, "return_dict_in_generate": True, "max_new_tokens": limit}
    whole = model.generate(**inputs, **options)
    here = 0 if setup.is_cuda else "cpu"
    everything = dict.fromkeys(("model", "lm_head", "seg_projector", "mask_model", "depth_model"), here)
    inside = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.language_model"), here)
    apart = {key: value for key, value in everything.items() if key != "model"} | inside
    half = sum(parameter.nbytes for parameter in model.parameters()) // 2
    places = {
        "all here": everything,
        "masks and depth on the host": everything | {"mask_model": "cpu", "seg_projector": "cpu", "depth_model": "cpu"},
        "language model on the host": apart | {"model.language_model": "cpu", "lm_head": "cpu"},
        "masks on disk": everything | {"mask_model": "disk"},
        "auto, half of it here": "auto",
    }
    for name, where in list(places.items())[setup.size(slice(None), slice(3, None))]:
        with record.case(name) as figures, tempfile.TemporaryDirectory() as folder:
            more = {}
            if where == "auto":
                more["max_memory"] = ({0: half} if setup.is_cuda else {}) | {"cpu": 8 * half}
            placed = AutoModel.from_pretrained(
                perceptio_hf.tiny_checkpoint(), device_map=where, offload_folder=folder, **more
            ).eval()
            found = []
            run = lambda placed=placed, found=found: found.append(placed.generate(**inputs, **options))  # noqa: E731
            figures["seconds"] = seconds_of(setup, run, warm=1)
            figures["places"] = sorted({str(parameter.device) for parameter in placed.parameters()})
            out = found[-1]
            figures["same_ids"] = torch.equal(out.sequences.cpu(), whole.sequences.cpu())
            pairs = zip(_maps(out), _maps(whole), strict=True)
            figures["largest_difference_of_masks_and_depth"] = max(
                float((one.float().cpu() - other.float().cpu()).abs().max()) for one, other in pairs if one.numel()
            )


def _maps(out) -> list[torch.Tensor]:
    return [*out.mask_logits, *(depth for of_row in out.depth_maps for depth in of_row)]
