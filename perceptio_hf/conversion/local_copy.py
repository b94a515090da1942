"""Where a source lies: on this disk, or on the Hub if the user names a repository there."""

import os
from collections.abc import Sequence
from pathlib import Path

from perceptio_hf.files import expanded

WEIGHTS_AND_CONFIG = ("*.json", "*.safetensors")


def local_copy(
    source: str | os.PathLike, patterns: Sequence[str] = WEIGHTS_AND_CONFIG, *, revision: str | None = None
) -> Path:
    """`source` itself where it exists; else the Hub repository of that name, owner/name, fetched into the usual cache.

    Args:
        patterns: Which files of a repository to fetch.
        revision: Its branch, tag or commit.

    Raises:
        ValueError: There is no such file or folder, and it is no name of a repository that can be fetched.
    """
    path = expanded(source)
    if path.exists():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or not all(name.split("/")) or path.suffix == ".pt":
        raise ValueError(f"There is no file or folder {name}.")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # not found, no access, no network: in each case the name is of no use here
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"There is no folder {name}, and it cannot be fetched from the Hub: {reason}") from None
