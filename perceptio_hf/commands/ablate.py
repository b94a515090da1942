"""`perceptio ablate`: what each part of the training contributes."""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import check_device, or_tiny, quieten


def ablate(
    start: Annotated[
        Path,
        typer.Option(
            help="Checkpoint to begin with: `start` in the folder of `perceptio train --config recipes/tiny.yaml`.",
            show_default=False,
        ),
    ],
    sight: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint whose vision tower and SAM2 take the place of the start's; `tiny` is the "
            "embedded one.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path, typer.Option(help="The recipe: a YAML file, or the name of one of the package.")] = Path(
        "ablation"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the scores of each run; a stopped ablation goes on.")] = Path(
        "runs/ablation"
    ),
    results: Annotated[
        Path | None, typer.Option(help="Folder for table, numbers and plot; default: OUT.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    variants: Annotated[str, typer.Option(help="Names with commas between, or `all`.", show_default=True)] = "all",
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    device: Annotated[
        str, typer.Option(help="`cuda`: all runs on one GPU, which a dozen of models this small can share.")
    ] = "cpu",
) -> None:
    """Train variants of the objectives from one base, evaluate them, and write one table with mean and spread."""
    if not (start / "config.json").is_file():
        raise ValueError(
            f"{start} holds no checkpoint; `perceptio train --config recipes/tiny.yaml` leaves one in runs/tiny/start."
        )
    if sight not in (None, "tiny") and not (Path(sight) / "config.json").is_file():
        raise ValueError(
            f"--sight {sight} holds no checkpoint; name the folder of one, or `tiny` for the embedded one."
        )
    from perceptio_hf.files import find_recipe, in_use
    from perceptio_hf.lab.ablation.report import write_report
    from perceptio_hf.lab.ablation.variants import VARIANTS, AblationRecipe, summarise, train_base

    names = list(VARIANTS) if variants == "all" else list(dict.fromkeys(map(str.strip, variants.split(","))))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"Unknown variants {', '.join(unknown)}; use {', '.join(VARIANTS)}.")
    recipe = AblationRecipe.read(find_recipe(config))
    check_device(device)
    with in_use(out, "perceptio ablate"):
        base = train_base(recipe, start, out, sight=or_tiny(sight), device=device)
        scores: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
        runs = [(name, seed) for seed, name in itertools.product(range(seeds), names)]
        for (name, seed), figures in _run_all(runs, recipe, base, out, processes, device):
            scores[name][seed] = figures
            done = {variant: [found[key] for key in sorted(found)] for variant, found in scores.items() if found}
            command = f"perceptio ablate --start {start}" + (f" --sight {sight}" if sight else "")
            command += f" --config {config} --seeds {seeds} --variants {variants}"
            command += f" --device {device} --processes {processes}" if device != "cpu" else ""
            write_report(summarise(done), results or out, command=command)
    print(f"The table is {(results or out) / 'ablation.md'}")


def _run_all(runs: list[tuple[str, int]], recipe, base: Path, out: Path, processes: int, device: str):
    """((variant, seed), scores) of every run as they finish."""
    from tqdm.auto import tqdm

    from perceptio_hf.lab.ablation.variants import run_variant

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes started here
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=quieten) as pool,
        tqdm(total=len(runs), desc="runs") as bar,
    ):
        waiting = {}
        for index, run in enumerate(runs):
            where = {"device": device, "position": 1 + index % processes}
            waiting[pool.submit(run_variant, *run, recipe, base, out, **where)] = run
        try:
            for finished in as_completed(waiting):
                bar.update()
                yield waiting[finished], finished.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error: those that run keep their scores
