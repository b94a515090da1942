"""Draws docs/images/architecture.png from the imports of the package: `make plan`.

Each floor is a row, from the ground up, with its files and lines; each arc is the imports of one part from another,
thicker for more of them. All arcs point down; `tests/test_layout.py` sees to that.
"""

import ast
from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PACKAGE = Path(__file__).parents[1] / "perceptio_hf"
FLOORS = {  # from the ground up, and what each is for
    "tokens": "the spatial tokens and how a sequence is read",
    "files": "files and folders, written whole or not at all",
    "visualization": "pictures of masks and depth",
    "extras": "what to install for what is missing",
    "world": "rendered scenes with exact depth, masks, questions",
    "modeling": "model, depth codec, generation and its grammar",
    "processing": "pictures and conversations in, answers out",
    "data": "samples, their sources, mixtures, depth maps",
    "bulk": "many pictures: batches, engines, a journal",
    "labelling": "a depth teacher's view of many pictures, as codes",
    "conversion": "formats of others, in and out",
    "build": "stock parts joined to one Perceptio",
    "training": "losses, trainer, recipes, depth codec",
    "evaluation": "metrics, benchmarks, runs, reports",
    "hub": "model cards and uploads",
    "lab": "the tiny checkpoint's lessons, the ablation",
    "app": "the page and its HTTP interface",
    "commands": "perceptio demo, predict, train, eval ...",
    "integrations": "plug-ins for other programs",
}
_WIDTH, _HEIGHT, _STEP = 6.4, 0.62, 0.86


def imports() -> Counter:
    """{(part, part it imports from): how many import statements say so}."""
    edges = Counter()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                head, _, rest = (name or "").partition(".")
                target = rest.split(".")[0]
                if head == PACKAGE.name and part in FLOORS and target in FLOORS and target != part:
                    edges[part, target] += 1
    return edges


def size(part: str) -> str:
    """`12 files, 1,400 lines`."""
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else list((PACKAGE / part).rglob("*.py"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return f"{len(files)} file{'s' * (len(files) > 1)}, {lines:,} lines"


def draw(path: Path) -> None:
    """Draw the picture."""
    figure = Figure(figsize=(8.8, 11.6), layout="constrained")
    axes = figure.subplots()
    places = {part: number * _STEP for number, part in enumerate(FLOORS)}
    for part, meaning in FLOORS.items():
        y = places[part]
        box = FancyBboxPatch(
            (0, y - _HEIGHT / 2), _WIDTH, _HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", fc="#f4f6f9", ec="#7a8699"
        )
        axes.add_patch(box)
        axes.text(0.18, y + 0.1, part, fontsize=11.5, fontweight="bold", va="center")
        axes.text(0.18, y - 0.16, meaning, fontsize=8.5, va="center", color="#3c4656")
        axes.text(_WIDTH - 0.15, y + 0.1, size(part), fontsize=8.5, va="center", ha="right", color="#3c4656")
    colors = ("#1f6fb4", "#c2563b", "#2e8b57", "#8e5ea2", "#a5761c", "#4a90a4", "#7d5a50")
    for index, ((part, target), count) in enumerate(sorted(imports().items())):
        start, end = places[part], places[target]
        arc = FancyArrowPatch(
            (_WIDTH + 0.02, start + 0.06),
            (_WIDTH + 0.02, end - 0.02),
            connectionstyle=f"arc3,rad={-0.3 - 0.004 * abs(start - end)}",
            arrowstyle="-|>,head_length=5,head_width=2.5",
            linewidth=0.5 + 0.09 * min(count, 30),
            color=colors[list(FLOORS).index(part) % len(colors)],
            alpha=0.65,
            zorder=index,
        )
        axes.add_patch(arc)
    axes.set_xlim(-0.1, _WIDTH + 3.4)
    axes.set_ylim(-0.6, max(places.values()) + 0.6)
    axes.set_aspect("equal")
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "architecture.png")
