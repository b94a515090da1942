"""Finds what a string names as a picture: a file, a web address, a `data:` URL, or base64 text.

Only the standard library and Pillow: this file travels with a checkpoint and must load where the package is not
installed.
"""

import base64
import binascii
import http.client
import io
import os
import re
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

from PIL import Image

MAX_BYTES = 250_000_000  # of one picture that is fetched
_SECONDS = 30  # to wait for a server that says nothing
_WEB, _ELSEWHERE = ("http://", "https://"), ("ftp://", "s3://", "gs://", "hf://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*", re.ASCII)  # shorter than the smallest picture, it is a name


def find_picture(name: str) -> tuple[Path | io.BytesIO, str]:
    """The file or the bytes that `name` stands for, and what to call them in an error.

    The network is used for http:// and https:// alone, which only the caller can have named.

    Raises:
        ValueError: there is no such file, it is a folder, empty or closed to us; an address that does not answer with a
            file of at most `MAX_BYTES`; `data:` or base64 text that is damaged.
    """
    start = name[:10].lower()
    if start.startswith(_WEB):
        return io.BytesIO(_fetch(name)), f"The picture {shown(name)}"
    if start.startswith("data:"):
        return io.BytesIO(_from_data_url(name)), f"The picture {shown(name, 40)}"
    if start.startswith("file:"):
        name = _path_of_url(name)
    elif start.startswith(_ELSEWHERE):
        raise ValueError(f"{shown(name)} is not a local file; download the picture first and give its path.")
    path = os.path.expanduser(name)
    # os.path, unlike pathlib, also says no where the name is too long or the folder closed.
    if name and "\0" not in name and not os.path.exists(path) and _BASE64.fullmatch(name):
        data = _from_base64(name)
        if data is not None and _is_picture(data):  # letters and strokes could be a path as well
            return io.BytesIO(data), f"The picture {shown(name, 40)} in base64"
    return _existing_file(name, path), f"The picture {shown(path)}"


def shown(name: str, length: int = 200) -> str:
    """A name for an error's text: on one line, printable, and not as long as base64 can be."""
    name = name if len(name) <= length else f"{name[:length]}..."
    printable = name.encode("utf-8", "backslashreplace").decode()
    return printable if printable.isprintable() else repr(printable)


def _existing_file(name: str, path: str) -> Path:
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not the path of a picture.")
    if os.path.isdir(path):
        raise ValueError(f"{shown(path)} is a folder; name the pictures in it, e.g. {os.path.join(path, '*.jpg')}.")
    if not os.path.exists(path):
        raise ValueError(f"There is no picture {shown(path)}; check the path.")
    if not os.path.isfile(path):
        raise ValueError(f"{shown(path)} is not an ordinary file; give the path of a picture.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The picture {shown(path)} is empty (0 bytes); copy or download it again.")
    return Path(path)


def _path_of_url(url: str) -> str:
    """file:///a%20b.png -> /a b.png"""
    rest = url[len("file:") :]
    host, _, path = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest.lstrip("/"))
    if host not in ("", "localhost"):
        raise ValueError(f"{shown(url)} names another machine; write file:/// (three strokes) and the path.")
    path = f"/{path.partition('#')[0].partition('?')[0]}"
    if os.name == "nt":
        return urllib.request.url2pathname(path)
    return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(path)))  # a name on disk need not be UTF-8


def _fetch(url: str) -> bytes:
    """What a web address answers with. Redirections are followed, never to a file of this machine."""
    # Some servers refuse the name that urllib gives itself.
    headers = {"User-Agent": "perceptio-hf", "Accept": "image/*,*/*;q=0.8"}
    try:
        asked = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]|")  # spaces and letters beyond ASCII
        request = urllib.request.Request(asked, headers=headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{shown(url)} cannot be fetched ({reason}); download the picture and give its path."
        ) from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{shown(url)} is larger than {MAX_BYTES:,} bytes; download it and scale it down first.")
    if not data:
        raise ValueError(f"{shown(url)} is empty (0 bytes).")
    return data


def _from_data_url(url: str) -> bytes:
    """data:[kind][;base64],... -> bytes"""
    head, comma, body = url.partition(",")
    if comma and head.lower().endswith(";base64"):
        data = _from_base64(urllib.parse.unquote(body))
    else:
        data = urllib.parse.unquote_to_bytes(body)
    if not data:
        raise ValueError(f"{shown(url, 40)} holds no picture; expected data:image/png;base64, and the bytes in base64.")
    return data


def _from_base64(text: str) -> bytes | None:
    """The bytes, or None where `text` is no base64. Line breaks in it and missing padding are common and harmless."""
    text = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _is_picture(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(data)).close()
        return True
    except Image.DecompressionBombError:
        return True  # one that is too large
    except Exception:
        return False
