"""Makes transformers' Auto classes know Perceptio, without importing them before somebody uses them.

`from transformers import AutoModel` loads a module of transformers; only then are our classes loaded and registered.
That keeps `import perceptio_hf` cheap: the classes themselves cost seconds.
"""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def _register_configs(auto: ModuleType) -> None:
    from .modeling.configuration_depth_vqvae import DepthVQVAEConfig
    from .modeling.configuration_perceptio import PerceptioConfig

    for config in (PerceptioConfig, DepthVQVAEConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .modeling.configuration_depth_vqvae import DepthVQVAEConfig
    from .modeling.configuration_perceptio import PerceptioConfig
    from .modeling.modeling_depth_vqvae import DepthVQVAE
    from .modeling.modeling_perceptio import PerceptioForConditionalGeneration

    for auto_class in (auto.AutoModel, auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        auto_class.register(PerceptioConfig, PerceptioForConditionalGeneration, exist_ok=True)
    auto.AutoModel.register(DepthVQVAEConfig, DepthVQVAE, exist_ok=True)


def _register_processors(auto: ModuleType) -> None:
    from .modeling.configuration_perceptio import PerceptioConfig
    from .processing.processing_perceptio import PerceptioProcessor

    auto.AutoProcessor.register(PerceptioConfig, PerceptioProcessor, exist_ok=True)


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processors,
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Import hook: lets the modules above load as ever, and registers once none of them is half loaded.

    They import one another, and our classes import them: registering in between would meet half loaded modules.
    """

    def __init__(self) -> None:
        self.waiting = set(_REGISTER)
        self.loaded: list[str] = []
        self.depth = 0

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)  # first: the next line asks this finder again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._execute, fullname, spec.loader.exec_module)
        return spec

    def _execute(self, name: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        self.loaded.append(name)
        self.register_loaded()

    def register_loaded(self) -> None:
        """Register what is waiting, unless a module is being loaded or another call is at it."""
        while self.loaded and not self.depth:
            name = self.loaded.pop(0)
            self.depth += 1
            try:
                _REGISTER[name](sys.modules[name])
            finally:
                self.depth -= 1


def register() -> None:
    """Register now what transformers has loaded already, and the rest as soon as it is loaded."""
    hook = _RegisterAfterImport()
    hook.loaded = [name for name in _REGISTER if name in sys.modules]
    hook.waiting -= set(hook.loaded)
    if hook.waiting:
        sys.meta_path.insert(0, hook)
    hook.register_loaded()
