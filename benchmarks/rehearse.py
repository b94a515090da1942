"""The whole way of docs/train_a_real_one.md on stand-ins: small, random, in the layouts of the real ones.

    make rehearse                                 into runs/rehearsal, some minutes on two cores
    python benchmarks/rehearse.py --out FOLDER --scenes 200

label -> codebook -> label -> build -> train (two processes) -> eval -> replace-depth -> report -> push --dry-run.
InternVL, SAM2 and Depth Anything are small random models, saved as their own projects save them; pictures, annotations
and expressions are those of rendered scenes, in the files of COCO, RefCOCO, LLaVA and HardBLINK. What is learnt in so
few steps is worth nothing: what is rehearsed is every command, its files, and that they fit one another.

A step that is done is not done again; one that was stopped goes on, as the commands themselves do.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

HELD_OUT = 8  # scenes that nothing is trained on
CODEC = {"image_size": 64, "downsample": 16, "num_codes": 32, "code_dim": 16, "base_channels": 8}


def stand_ins(folder: Path, scenes: int) -> None:
    """Weights and data as a user would have them, in `folder`."""
    from component_helpers import mask_model, save_internvl, save_teacher
    from data.published.test_sources import write_instances
    from evaluation.published_formats import scenes_of, write_hardblink, write_refcoco

    from perceptio_hf.world import ask

    shutil.rmtree(folder, ignore_errors=True)  # what a stopped run left, half of it
    shown = scenes_of(range(scenes))
    train, held_out = shown[:-HELD_OUT], shown[-HELD_OUT:]
    save_internvl(folder / "internvl")
    mask_model().save_pretrained(folder / "sam2")
    save_teacher(folder / "teacher")
    write_refcoco(folder / "refcoco", train)
    write_refcoco(folder / "refcoco_val", held_out)
    write_instances(folder / "coco", train)
    write_hardblink(folder / "hardblink", held_out)
    (folder / "photos").mkdir()
    for scene in shown:
        Image.fromarray(scene.image).save(folder / "photos" / f"{scene.seed:06d}.png")
    (folder / "llava" / "images").mkdir(parents=True)
    talks = []
    for scene in train:
        name = f"{scene.seed:06d}.jpg"
        Image.fromarray(scene.image).save(folder / "llava" / "images" / name)
        questions = [question for question in ask(scene, np.random.default_rng(scene.seed)) if not question.points]
        turns = [(who, text) for item in questions[:3] for who, text in (("human", item.text), ("gpt", item.answer))]
        turns[0] = ("human", "<image>\n" + turns[0][1])
        conversations = [{"from": who, "value": text} for who, text in turns]
        talks.append({"id": name, "image": name, "conversations": conversations})
    (folder / "llava" / "llava_v1_5_mix665k.json").write_text(json.dumps(talks))
    recipe = {
        "model_name_or_path": str(folder.parent / "start"),
        "data_folder": str(folder),
        "tasks": [
            {"refcoco": "refcoco", "weight": 3},
            {"coco_instances": "coco", "weight": 2},
            {"labels": "../labels", "name": "depth", "weight": 2},
            {"labels": "../labels", "part": "questions", "name": "spatial", "weight": 3},
            {"llava": "llava/llava_v1_5_mix665k.json", "images": "llava/images", "name": "words"},
        ],
        "max_steps": 24,
        "per_device_train_batch_size": 2,
        "learning_rate": 2.0e-3,
        "seg_projector_start": 32,
        "mask_learning_rate": 4.0e-3,
        "gradient_checkpointing": False,
        "freeze_projector": False,
        "use_cpu": True,
        "save_steps": 12,
        "logging_steps": 4,
        "report_to": "none",
        "seed": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    codec = {"codec": CODEC, "steps": 400, "options": {"batch_size": 8, "learning_rate": 3.0e-3}}
    (folder / "codebook.yaml").write_text(yaml.safe_dump(codec, sort_keys=False))


class Rehearsal:
    """Steps in `out`, each once; what each took is in `out`/rehearsal.json."""

    def __init__(self, out: Path):
        self.out, self.journal = out, out / "rehearsal.json"
        self.seconds = json.loads(self.journal.read_text()) if self.journal.exists() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step and note that it is done."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)
        fresh = self.journal.with_suffix(".fresh")
        fresh.write_text(json.dumps(self.seconds, indent=1) + "\n")
        fresh.replace(self.journal)

    def make(self, name: str, work: Callable[[], None]) -> None:
        """Do a step that is no command."""
        if name not in self.seconds:
            with self.step(name):
                work()

    def run(self, name: str, *arguments: str, launch: tuple[str, ...] = ()) -> None:
        """Run a command of ours, and stop with its exit code where it fails."""
        if name in self.seconds:
            print(f"{name}: done before, {self.seconds[name]} s", flush=True)
            return
        print(f"\n{name}: perceptio {' '.join(arguments)}", flush=True)
        with self.step(name):
            done = subprocess.run([sys.executable, "-m", *launch, "perceptio_hf", *arguments], env=environment())
            if done.returncode:
                sys.exit(f"{name} failed with exit code {done.returncode}; what came before is kept in {self.out}.")


def check_processes(run: Path, wanted: int) -> None:
    """Stop unless the training's checkpoints were written by so many processes."""
    from perceptio_hf.training.checkpoints import processes_of

    found = {checkpoint.name: processes_of(checkpoint) for checkpoint in run.glob("checkpoint-*")}
    if not found or set(found.values()) != {wanted}:
        sys.exit(f"The training was to be one of {wanted} processes, but its checkpoints say: {found}")


