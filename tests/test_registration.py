"""`import perceptio_hf` registers, whatever was imported before it, and imports nothing heavy."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest
import transformers

import perceptio_hf
from perceptio_hf import registration

ORDERS = [
    "import perceptio_hf; from transformers import AutoModel, AutoProcessor",
    "from transformers import AutoModel, AutoProcessor; import perceptio_hf",
    "import transformers.models.auto.configuration_auto; import perceptio_hf; from transformers import AutoModel",
    "import perceptio_hf; from transformers import AutoProcessor, AutoModel",
    "import perceptio_hf; from transformers import Trainer, GotOcr2ImageProcessorPil, AutoModel",
    "import perceptio_hf; from perceptio_hf import DepthVQVAE; from transformers import AutoModel",
]


def run(code: str, *args: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports(order, tiny_folder):
    code = f"import sys; {order}; from transformers import AutoProcessor; print(type(AutoModel.from_pretrained(" \
           "sys.argv[1])).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)"  # fmt: skip
    assert run(code, str(tiny_folder)).split() == ["PerceptioForConditionalGeneration", "PerceptioProcessor"]


def test_import_is_cheap():
    """No class of transformers, no torch of our own: only a few small modules."""
    code = "import transformers, sys; before = set(sys.modules); import perceptio_hf; print(*set(sys.modules) - before)"
    new = {name for name in run(code).split() if not name.startswith(("perceptio_hf", "transformers.models.perceptio"))}
    assert not {name for name in new if name.split(".")[0] in ("torch", "transformers", "numpy", "PIL", "matplotlib")}
    assert len(new) < 10


@pytest.mark.parametrize(
    ("module", "table"), [(module, table) for module, tables in registration.TABLES.items() for table in tables]
)
def test_transformers_still_finds_classes_by_the_names_in_its_tables(module, table):
    """If this fails, transformers has changed the tables that `registration.py` joins; the message says how."""
    version = f"transformers {transformers.__version__}: {module}"
    loaded = importlib.import_module(module)
    names = getattr(loaded, table, None)
    assert isinstance(names, dict), f"{version} has no table {table} of strings any more; find where names went"
    missing = registration.TABLES[module][table].items() - names.items()
    assert not missing, f"{version} made {table} anew after its import, so that {missing} got lost"
    mapping = getattr(loaded, table.removesuffix("_NAMES"), None)
    assert mapping is not None, f"{version} no longer turns {table} into classes by a mapping of the same name"
    for kind, name in registration.TABLES[module][table].items():
        config = getattr(perceptio_hf, registration.CONFIGS[kind])
        key = kind if table == "CONFIG_MAPPING_NAMES" else config
        assert key in mapping, f"{version}: the mapping of {table} does not look into the table any more for {key}"
        found = mapping[key]
        assert found is getattr(perceptio_hf, name), f"{version}: {table} gives {found} for {key}, not {name}"


def test_a_table_that_is_gone_warns_and_breaks_no_import():
    """Another release of transformers must not fail to import because this package is installed."""
    (name, *_) = registration.TABLES
    with pytest.warns(RuntimeWarning, match="CONFIG_MAPPING_NAMES.*Update perceptio-hf, or load with"):
        registration.register_names(name, ModuleType(name))


def test_public_names():
    for name in perceptio_hf.__all__:
        assert getattr(perceptio_hf, name) is not None
    assert set(perceptio_hf.__all__) <= set(dir(perceptio_hf))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = perceptio_hf.no_such_name


def test_the_depth_codec_alone(tmp_path):
    from helpers import depth_config
    from transformers import AutoConfig, AutoModel

    from perceptio_hf import DepthVQVAE

    DepthVQVAE(depth_config()).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_tokens == 16
    assert type(AutoModel.from_pretrained(tmp_path)) is DepthVQVAE
