"""Plain data come through whatever wrote them; anything that could run code is refused without running it."""

import collections
import datetime
import pickle

import numpy as np
import pytest

from perceptio_hf.data.formats.plain_pickle import read_plain_pickle

PLAIN = [
    {"a": 1, "b": [2.5, None, True], "c": ("x", b"y\xff"), "d": {1, 2}, "e": collections.OrderedDict(k="v")},
    2**70,
    frozenset("ab"),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(tmp_path, protocol):
    (tmp_path / "x.p").write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_plain_pickle(tmp_path / "x.p") == PLAIN


def test_python_2_texts(tmp_path):
    # What Python 2 wrote for [{'sent': 'a caf\xe9', u'raw': u'A', 'ids': [1L]}], protocol 0.
    text = b"(lp0\n(dp1\nS'sent'\np2\nS'a caf\\xe9'\np3\nsVraw\np4\nVA\np5\nsS'ids'\np6\n(lp7\nL1L\nasa."
    (tmp_path / "x.p").write_bytes(text)
    assert read_plain_pickle(tmp_path / "x.p") == [{"sent": "a café", "raw": "A", "ids": [1]}]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Evaluated:
    def __reduce__(self):
        return eval, ("1 + 1",)


class Codec:
    """Bytes are written with this function; it must not become a way to any codec."""

    def __reduce__(self):
        import _codecs

        return _codecs.encode, ("x", "unicode_escape")


@pytest.mark.parametrize("protocol", (0, 2, 4))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evaluated(), "builtins.eval"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (np.float64(1.5), "numpy"),
        (collections.Counter("a"), "collections.Counter"),
        (print, "builtins.print"),
        (Codec(), "unicode_escape"),
    ],
)
def test_everything_else_is_refused(tmp_path, value, name, protocol):
    (tmp_path / "x.p").write_bytes(pickle.dumps([{"ref_id": 0, "more": value}], protocol))
    with pytest.raises(ValueError, match=rf"refused: it names .*{name}"):
        read_plain_pickle(tmp_path / "x.p")


@pytest.mark.parametrize("protocol", (0, 2, 4))
def test_a_bomb_does_not_go_off(tmp_path, protocol):
    (tmp_path / "x.p").write_bytes(pickle.dumps(Bomb(tmp_path / "gone off"), protocol))
    with pytest.raises(ValueError, match=r"refused: it names \w+\.open"):
        read_plain_pickle(tmp_path / "x.p")
    assert not (tmp_path / "gone off").exists()


def test_objects_kept_elsewhere_are_refused(tmp_path):
    (tmp_path / "x.p").write_bytes(b"Pname\n.")
    with pytest.raises(ValueError, match="persistent id"):
        read_plain_pickle(tmp_path / "x.p")


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps(PLAIN)[:-9], b"(lp0\n" * 3],
    ids=["empty", "text", "cut short", "never ends"],  # a set's bytes differ from one process to the next
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "x.p").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.p is no pickle that can be read"):
        read_plain_pickle(tmp_path / "x.p")
