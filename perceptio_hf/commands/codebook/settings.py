"""The options of `perceptio codebook train`, from the command line and a YAML file."""

from pathlib import Path
from typing import Any

DEFAULTS = {
    "data": "world",
    "maps": None,
    "seed": 0,
    "unit": None,
    "pattern": None,
    "teacher": None,
    "teacher_unit": None,
    "steps": None,
    "minutes": None,
}


_TEXT, _WHOLE = str | None, int | None
_KINDS = {"data": str, "maps": _WHOLE, "seed": int, "unit": _TEXT, "pattern": _TEXT, "teacher": _TEXT}
_KINDS |= {"teacher_unit": _TEXT, "steps": _WHOLE, "minutes": float | None, "codec": dict, "options": dict}
_LEAST = {"maps": 1, "seed": 0}  # `Clock` looks after steps and minutes


def read_settings(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Join the options of the command line with those of a YAML file; the command line wins.

    Raises:
        ValueError: The file is missing, not YAML, or holds something else than the options.
    """
    from perceptio_hf.data.keys import check_value
    from perceptio_hf.files import find_recipe, read_yaml

    known = {**DEFAULTS, "codec": {}, "options": {}}
    read = {} if config is None else read_yaml(find_recipe(config))
    unknown = sorted(set(read) - set(known))
    if unknown:
        raise ValueError(f"{config} holds {', '.join(unknown)}; known are {', '.join(known)}.")
    for key, value in read.items():
        check_value(f"{config}: {key}", value, _KINDS[key])
        if key in _LEAST and value is not None and value < _LEAST[key]:
            raise ValueError(f"{config}: {key} is {value}; it must be {_LEAST[key]} or more.")
    given = {key: value for key, value in given.items() if value is not None}
    if "steps" in given or "minutes" in given:  # one replaces the other
        read = {key: value for key, value in read.items() if key not in ("steps", "minutes")}
    settings = {**known, **read, **given}
    if settings["steps"] is None and settings["minutes"] is None:
        settings["minutes"] = 5.0
    return settings
