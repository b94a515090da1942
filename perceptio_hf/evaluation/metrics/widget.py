"""A page on which a metric can be tried, for the Spaces of `metrics/`.

`evaluate.utils.launch_gradio_widget` needs gradio 3, which needs numpy 1; this one runs with the gradio of the extra
`app`, and lets inputs be left out.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.extras import how_to_install

if TYPE_CHECKING:
    import gradio


def metric_interface(folder: str | os.PathLike, example: dict[str, Any]) -> "gradio.Interface":
    """A box for the inputs of `compute` as JSON, a box for the scores, and the metric's card below.

    Args:
        folder: Of the metric: <name>.py and README.md.
        example: The inputs that stand in the box at first.

    Raises:
        ImportError: without gradio or evaluate.
    """
    try:
        import evaluate
        import gradio
    except ImportError as error:
        raise ImportError(f"{error}; the page needs: {how_to_install('app,eval')}") from None
    folder = Path(folder)
    script = next(path for path in sorted(folder.glob("*.py")) if path.name != "app.py")
    metric = evaluate.load(str(script))

    def compute(inputs: str) -> dict[str, Any]:
        try:
            return metric.compute(**json.loads(inputs))
        except (ValueError, TypeError) as error:
            raise gradio.Error(str(error)) from None

    card = (folder / "README.md").read_text(encoding="utf-8")
    return gradio.Interface(
        fn=compute,
        inputs=gradio.Code(json.dumps(example, indent=2), language="json", label="Inputs of compute()"),
        outputs=gradio.JSON(label="Scores"),
        title=script.stem.replace("_", " ").capitalize(),
        article=re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL),
        flagging_mode="never",
    )
