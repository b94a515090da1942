"""Writes small data sets in the forms in which the benchmarks are published, out of rendered scenes."""

import base64
import io
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from perceptio_hf.world import Scene, draw_points, render_scene

SIZE = 64
CHOICES = ("red", "green", "blue", "white")


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def outline(mask: np.ndarray) -> list[float]:
    """A polygon [x0, y0, x1, y1, ...] around a mask: down its left side, up its right side."""
    rows = np.flatnonzero(mask.any(1))
    left = [(int(np.flatnonzero(mask[y])[0]), int(y)) for y in rows]
    right = [(int(np.flatnonzero(mask[y])[-1]) + 1, int(y)) for y in rows]
    corners = [(x, y + step) for x, y in left for step in (0, 1)]
    corners += [(x, y + step) for x, y in reversed(right) for step in (1, 0)]
    return [float(number) for corner in corners for number in corner]


def column_runs(mask: np.ndarray) -> dict:
    """COCO run lengths as numbers, counted one pixel after the other."""
    runs, inside = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != inside:
            runs.append(0)
            inside = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def corner_and_size(box: Sequence[int]) -> list[float]:
    """(x0, y0, x1, y1) -> COCO's [x, y, width, height]."""
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]


def scenes_of(seeds: Iterable[int]) -> list[Scene]:
    """Scenes with three objects at least, none of them tiny."""
    scenes = (render_scene(seed, SIZE) for seed in seeds)
    return [scene for scene in scenes if sum(thing.pixels >= 12 for thing in scene.objects) >= 3]


def file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def coco_instances(scenes: Sequence[Scene]) -> dict:
    """instances.json: objects as polygons and, every third one, as run lengths; ids are 100 * picture + object."""
    images, annotations = [], []
    for number, scene in enumerate(scenes, 1):
        images.append({"id": number, "file_name": file_name(number), "height": scene.size, "width": scene.size})
        for instance, thing in enumerate(scene.objects, 1):
            if thing.pixels >= 12:
                mask = scene.mask(instance)
                annotations.append(
                    {
                        "id": 100 * number + instance,
                        "image_id": number,
                        "category_id": 1,
                        "iscrowd": 0,
                        "bbox": corner_and_size(thing.box),
                        "segmentation": column_runs(mask) if instance % 3 == 0 else [outline(mask)],
                    }
                )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def write_coco(folder: Path, scenes: Sequence[Scene], pictures: str = "train2014") -> dict:
    """instances.json and the pictures; returns the former."""
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, 1):
        Image.fromarray(scene.image).save(folder / pictures / file_name(number), quality=95)
    document = coco_instances(scenes)
    (folder / "instances.json").write_text(json.dumps(document))
    return document


def refcoco_records(document: dict, splits: Sequence[str] = ("val", "testA", "testB", "train")) -> list[dict]:
    """Two sentences about each annotation; the splits take turns."""
    return [
        {
            "ref_id": number,
            "ann_id": item["id"],
            "image_id": item["image_id"],
            "category_id": 1,
            "file_name": f"{file_name(item['image_id'])[:-4]}_{number}.jpg",
            "split": splits[number % len(splits)],
            "sent_ids": [2 * number, 2 * number + 1],
            "sentences": [_sentence(2 * number + k, f"thing {item['id']}{' again' * k}") for k in (0, 1)],
        }
        for number, item in enumerate(document["annotations"])
    ]


def write_refcoco(folder: Path, scenes: Sequence[Scene], *, by: str = "unc", protocol: int = 2) -> list[dict]:
    """refs(BY).p, instances.json and train2014/; returns the records."""
    records = refcoco_records(write_coco(folder, scenes))
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(records, protocol=protocol))
    return records


def write_grefcoco(folder: Path, scenes: Sequence[Scene], split: str = "val") -> list[dict]:
    """grefs(unc).json: about each picture one expression for an object, one for two, and one for none."""
    document = write_coco(folder, scenes)
    records = []
    for image in document["images"]:
        known = [item["id"] for item in document["annotations"] if item["image_id"] == image["id"]]
        for wanted in (known[:1], known[:2], [-1]):
            number = len(records)
            records.append(
                {
                    "ref_id": number,
                    "ann_id": wanted,
                    "image_id": image["id"],
                    "category_id": [1 if item > 0 else -1 for item in wanted],
                    "file_name": image["file_name"],
                    "split": split,
                    "no_target": wanted == [-1],
                    "sentences": [_sentence(number, f"things {wanted}")],
                }
            )
    (folder / "grefs(unc).json").write_text(json.dumps(records))
    return records


def _sentence(number: int, text: str) -> dict:
    return {"sent_id": number, "sent": text, "raw": text.upper(), "tokens": text.split()}


