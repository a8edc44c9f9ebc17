"""`report`: one page of HTML about a run, an evaluation, a sweep, or a data set."""

from pathlib import Path
from typing import Any

from img2prompt.commands.arguments import typed
from img2prompt.commands.settings import compose
from img2prompt.commands.sources import find
from img2prompt.commands.table import by_text
from img2prompt.files import write_text
from img2prompt.report.data_set import data_set_report
from img2prompt.report.evaluation import write_evaluation_report
from img2prompt.report.run import write_run_report
from img2prompt.report.sweep import write_sweep_report
from img2prompt.training.pairs import select


def main(arguments: list[str]) -> None:
    report(**compose("report", arguments), overrides=[*map(typed, arguments)])


def report(
    run: str | None,
    evaluation: str | None,
    sweep_dir: str | None,
    out: str | None,
    data: dict[str, Any],
    overrides: list[str] | None = None,
) -> None:
    """Writes the page of exactly one of the four; that of a data set has the `overrides` that gave its settings.
    ValueError says what is wrong.
    """
    is_data = data["root"] is not None or bool(data.get("sources")) or data["name"] == "demo"
    if sum(one is not None for one in (run, evaluation, sweep_dir)) + is_data != 1:
        raise ValueError(
            "give exactly one of run=DIR, evaluation=DIR, sweep_dir=DIR, or a data set: data=folder data.root=DIR"
        )
    goal = Path(out) if out is not None else None
    if goal is not None and goal.is_dir():
        raise ValueError(f"out={out}: a folder; give a file, such as {goal / 'report.html'}")
    if goal is not None and goal.suffix not in (".html", ".htm"):
        raise ValueError(f"out={out}: the ending must be .html")
    if run is not None:
        written = write_run_report(Path(run), goal)
    elif evaluation is not None:
        written = write_evaluation_report(Path(evaluation), goal)
    elif sweep_dir is not None:
        written = write_sweep_report(Path(sweep_dir), goal)
    else:
        written = _of_data(data, goal or Path("report.html"), overrides)
    print(f"report: {written}")


def _of_data(data: dict[str, Any], goal: Path, overrides: list[str] | None) -> Path:
    table = by_text(data, find(data))
    samples = select(table.samples, table.left_out, data["count"], least=1)
    if len(samples) < len(table.samples):
        table.lineage.add("data.count", samples)
    where = data["root"] if data["root"] is not None else data["name"]
    write_text(goal, data_set_report(f"Data {where}", samples, table.left_out, table.lineage, overrides))
    return goal
