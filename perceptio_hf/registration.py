"""Makes transformers' Auto classes know Perceptio, without importing a class before somebody uses it.

transformers finds its own classes by name: tables of strings, resolved when a checkpoint asks for them. Perceptio joins
these tables, with this package as the module that has the names. `AutoModel.register` would need the classes
themselves, which cost seconds to import and may not be imported while transformers is half loaded. The tables are
filled as soon as their module has been loaded, so that `import perceptio_hf` does not have to load it.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from perceptio_hf.modeling.attachments import attach

_CONFIGS = {"perceptio": "PerceptioConfig", "perceptio_depth_vqvae": "DepthVQVAEConfig"}
_MODEL = {"perceptio": "PerceptioForConditionalGeneration"}
# Per module of transformers: its lazy mapping and the names that join it (seen in 5.17 and 5.23).
_TABLES = {
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING": _MODEL | {"perceptio_depth_vqvae": "DepthVQVAE"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": _MODEL,
        "MODEL_FOR_MULTIMODAL_LM_MAPPING": _MODEL,
    },
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING": {"perceptio": "PerceptioProcessor"}},
}
# What the model's own classes offer but floors above it do: see `perceptio_hf.modeling.attachments`.
_ATTACHED = {
    "from_components": "perceptio_hf.build.assembly",
    "processor_from_components": "perceptio_hf.build.processors",
    "replace_default_card": "perceptio_hf.hub.card",
}
_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def _register(name: str, module: ModuleType) -> None:
    if name == _CONFIG_MODULE:
        module.CONFIG_MAPPING._mapping.update(_CONFIGS)
        return
    for mapping_name, classes in _TABLES[name].items():
        mapping = getattr(module, mapping_name)
        mapping._model_mapping.update(classes)
        mapping._config_mapping.update(_CONFIGS)
        mapping._reverse_config_mapping.update({config: kind for kind, config in _CONFIGS.items()})


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
    _register(name, module)


def _function(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def register() -> None:
    """Register now where transformers' tables are loaded already, and elsewhere as soon as they are."""
    for kind in _CONFIGS:  # where transformers looks for the classes of a model type
        sys.modules.setdefault(f"transformers.models.{kind}", sys.modules[__package__])
    for name, module in _ATTACHED.items():
        attach(name, functools.partial(_function, module, name))
    names = {_CONFIG_MODULE, *_TABLES}
    for name in sorted(names & set(sys.modules)):
        names.remove(name)
        _register(name, sys.modules[name])
    if names:
        sys.meta_path.insert(0, _AfterImport(names))