def write_hub_refcoco(folder: Path, scenes: Sequence[Scene], split: str = "val", shards: int = 2) -> list[dict]:
    """.parquet files as lmms-lab's; returns the rows."""
    rows = []
    for number, scene in enumerate(scenes, 1):
        data = png(scene.image)
        for instance, thing in enumerate(scene.objects, 1):
            if thing.pixels >= 12:
                rows.append(
                    {
                        "question_id": str(100 * number + instance),
                        "image": {"bytes": data, "path": file_name(number)},
                        "question": "Please describe the region.",
                        "answer": [f"thing {instance}", f"the {thing.color} one"],
                        "segmentation": outline(scene.mask(instance)),
                        "bbox": corner_and_size(thing.box),
                        "iscrowd": 0,
                        "file_name": file_name(number),
                    }
                )
    write_parquet(folder / "data", rows, split, shards)
    return rows


def write_parquet(folder: Path, rows: Sequence[dict], split: str, shards: int = 1) -> None:
    """SPLIT-00000-of-0000N.parquet, three rows in a group."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    each = -(-len(rows) // shards)
    for shard in range(shards):
        table = pyarrow.Table.from_pylist(list(rows[shard * each : (shard + 1) * each]))
        parquet.write_table(table, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=3)


def write_blink_depth(folder: Path, scenes: Sequence[Scene], split: str = "val") -> list[dict]:
    """Relative_Depth/SPLIT-*.parquet; returns the rows."""
    rows = []
    for number, scene in enumerate(scenes, 1):
        points, answer = marked_points(scene, 2)
        question = "Which point is closer to the camera?"
        rows.append(
            {
                "idx": f"{split}_Relative_Depth_{number}",
                "question": question,
                "sub_task": "Relative_Depth",
                "image_1": {"bytes": png(draw_points(scene.image, points, "AB")), "path": None},
                "choices": ["A is closer", "B is closer"],
                "answer": f"({answer})",
                "prompt": f"{question}\nSelect from the following choices.\n(A) A is closer\n(B) B is closer",
            }
        )
    write_parquet(folder / "Relative_Depth", rows, split)
    return rows


def marked_points(scene: Scene, count: int) -> tuple[list[tuple[int, int]], str]:
    """Points (x, y) off the border with different depths, and the letter of the nearest."""
    rng = np.random.default_rng(scene.seed)
    points = [(int(x), int(y)) for x, y in rng.integers(12, scene.size - 12, (count, 2))]
    depths = [scene.depth[y, x] for x, y in points]
    return points, "ABCDE"[int(np.argmin(depths))]


def write_hardblink(folder: Path, scenes: Sequence[Scene], numbers: Sequence[int] = (3, 5)) -> dict[str, str]:
    """questions/, answers/ and images/ for each number of points; returns the answers by sample."""
    answers = {}
    for count in numbers:
        name = f"blink{count}pointscenter"
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = {"questions": [], "answers": []}
        for number, scene in enumerate(scenes):
            points, answer = marked_points(scene, count)
            picture = draw_points(scene.image, points, "ABCDE"[:count])
            (folder / "images" / name / f"{number}.png").write_bytes(png(picture))
            answers[f"{name}/{number}"] = answer
            row = {"question_id": number, "image": f"{number}.png", "text": "Which point is the closest to the camera?"}
            lines["questions"].append(json.dumps(row))
            lines["answers"].append(json.dumps({"question_id": number, "text": f"({answer})"}))
        for kind, rows in lines.items():
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"blink_{count}pointscenter_{kind}.jsonl").write_text("\n".join(rows) + "\n")
    return answers


def mmbench_rows(scenes: Sequence[Scene]) -> list[dict[str, str]]:
    """Questions with four choices and all their rotations, which take their picture from the first row."""
    rows = []
    for number, scene in enumerate(scenes, 1):
        right = CHOICES[scene.seed % 4]
        for turn in range(4):
            texts = CHOICES[turn:] + CHOICES[:turn]
            rows.append(
                {
                    "index": str(number + 1_000_000 * turn),
                    "question": "What color is it?",
                    "hint": "Look at the\nlargest thing." if number % 2 else "",
                    **dict(zip("ABCD", texts, strict=True)),
                    "answer": "ABCD"[texts.index(right)],
                    "category": f"ability {number % 3}",
                    "image": str(number) if turn else base64.b64encode(png(scene.image)).decode(),
                    "l2-category": f"class {number % 2}",
                    "split": "dev",
                }
            )
    return rows


def write_tsv(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """A table as pandas writes it: tab-separated, quoted where needed."""
    import csv

    with open(file, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_depth_pairs(folder: Path, scenes: Sequence[Scene]) -> None:
    """NAME.color.jpg and NAME.depth.png in millimetres."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / f"frame-{number:03d}.color.jpg")
        Image.fromarray((scene.depth * 1000).round().astype(np.uint16)).save(folder / f"frame-{number:03d}.depth.png")
