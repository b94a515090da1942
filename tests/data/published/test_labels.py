"""Depth labels as a source, on folders in the form that docs/label.md describes."""

import json
import pickle
import shutil

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from evaluation.published_formats import png, scenes_of
from PIL import Image as Pictures

from perceptio_hf import DepthVQVAE
from perceptio_hf.data.published.labels import check_codec, read_label_metadata
from perceptio_hf.data.rows import sample_features, to_row
from perceptio_hf.data.samples import load_sample
from perceptio_hf.data.tasks import load_tasks
from perceptio_hf.labelling.shards import write_dataset

N, K = 64, 128


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(3))


def write_labels(folder, scenes, *, ids="picture {}", **changes):
    """A folder of labels: pictures by file, the last one by bytes; a question about each."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "depth").mkdir()
    rows, asked = [], []
    for number, scene in enumerate(scenes):
        file = folder / "pictures" / f"{number}.png"
        codes = [(number + place) % K for place in range(N)]
        if number < len(scenes) - 1:
            Pictures.fromarray(scene.image).save(file)
            image = {"path": str(file), "bytes": None}
        else:
            image = {"path": "shard/last.png", "bytes": png(scene.image)}
        near = (65535 * (scene.depth.min() / scene.depth)).astype(np.uint16)
        Pictures.fromarray(near).save(folder / "depth" / f"{number}.png")
        rows.append(
            {
                "id": ids.format(number),
                "image": image,
                "width": scene.size,
                "height": scene.size,
                "codes": codes,
                "depth": f"depth/{number}.png",
                "extra": None,
            }
        )
        said = "<DEPTH_START><DEPTH_END>B" if number else "<DEPTH_START><DEPTH_END>B, A, C"
        asked.append(
            {
                "id": f"{ids.format(number)} question 0",
                "images": [png(scene.image)],
                "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": said}],
                "depth_codes": codes,
                "task": "closest" if number else "order",
            }
        )
    text, whole = Value("string"), Value("int32")
    file = {"bytes": Value("binary"), "path": text}  # as `Image`, whose files `save_to_disk` would copy
    features = {"id": text, "image": file, "width": whole, "height": whole, "codes": List(whole)}
    features = Features(features | {"depth": text, "extra": text})
    Dataset.from_list(rows, features=features).save_to_disk(str(folder / "labels"))
    about = {
        "format": "perceptio labels",
        "version": 1,
        "complete": True,
        "rows": len(rows),
        "teacher": {"name": "teacher"},
        "codec": {"name": "codec", "fingerprint": "0123456789abcdef", "num_tokens": N, "num_codes": K},
        "maps": True,
    }
    about |= changes
    (folder / "labels.json").write_text(json.dumps(about))
    write_dataset(folder / "questions", map(to_row, asked), sample_features(), {"labels": about})
    return [row["codes"] for row in rows]


def load(folder, **options):
    datasets, _ = load_tasks([{"labels": str(folder), **options}])
    return next(iter(datasets.values()))


def loaded(row):
    return load_sample(row, num_depth_tokens=N, num_depth_codes=K)


def test_codes_become_spans_and_pictures_stay_where_they_are(scenes, tmp_path):
    codes = write_labels(tmp_path / "labels", scenes)
    dataset = load(tmp_path / "labels")
    assert [row["depth_codes"] for row in dataset] == [[item] for item in codes]
    for number, (row, scene) in enumerate(zip(dataset, scenes, strict=True)):
        sample = loaded(row)
        assert row["id"] == f"picture {number}" and sample.depths == [None]
        assert (np.asarray(sample.pictures[0]) == scene.image).all()
    assert [row["images"][0]["bytes"] is None for row in dataset] == [True, True, False]


def test_maps_are_learnt_from_where_that_is_asked_for(scenes, tmp_path):
    write_labels(tmp_path, scenes)
    row = load(tmp_path, maps=True)[1]
    near = scenes[1].depth.min() / scenes[1].depth
    assert not row["depth_codes"]
    found = loaded(row).depths[0].relative
    expected = (near - near.min()) / (near.max() - near.min())
    assert np.abs(found - expected).max() < 0.01 or np.abs(found - near).max() < 0.01
    write_labels(tmp_path / "without", scenes, maps=False)
    with pytest.raises(ValueError, match="has codes and no maps"):
        load(tmp_path / "without", maps=True)


@pytest.mark.parametrize(("part", "count"), [("questions", 3), ("closest", 2), ("order", 1)])
def test_questions_have_their_spans_first(part, count, scenes, tmp_path):
    write_labels(tmp_path, scenes)
    dataset = load(tmp_path, part=part)
    assert len(dataset) == count
    for row in dataset:
        assert row["messages"][1]["content"][0]["text"].startswith("<DEPTH_START><DEPTH_END>")
        loaded(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "is not complete; give the same `perceptio label` command again"),
        ({"version": 2}, "is of version 2; this release reads 1"),
        ({"format": "else"}, "is no description of labels"),
    ],
)
def test_folders_that_are_no_labels(changes, message, scenes, tmp_path):
    write_labels(tmp_path, scenes, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_parts_and_pictures_that_are_not_there(scenes, tmp_path):
    write_labels(tmp_path, scenes)
    with pytest.raises(ValueError, match="has no part 'objects'; it has spans, questions, closest, order"):
        load(tmp_path, part="objects")
    with pytest.raises(ValueError, match="maps: true goes with part: spans"):
        load(tmp_path, part="closest", maps=True)
    (tmp_path / "pictures" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures are missing, .*0\.png"):
        load(tmp_path)
    assert load(tmp_path, missing="skip")["id"][:] == ["picture 1", "picture 2"]
    (tmp_path / "depth" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"2 pictures and depth maps are missing, of 2 of 3 samples: .*1\.png"):
        load(tmp_path, maps=True)
    assert load(tmp_path, maps=True, missing="skip")["id"][:] == ["picture 2"]
    assert load(tmp_path, missing="skip")["id"][:] == ["picture 1", "picture 2"], "whose codes need no map"


def test_pictures_that_others_test_on_are_held_out(scenes, tmp_path):
    tested = {"ref_id": 0, "ann_id": 1, "image_id": 1, "split": "val", "sentences": []}
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "refs(unc).p").write_bytes(pickle.dumps([tested]))
    write_labels(tmp_path / "coco", scenes, ids="train2014/COCO_train2014_{:012d}.jpg")
    for part in ("spans", "questions"):
        kept = load(tmp_path / "coco", part=part, held_out=str(tmp_path / "refs"))["id"]
        assert [name.partition(".")[0][-1] for name in kept] == ["0", "2"]
    write_labels(tmp_path / "photos", scenes)
    with pytest.raises(ValueError, match=r"no label is of one by its id .* such as picture 0\. Leave held_out out"):
        load(tmp_path / "photos", held_out=str(tmp_path / "refs"))


def test_codes_of_another_codec_are_refused(scenes, tmp_path):
    write_labels(tmp_path, scenes)
    codec = read_label_metadata(tmp_path)["codec"]
    check_codec(tmp_path, codec, "0123456789abcdef", N, K)
    with pytest.raises(
        ValueError, match=r"codes of the codec codec \(64 codes of 128\), 0123456789abcdef; the model's"
    ):
        check_codec(tmp_path, codec, "f" * 16, N, K)


def test_training_refuses_labels_of_another_codec(scenes, tmp_path):
    from perceptio_hf import PerceptioForConditionalGeneration, tiny_checkpoint
    from perceptio_hf.modeling.codec_identity import codec_fingerprint
    from perceptio_hf.training.recipe import check_label_codecs

    model = PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint())
    write_labels(tmp_path / "mine", scenes)
    tasks = [{"world": "refer", "scenes": 1}, {"labels": "mine"}]
    shutil.copytree(tmp_path / "mine" / "questions", tmp_path / "elsewhere" / "asked")
    kinds = [[{kind: name}] for kind in ("samples", "hub") for name in ("mine/questions", "elsewhere/asked")]
    for others in (tasks, *kinds):
        with pytest.raises(ValueError, match="Label with the model's codec"):
            check_label_codecs(others, str(tmp_path), model.depth_model)
    check_label_codecs([{"samples": "questions"}, {"hub": "somebody/set"}], str(tmp_path), model.depth_model)
    check_label_codecs([{"labels": "mine", "maps": True}], str(tmp_path), model.depth_model)
    about = json.loads((tmp_path / "mine" / "labels.json").read_text())
    about["codec"]["fingerprint"] = codec_fingerprint(DepthVQVAE.from_pretrained(_saved(model, tmp_path)))
    (tmp_path / "mine" / "labels.json").write_text(json.dumps(about))
    check_label_codecs(tasks, str(tmp_path), model.depth_model)


def _saved(model, folder):
    model.depth_model.save_pretrained(folder / "codec")
    return folder / "codec"
