"""What parts of the package above the model attach to it, so that the model names nothing above itself.

Making a Perceptio out of stock parts and writing its model card are done by floors that build on the model, yet users
look for them on the model's own classes. `perceptio_hf.registration` says where they are, as functions that import them
when they are first needed. A copy of this file that travels with a checkpoint has nothing attached.
"""

from collections.abc import Callable

_loaders: dict[str, Callable[[], Callable]] = {}


def attach(name: str, loader: Callable[[], Callable]) -> None:
    """Let `attached(name)` return what `loader()` returns."""
    _loaders[name] = loader


def attached(name: str) -> Callable | None:
    """The function attached as `name`; None where there is none, as in a copy of this code outside the package."""
    return _loaders[name]() if name in _loaders else None


def needed(name: str, what: str) -> Callable:
    """As `attached`.

    Raises:
        ImportError: where nothing is attached.
    """
    function = attached(name)
    if function is None:
        raise ImportError(f"{what} needs the package perceptio-hf, of which only a copy of some files is at hand.")
    return function
