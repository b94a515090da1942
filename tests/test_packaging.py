"""What a user installs: the wheel's contents, and the documents that promise something."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import perceptio_hf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="hatchling comes with the extra dev")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    information = f"perceptio_hf-{perceptio_hf.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {"perceptio_hf", information}
    assert "perceptio = perceptio_hf.commands.main:main" in wheel.read(f"{information}/entry_points.txt").decode()
    assert f"{information}/licenses/LICENSE" in wheel.namelist()


def test_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "perceptio_hf"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    recipes = [path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    files |= {f"perceptio_hf/{path.as_posix()}" for path in recipes}
    assert files == {name for name in wheel.namelist() if name.startswith("perceptio_hf/")}


def test_the_embedded_checkpoint_is_in_the_wheel_and_small(wheel):
    tiny = [entry for entry in wheel.infolist() if entry.filename.startswith("perceptio_hf/tiny/")]
    assert any(entry.filename.endswith(".safetensors") for entry in tiny)
    assert sum(entry.file_size for entry in tiny) <= 16 * 2**20


def test_the_version_stands_in_one_place():
    written = [ROOT / "pyproject.toml", ROOT / "CITATION.cff"]
    assert not any(re.search(r"(?m)^version\s*[=:]", path.read_text(encoding="utf-8")) for path in written)


def test_constraints_allow_what_the_project_asks_for(wheel):
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pinned[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    metadata = wheel.read(f"perceptio_hf-{perceptio_hf.__version__}.dist-info/METADATA").decode()
    for line in re.findall(r"(?m)^Requires-Dist: (.*)$", metadata):
        wanted = Requirement(line)
        if wanted.name != "perceptio-hf":  # the extra `all` names the others
            assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, f"constraints.txt contradicts {line}"


def test_all_extras_resolve_without_a_build(wheel):
    """sam2 is on PyPI as source only, and its build asks for a torch of its own: `[all]` would take hours or fail."""
    metadata = wheel.read(f"perceptio_hf-{perceptio_hf.__version__}.dist-info/METADATA").decode()
    needed, extras = set(), {"all"}
    while extras:
        extra = extras.pop()
        for line in re.findall(r"(?m)^Requires-Dist: (.*)$", metadata):
            wanted = Requirement(line)
            if wanted.marker is not None and wanted.marker.evaluate({"extra": extra}):
                extras |= wanted.extras if wanted.name == "perceptio-hf" else set()
                needed.add(wanted.name)
    assert {"trl", "evaluate", "gradio", "pytest"} <= needed and "sam2" not in needed
