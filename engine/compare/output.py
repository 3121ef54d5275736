"""Everything a comparison leaves in its folder."""

from __future__ import annotations

from pathlib import Path

from ...files.new_file import make_folder, replaced
from .page import write_page
from .plots import fidelity_against_memory, sqnr_along_trajectory
from .results import Comparison, write_json
from .sheet import Picture, comparison_sheet
from .tables import comma_separated, markdown


def write_output(
    comparison: Comparison, out: Path, picture: Picture, *, differences: bool = False
) -> list[Path]:
    """Write tables, plots, contact sheet and page into ``out``; returns the files.

    ``results.json``, ``results.md``, ``results.csv``, ``report.html``, ``contact-sheet.png``,
    ``fidelity-memory.png``, ``trajectory.png`` (the plots where there is something to plot).
    """
    make_folder(out)
    write_json(comparison, out / "results.json")
    for name, text in (
        ("results.md", markdown(comparison)),
        ("results.csv", comma_separated(comparison)),
    ):
        with replaced(out / name) as part:
            part.write_text(text, encoding="utf-8")
    files = [out / name for name in ("results.json", "results.md", "results.csv")]
    plots = []
    if fidelity_against_memory(comparison, out / "fidelity-memory.png"):
        plots.append(out / "fidelity-memory.png")
    if sqnr_along_trajectory(comparison, out / "trajectory.png"):
        plots.append(out / "trajectory.png")
    sheets = {"contact-sheet.png": False} | ({"differences.png": True} if differences else {})
    files += plots
    for name, difference in sheets.items():
        with replaced(out / name) as part:
            comparison_sheet(comparison, picture, differences=difference).save(part)
        files.append(out / name)
    write_page(comparison, out / "report.html", picture, plots=plots)
    return [*files, out / "report.html"]
