"""A Hugging Face Space that shows the page: README with its metadata, requirements, app.py, and all it needs to run."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from shutil import copytree, ignore_patterns

from perceptio_hf import __version__

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
license: apache-2.0
short_description: A model that writes masks and depth before it answers
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
        model: a folder, which is copied, or a Hub name, which the Space loads; None: the embedded tiny checkpoint.

    Raises:
        ValueError: where the folder holds something, or the libraries that are needed are not known.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space {folder} is not empty; name a new folder.")
    wanted = _requirements()
    folder.mkdir(parents=True, exist_ok=True)
    about, arguments = "It shows the embedded tiny checkpoint, which knows rendered scenes only.", ""
    if model is not None and Path(model).is_dir():
        copytree(model, folder / "model")
        about, arguments = f"It shows {Path(model).resolve().name}.", ', "--model", "model"'
    elif model is not None:
        about, arguments = f"It shows {model}.", f', "--model", "{model}"'
    unwanted = ["__pycache__", "recipes", *(["tiny"] if model is not None else [])]
    copytree(_PACKAGE, folder / "perceptio_hf", ignore=ignore_patterns(*unwanted))
    (folder / "requirements.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(_APP.format(arguments=arguments), encoding="utf-8")
    text = _README.format(gradio=_gradio_version(), model=about, version=__version__)
    (folder / "README.md").write_text(text, encoding="utf-8")


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
