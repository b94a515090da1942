"""Draws docs/images/span.png, a depth span of the embedded checkpoint as it converges, and names it so in
docs/generation.md: `make plan`.

Above, one line for each pass: which places hold the final code and are known to, which hold it by a right guess, and
which are still wrong. Below, the depth that the guesses of some passes decode to.
"""

import re
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.modeling.spans import spatial_loop
from perceptio_hf.visualization import colorize_depth
from perceptio_hf.world import DEMO_SEED, render_scene

PICTURE = Path(__file__).parent / "images" / "span.png"
COLORS = {"wrong guess": "#d8dce3", "right guess": "#8fb8de", "final": "#1f5fa8"}
DOCUMENT = PICTURE.parents[1] / "generation.md"
QUESTION = "Which is closer, A or B?"


class WatchedDecoder(spatial_loop.SpanDecoder):
    """Remembers ids and length after every pass."""

    history: list[tuple[torch.Tensor, int]] = []  # noqa: RUF012

    def _status(self):
        self.history.append((self.ids[0].clone(), int(self.length[0])))
        return super()._status()


def spans(model, processor) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    """The picture, (passes, N) codes after each pass, first guess included, and (passes,) how many were final."""
    picture = Image.fromarray(render_scene(DEMO_SEED, size=128).image)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    words, start = model.spatial_vocabulary(), inputs["input_ids"].shape[1] + 1
    before = spatial_loop.SpanDecoder, spatial_loop._PLACES
    WatchedDecoder.history = []
    spatial_loop.SpanDecoder, spatial_loop._PLACES = WatchedDecoder, {"cpu": 1000}
    try:
        model.generate(**inputs, spatial="depth", max_new_tokens=words.span_length, do_sample=False)
    finally:
        spatial_loop.SpanDecoder, spatial_loop._PLACES = before
    codes = torch.stack([ids[start : start + words.num_depth_tokens] for ids, _ in WatchedDecoder.history])
    final = torch.tensor([length - start for _, length in WatchedDecoder.history])
    passes = int((final < words.num_depth_tokens).sum())  # the one after these writes the end marker alone
    return picture, codes[: passes + 1] - words.codes[0], final[: passes + 1].clamp(max=words.num_depth_tokens)


def caption(count: int, passes: int) -> str:
    """What the picture of a span of `count` codes is called."""
    return f"A span of {count} codes is final after {passes} passes"


def draw(picture: Image.Image, codes: torch.Tensor, final: torch.Tensor, depth: torch.Tensor) -> Figure:
    """The figure; depth: (passes, S, S) of the codes."""
    passes, count = codes.shape
    kind = (codes == codes[-1]).long()  # 0 wrong, 1 right
    kind[torch.arange(count) < final[:, None]] = 2
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.45, 1])
    axes = above.subplots()
    axes.pcolormesh(kind, cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=2, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("place in the span, in reading order")
    axes.set_ylabel("pass")
    axes.set_yticks([row + 0.5 for row in range(0, passes, 2)], [str(row) for row in range(0, passes, 2)])
    handles = [axes.plot([], [], "s", color=color, label=name)[0] for name, color in COLORS.items()]
    axes.legend(handles=handles, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    shown = sorted({round(share * (passes - 1)) for share in (0.06, 0.25, 0.5, 1)})
    for axes, number in zip(below.subplots(1, len(shown) + 1), [None, *shown], strict=True):
        axes.imshow(picture if number is None else colorize_depth(depth[number].numpy()))
        axes.set_title("picture" if number is None else f"depth after pass {number}", fontsize=9)
        axes.axis("off")
    return figure


def main() -> None:
    folder = perceptio_hf.tiny_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    picture, codes, final = spans(model, processor)
    figure = draw(picture, codes, final, model.depth_model.decode(codes).detach())
    FigureCanvasAgg(figure)
    figure.savefig(PICTURE, dpi=110)
    named = caption(codes.shape[1], len(codes) - 1)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(re.sub(r"!\[[^]]*\]\(images/span", f"![{named}](images/span", text), encoding="utf-8")
    print(f"{PICTURE}: {named}")


if __name__ == "__main__":
    main()
