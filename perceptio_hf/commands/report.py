"""`perceptio report`: several runs of `perceptio eval` as one comparison."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .predict import check_out


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders that `perceptio eval` wrote, or folders of such folders.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")] = Path("perceptio-report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON document.")] = False,
) -> None:
    """Compare RUNS in one table, with published figures beside them, and draw it.

    Writes OUT/report.md and OUT/report.png.
    """
    check_out(out)
    from perceptio_hf.evaluation.report.comparison import compare, read_summaries
    from perceptio_hf.evaluation.report.text import markdown, write_report

    summaries = read_summaries(runs)
    write_report(summaries, out)
    if as_json:
        table = compare(summaries)
        rows = {
            label: [{"benchmark": b, "split": s, "metric": m, "value": value} for (b, s, m), value in row.items()]
            for label, row in table.rows.items()
        }
        print(json.dumps({"rows": rows, "published": table.published}, indent=2, ensure_ascii=False))
        return
    print(markdown(summaries))
    print(f"Written to {out}: report.md, report.png")
