"""The tables of docs/generation.md, and README's two lines of them, out of what benchmarks/speed.py has written.

python benchmarks/speed_table.py benchmarks/results/speed.json --into docs/generation.md README.md
"""

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- benchmarks/speed_table.py -->", "<!-- end -->"
BEGIN_SHORT = "<!-- benchmarks/speed_table.py, in short -->"
SIDES = ("peers", "loop", "sequential", "parallel")
HEAD = """| one answer, CPU seconds | peers' pipeline | transformers' loop | code by code | parallel | of the peers' |
|---|---|---|---|---|---|"""


def answers(figures: dict) -> list[str]:
    """One line for each kind of answer and batch: seconds of all sides."""
    groups = {f"152 M parameters, {batch}": sides for batch, sides in figures.get("large", {}).items()}
    groups |= {f"embedded checkpoint, {kind}": sides for kind, sides in figures.get("answers", {}).items()}
    lines = []
    for name, sides in groups.items():
        seconds = " | ".join(f"{sides[side]:.3g}" for side in SIDES)
        lines.append(f"| {name} | {seconds} | {sides['parallel'] / sides['peers']:.2f} |")
    return lines


def others(figures: dict) -> list[str]:
    """What has no peer: spans, masks, questions, the grammar."""
    lines = []
    for name, span in figures.get("spans", {}).items():
        precision, places = name.split(", ")
        lines.append(
            f"| {precision}, {places} a pass | {span['passes']:.1f} passes a span, {span['of codes']:.2f} of its "
            f"codes; {span['same spans']} of {span['of']} spans as code by code |"
        )
    for name, step in figures.get("steps", {}).items():
        lines.append(
            f"| a step outside of spans, 152 M parameters, {name} | {step['ours'] / step['stock']:.2f} of the time of "
            f"stock `generate`, which knows no grammar; in transformers' loop {step['loop'] / step['stock']:.2f} |"
        )
    for name, sides in figures.get("large", {}).items():
        if "without the span" in sides:
            share = sides["without the span"] / sides["loop"]
            lines.append(
                f"| an answer without its span, 152 M parameters, {name} | {share:.2f} of the time of one with it in "
                "transformers' loop |"
            )
    for name, encoding in figures.get("codec", {}).items():
        lines.append(f"| codes of depth maps, {name} | {encoding['ours'] / encoding['AiT']:.2f} of AiT's time |")
    if "masks" in figures:
        masks = figures["masks"]
        lines.append(
            f"| masks of one picture | 8 take {masks['8 masks'] / masks['1 mask']:.2f} times as long as one, "
            f"of a known picture one takes {masks['1 mask of a known picture'] / masks['1 mask']:.3f} |"
        )
    if "second" in figures:
        second = figures["second"]
        lines.append(f"| a second question | {second['known'] / second['afresh']:.2f} of the time of asking afresh |")
    if "grammar" in figures:
        sides = ("state", "state, forced", "in loops of transformers")
        state, forced, loop = (1000 * figures["grammar"][side] for side in sides)
        lines.append(
            f"| the grammar, 32 x 151,674 | {state:.2f} ms a step, {forced:.1f} ms where a spatial token must come; "
            f"read off the ids, in transformers' loops, {loop:.0f} ms |"
        )
    return lines


def table(figures: dict) -> str:
    """Both tables in Markdown; the first only where it has lines."""
    sides = answers(figures)
    return "\n".join([*([HEAD, *sides, ""] if sides else []), "| | |", "|---|---|", *others(figures)])


def short(figures: dict) -> str:
    """For a page that has no room for all: whole answers of the larger model."""
    return "\n".join([HEAD, *answers({"large": figures["large"]})])


def put(text: str, figures: dict) -> str:
    """`text` with the tables, or the short one, in place of what stands between its two marks."""
    begin, made = (BEGIN_SHORT, short) if BEGIN_SHORT in text else (BEGIN, table)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n\n{made(figures)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, nargs="+", help="documents with the marks; default: print the tables")
    arguments = parser.parse_args()
    figures = json.loads(arguments.results.read_text(encoding="utf-8"))["figures"]
    if arguments.into is None:
        print(table(figures))
    for document in arguments.into or ():
        document.write_text(put(document.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
