"""The maps that a depth codec keeps best and worst, to see what the numbers do not say."""

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from perceptio_hf.evaluation.metrics.depth import map_figures, mean_map_figures
from perceptio_hf.visualization import Panel, depth_panel, sheet

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
    from perceptio_hf.training.codec import DepthSource


def measure_maps(
    codec: "DepthVQVAE", source: "DepthSource", count: int, each: int
) -> tuple[dict[str, Any], Image.Image]:
    """Figures over maps spread evenly over a source, as `codec_metrics` gives them, and a sheet of some of these maps.

    Args:
        count: how many are measured at most.
        each: how many of the best, and of the worst, are drawn.
    """
    from perceptio_hf.training.codec.maps import spread

    figures = {index: map_figures(codec, item) for index, item in source.read_each(spread(len(source), count))}
    ranked = sorted(figures, key=lambda index: figures[index]["relative_mae"])
    each = min(each, len(ranked) // 2) or 1
    chosen = [("best", index) for index in ranked[:each]] + [("worst", index) for index in ranked[-each:]]
    panels = [panel for name, index in chosen for panel in _panels(codec, source, index, name, figures[index])]
    caption = "Depth maps and what is left of them as codes. Errors are mean absolute ones of relative depth."
    return mean_map_figures(list(figures.values()), codec.config.num_codes), sheet(panels, caption, columns=4)


@torch.no_grad()
def _panels(codec: "DepthVQVAE", source: "DepthSource", index: int, name: str, figures: dict[str, Any]) -> list[Panel]:
    """A map, and its codes decoded."""
    item = source.read(index)
    decoded = codec.decode(torch.from_numpy(figures["codes"]), size=item.relative.shape).cpu().numpy()
    return [
        depth_panel(item.relative, item.valid, title=f"{name}: map {index}"),
        depth_panel(decoded, title=f"decoded, error {figures['relative_mae']:.4f}"),
    ]
