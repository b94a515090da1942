"""Makes transformers' Auto classes know Perceptio, without importing a class before somebody uses it.

transformers finds its own classes by name: tables of strings, resolved when a checkpoint asks for them. Perceptio joins
these tables, with this package as the module that has the names. `AutoModel.register` would need the classes
themselves, which cost seconds to import and may not be imported while transformers is half loaded (its model files
load the Auto classes, and ours need its model files). The tables are filled as soon as their module has been loaded,
so that `import perceptio_hf` does not have to load it.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

from perceptio_hf.modeling.attachments import attach

CONFIGS = {"perceptio": "PerceptioConfig", "perceptio_depth_vqvae": "DepthVQVAEConfig"}
_MODEL = {"perceptio": "PerceptioForConditionalGeneration"}
# Per module of transformers: its tables of names, and those that join them (seen in 5.17 to 5.24).
TABLES = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": CONFIGS},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": _MODEL | {"perceptio_depth_vqvae": "DepthVQVAE"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": _MODEL,
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": _MODEL,
    },
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING_NAMES": {"perceptio": "PerceptioProcessor"}},
}
# What the model's own classes offer but floors above it do: see `perceptio_hf.modeling.attachments`.
_ATTACHED = {
    "from_components": "perceptio_hf.build.assembly",
    "processor_from_components": "perceptio_hf.build.processors",
    "replace_default_card": "perceptio_hf.hub.card",
}


def register_names(name: str, module: ModuleType) -> None:
    """Let Perceptio join the tables of transformers' `module`, which is called `name`; warns where they are gone."""
    try:
        for table, classes in TABLES[name].items():
            getattr(module, table).update(classes)
            mapping = getattr(module, table.removesuffix("_NAMES"))
            # A mapping of classes turns the names of configurations round when it is made. If that was before
            # Perceptio joined them, it has to be told.
            if table != "CONFIG_MAPPING_NAMES" and not set(CONFIGS.values()) <= set(mapping._reverse_config_mapping):
                mapping._reverse_config_mapping.update({config: kind for kind, config in CONFIGS.items()})
    except AttributeError as error:  # not an error: this happens inside imports that need not be about Perceptio at all
        warnings.warn(
            f"transformers' Auto classes do not know Perceptio, because {name} has changed ({error}). Update "
            "perceptio-hf, or load with PerceptioForConditionalGeneration and PerceptioProcessor.",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook: lets the modules above load as ever and registers afterwards."""

    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.names:
            return None
        self.names.remove(fullname)  # first: the next line asks this finder again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_execute, fullname, spec.loader.exec_module)
        return spec


def _execute(name: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    register_names(name, module)


def _function(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def register() -> None:
    """Register now where transformers' tables are loaded already, and elsewhere as soon as they are."""
    for kind in CONFIGS:  # where transformers looks for the classes of a model type
        sys.modules.setdefault(f"transformers.models.{kind}", sys.modules[__package__])
    for name, module in _ATTACHED.items():
        attach(name, functools.partial(_function, module, name))
    names = set(TABLES)
    for name in sorted(names & set(sys.modules)):
        names.remove(name)
        register_names(name, sys.modules[name])
    if names:
        sys.meta_path.insert(0, _AfterImport(names))
