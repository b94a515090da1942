"""What to type where an optional library is missing: the one place that gives this advice."""

from pathlib import Path

LIBRARIES = {
    "trl": "train",
    "peft": "train",
    "datasets": "train",
    "pycocotools": "eval",
    "pyarrow": "eval",
    "gradio": "app",
    "ray": "ray",
    "bitsandbytes": "quantize",
}


def how_to_install(extra: str) -> str:
    """The command that brings an extra, e.g. "train", or several with commas between: for a checkout where this is one,
    else for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "constraints.txt").is_file():
        return f'pip install -c {root / "constraints.txt"} -e "{root}[{extra}]"'
    return f"""pip install "perceptio-hf[{extra}]" (in a checkout: pip install -c constraints.txt -e ".[{extra}]")"""


def missing(error: ImportError, what: str) -> ImportError:
    """`error` in words: `what`, e.g. "Training", needs a library, and how it is had. Any other error as it is."""
    name = (error.name or "").partition(".")[0]
    if name not in LIBRARIES:
        return error
    return ImportError(f"{what} needs the library {name}: {how_to_install(LIBRARIES[name])}", name=error.name)