def environment() -> dict[str, str]:
    """One thread for each process: with two on two cores they would wait for one another."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--scenes", type=int, default=160)
    options = parser.parse_args()
    out, data = options.out.resolve(), options.out.resolve() / "data"
    out.mkdir(parents=True, exist_ok=True)
    way = Rehearsal(out)
    way.make("stand-ins", lambda: stand_ins(data, options.scenes))
    teacher = ("--teacher", str(data / "teacher"))
    photos = str(data / "photos")
    # The codec's own maps: the teacher's, whose codes by another codec are thrown away.
    way.run("maps", "label", photos, *teacher, "--depth-codec", "tiny", "--maps", "--out", str(out / "maps"))
    codebook = ("--data", str(out / "maps"), "--out", str(out / "codec"))
    way.run("codebook", "codebook", "train", "--config", str(data / "codebook.yaml"), *codebook)
    way.run("codebook eval", "codebook", "eval", str(out / "codec"), "--data", str(out / "maps"))
    asked = ("--questions", "closest,order", "--out", str(out / "labels"))
    way.run("label", "label", photos, *teacher, "--depth-codec", str(out / "codec"), *asked)
    parts = ("--mask-decoder", str(data / "sam2"), "--depth-codec", str(out / "codec"))
    way.run("build", "build", "--internvl", str(data / "internvl"), *parts, "--out", str(out / "start"))
    recipe = ("--config", str(data / "recipe.yaml"))
    way.run("dry run", "train", *recipe, "--dry-run", "--measure", "2")
    # not by `accelerate launch --cpu`, which starts one process whatever --num_processes is (accelerate 1.15)
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    way.run("train", "train", *recipe, "--out", str(out / "run"), launch=two)
    check_processes(out / "run", 2)
    model = ("--model", str(out / "run" / "checkpoint"), "--max-new-tokens", "48")
    scores = [str(out / "eval" / name) for name in ("refcoco", "hardblink")]
    way.run("eval", "eval", "refcoco", "--data", str(data / "refcoco_val"), "--limit", "12", *model, "--out", scores[0])
    blinks = ("--data", str(data / "hardblink"), "--limit", "12", "--replace-depth", "all")
    way.run("replace depth", "eval", "hardblink", *blinks, *model, "--out", scores[1])
    way.run("report", "report", *scores, "--out", str(out / "table"))
    pushed = ("some-one/perceptio-rehearsed", "--dry-run", str(out / "pushed"))
    way.run("push", "push", str(out / "run" / "checkpoint"), *pushed)
    print("\n" + "\n".join(f"{seconds:7.1f} s  {name}" for name, seconds in way.seconds.items()))
    print(f"{sum(way.seconds.values()):7.1f} s  in all; the pushed folder would be {out / 'pushed'}")


if __name__ == "__main__":
    main()
