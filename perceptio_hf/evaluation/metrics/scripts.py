"""What the scripts under `metrics/` share: inputs that may be left out, and inputs that are rewritten as they come.

`evaluate` stores every input in an Arrow table whose columns all have to be given. The mixin fills in those that were
not, so that users name only what they have.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .answer_parsing import reference_letter


class FlexibleInputs:
    """To be inherited from before `evaluate.Metric`.

    `optional` names the inputs that may be left out, with the value that stands for "not given" in the table; a None
    among the values is replaced by it too. `convert` may rewrite the values of an input.
    """

    optional: ClassVar[Mapping[str, Any]] = {}

    def convert(self, name: str, values: Sequence) -> Sequence:
        """Rewrite the values of the input `name`; here they stay as they are."""
        return values

    def add(self, *, prediction=None, reference=None, **inputs):
        """Add one prediction with its reference."""
        rows = {name: [value] for name, value in inputs.items()}
        ready = self._ready({"predictions": [prediction], "references": [reference], **rows})
        single = {name: values[0] for name, values in ready.items()}
        super().add(prediction=single.pop("predictions"), reference=single.pop("references"), **single)

    def add_batch(self, *, predictions=None, references=None, **inputs):
        """Add several predictions with their references."""
        super().add_batch(**self._ready({"predictions": predictions, "references": references, **inputs}))

    def compute(self, *, predictions=None, references=None, **inputs):
        """Score what was added, and what is given here."""
        if predictions is not None:
            inputs = {**dict.fromkeys(self.optional), **inputs}
        return super().compute(predictions=predictions, references=references, **inputs)

    def given(self, values: Sequence, name: str) -> list | None:
        """The values of the optional input `name` with None where it was not given; None if it nowhere was."""
        found = [None if value == self.optional[name] else value for value in values]
        return None if all(value is None for value in found) else found

    def _ready(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs["predictions"] is None or inputs["references"] is None:
            raise ValueError("predictions and references are both needed.")
        ready = {}
        for name, values in inputs.items():
            known = values is not None and name in self._feature_names()  # `evaluate` refuses unknown ones
            ready[name] = self.convert(name, values) if known else values
        for name, filler in self.optional.items():
            values = ready.get(name)
            if values is None:
                values = [None] * len(ready["predictions"])
            ready[name] = [filler if value is None else value for value in values]
        return ready


class LetteredReferences(FlexibleInputs):
    """The same, and references may be indices as well as letters."""

    def convert(self, name: str, values: Sequence) -> Sequence:
        if name != "references":
            return values
        return [value if isinstance(value, str) else reference_letter(value) for value in values]
