"""`perceptio eval`: a checkpoint measured on a benchmark."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .checkpoints import Model
from .predict import Address, EngineName, Spatial, Workers, check_out

if TYPE_CHECKING:
    from perceptio_hf.evaluation.benchmarks import Benchmark
    from perceptio_hf.evaluation.run.runner import Run

CARD_SUFFIXES = (".yaml", ".yml")
CASES = 4  # of each group on the sheet


def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="refcoco, hardblink, mmbench, world-closest, ...; a wrong name lists all.", show_default=False
        ),
    ],
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where the benchmark's files are; not for rendered scenes (world-...).", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which part. Default: the benchmark's usual one.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many samples, the first ones.", show_default=False)
    ] = None,
    spatial: Annotated[
        Spatial | None,
        typer.Option(help="Which spatial tokens to force. Default: the benchmark's.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that go through the model together.")] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in tokens. Default: the model's own.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results, or CARD.yaml: scores for a model card, results in the folder CARD beside it. "
            "Default: perceptio-eval/BENCHMARK.",
            show_default=False,
        ),
    ] = None,
    replace_depth: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Answer again with other codes in the depth span: identity, oracle, random, random-matched, "
            "other-image, first-repeat, constant, with commas between, or all that can be had.",
            show_default=False,
        ),
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="True depth for the replacement oracle: a folder of depth maps named as the pictures, or a depth "
            "estimation model. Default: the benchmark's own.",
            show_default=False,
        ),
    ] = None,
    oracle_unit: Annotated[
        str | None,
        typer.Option(
            help="Of that folder, or of a model that does not say it: mm, m, m/256, disparity or relative.",
            show_default=False,
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="For `depth`: what the maps hold; mm, m, m/256, disparity or relative.", show_default=False),
    ] = None,
    max_depth: Annotated[
        float | None,
        typer.Option(help="For `depth`: metres beyond which readings do not count, e.g. 80.", show_default=False),
    ] = None,
    pictures: Annotated[
        str | None, typer.Option(help="For `depth`: pattern of pictures, e.g. *.color.jpg.", show_default=False)
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="For `depth`: pattern of depth maps, e.g. *.depth.png.", show_default=False)
    ] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do with samples that cannot be used.")
    ] = "raise",
    seed: Annotated[int, typer.Option(help="Of codes that are drawn.")] = 0,
    engine: Annotated[EngineName, typer.Option(help="What answers: this process, or workers of Ray.")] = "local",
    address: Address = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another model, data or setting.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")] = False,
) -> None:
    """Measure a checkpoint on BENCHMARK.

    The results folder gets summary.json, samples.jsonl (one line for each sample) and cases.png (best, worst and random
    cases to look at). A run that was stopped goes on where it was; results of another model or data are never mixed in.
    """
    folder, card = _places(out, benchmark)
    check_out(folder)

    from perceptio_hf.bulk.engines import LocalEngine, open_engine
    from perceptio_hf.bulk.progress import progress
    from perceptio_hf.evaluation.benchmarks import open_benchmark
    from perceptio_hf.evaluation.report.hub_results import check_card, write_card
    from perceptio_hf.evaluation.run.runner import SUMMARY_FILE, RunSettings, run_benchmark
    from perceptio_hf.evaluation.run.summary import ModelFacts, build_summary
    from perceptio_hf.files import in_use, write_json

    from . import checkpoints

    name = checkpoints.resolve(model)
    shown_name = "tiny" if checkpoints.is_tiny(name) else name
    replacements = _replacements(replace_depth)
    if card is not None:
        check_card(card, shown_name, overwrite=overwrite)
    reopen = partial(
        open_benchmark,
        benchmark,
        None if data is None else data.absolute(),
        split=split,
        limit=limit,
        on_error=on_error,
        unit=unit,
        pictures=pictures,
        depths=depths,
        max_depth=max_depth,
    )
    works, opened = open_engine(engine, address, workers), reopen()
    settings = RunSettings(
        spatial=spatial or opened.spatial,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        skip_broken=on_error == "skip",
        replacements=replacements,
        as_possible=replace_depth == "all",
        oracle=oracle,
        oracle_unit=oracle_unit,
        seed=seed,
    )
    with in_use(folder, f"perceptio eval {benchmark}"):
        elsewhere: dict[str, Any] = {}
        if not isinstance(works, LocalEngine):
            place = os.path.abspath(name) if os.path.isdir(name) else name
            elsewhere = {"load": partial(checkpoints.load, place), "reopen": reopen}
        loaded = checkpoints.load(name, "cpu" if elsewhere else None)  # there it only says whose the weights are
        facts = ModelFacts.of(loaded[0], shown_name)
        if card is not None:
            check_card(card, shown_name, facts.weights_sha256, overwrite=overwrite)
        with progress("samples") as watch:
            run = run_benchmark(
                *loaded,
                opened,
                folder,
                settings,
                weights=facts.weights_sha256,
                overwrite=overwrite,
                watch=watch,
                engine=works,
                **elsewhere,
            )
        summary = build_summary(
            opened, facts, run, path=None if data is None else str(data), limit=limit, max_depth=max_depth
        )
        _write_cases(folder / "cases.png", opened, run, loaded[0])
        write_json(folder / SUMMARY_FILE, summary)
        if card is not None:
            write_card(card, summary, overwrite=overwrite)
    _report(summary, folder, card, checkpoints.TINY_NOTE if shown_name == "tiny" else None, as_json)


def _places(out: Path | None, benchmark: str) -> tuple[Path, Path | None]:
    """Folder of the results, and the card's file if there is one."""
    if out is None:
        return Path("perceptio-eval") / benchmark, None
    if out.suffix.lower() in CARD_SUFFIXES:
        return out.with_suffix("") / benchmark, out
    return out, None


def _replacements(words: str | None) -> tuple[str, ...]:
    from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS, check_replacements

    if words is None:
        return ()
    names = list(REPLACEMENTS) if words == "all" else [word.strip() for word in words.split(",")]
    return check_replacements(names)


def _write_cases(path: Path, benchmark: "Benchmark", run: "Run", model) -> None:
    from perceptio_hf.evaluation.report.case_sheet import choose_cases, draw_cases
    from perceptio_hf.files import write_picture

    cases = choose_cases(run.records, CASES)
    samples = {sample.id: sample for sample in benchmark.samples}
    write_picture(path, draw_cases(benchmark.task, cases, samples, model.depth_model))


def _report(summary: dict[str, Any], folder: Path, card: Path | None, note: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    from perceptio_hf.evaluation.report.text import run_text

    print(run_text(summary))
    print(f"\nWritten to {folder}: summary.json, samples.jsonl, cases.png" + (f"; card: {card}" if card else ""))
    if note and not summary["benchmark"].startswith("world-"):
        print(note)
