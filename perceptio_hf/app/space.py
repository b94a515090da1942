"""A Hugging Face Space that shows the page: README with its metadata, requirements, app.py, and all it needs to run."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from perceptio_hf import __version__
from perceptio_hf.files import expanded, new_folder
from perceptio_hf.hub.upload import CARD, model_files, write_files

_PACKAGE = Path(__file__).parents[1]
_OTHER_EXTRA = re.compile(r"""extra == (?!['"]app['"])""")
_README = """\
---
title: Perceptio
emoji: 📐
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
{license}short_description: A model that writes masks and depth before it answers
---

Ask about a picture: the model writes masks and a depth map down, and then its answer. Click on the picture to set
points and ask which is the closest.

{model} The page is `perceptio app` of perceptio-hf {version}, whose source is in `perceptio_hf/`.
"""
_APP = """\
\"\"\"Serves the page; the Space says at which address.\"\"\"

from perceptio_hf.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run(["app"{arguments}]))
"""


def write_space(folder: Path, model: str | None) -> None:
    """Write a Space into a folder that is new or empty. It runs as it is: `python app.py` in it, or pushed to the Hub.

    The package goes with it, so that it needs nothing from elsewhere but published libraries.

    Args:
        model: a folder, of which is copied what `perceptio push` would upload; or a Hub name, which the Space loads;
            None: the embedded tiny checkpoint.

    Raises:
        ValueError: where the folder holds something, the libraries that are needed are not known, or the model is one
            that `perceptio push` refuses.
        OSError: It could not be written, and is not there then.
    """
    folder = expanded(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space {folder} is not empty; name a new folder.")
    wanted = _requirements()
    files: dict[str, Path | bytes] = {"requirements.txt": "".join(f"{line}\n" for line in wanted).encode()}
    about, arguments = "It shows the embedded tiny checkpoint, which knows rendered scenes only.", ""
    if model is not None and Path(model).is_dir():
        files |= _of_model(Path(model))
        about, arguments = f"It shows {Path(model).resolve().name}.", ', "--model", "model"'
    elif model is not None:
        about, arguments = f"It shows {model}.", f', "--model", "{model}"'
    files["app.py"] = _APP.format(arguments=arguments).encode()
    # The licence of somebody's weights is theirs to name.
    settings = {"gradio": _gradio_version(), "license": "" if model is not None else "license: apache-2.0\n"}
    files["README.md"] = _README.format(model=about, version=__version__, **settings).encode()
    unwanted = ["__pycache__", "recipes", *(["tiny"] if model is not None else [])]
    with new_folder(folder) as fresh:
        try:
            shutil.copytree(_PACKAGE, fresh / "perceptio_hf", ignore=shutil.ignore_patterns(*unwanted))
        except shutil.Error as error:  # a list, of every file that failed
            ((*_, why), *_) = error.args[0]
            raise OSError(f"{folder} could not be written: {why}; make room, or name another disk.") from error
        write_files(files, fresh)


def _of_model(folder: Path) -> dict[str, Path | bytes]:
    """What of a saved model runs it, under its names in a Space, and its card; no optimizer, no other checkpoints."""
    files, _ = model_files(folder)
    files |= {CARD: folder / CARD} if (folder / CARD).is_file() else {}
    return {f"model/{name}": content for name, content in files.items()}


def _requirements() -> list[str]:
    """What the package and its page need, as pip takes it."""
    try:
        lines = requires("perceptio-hf") or []
    except PackageNotFoundError:
        raise ValueError(
            "perceptio-hf is not installed, so what it needs is not known: pip install it first."
        ) from None
    return sorted(line.partition(";")[0].strip() for line in lines if not _OTHER_EXTRA.search(line))


def _gradio_version() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:  # the Space takes the newest that is in range
        return "6.31.0"
