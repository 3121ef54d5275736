"""Everything a comparison leaves in its folder."""

from __future__ import annotations

from pathlib import Path

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
    out.mkdir(parents=True, exist_ok=True)
    write_json(comparison, out / "results.json")
    (out / "results.md").write_text(markdown(comparison), encoding="utf-8")
    (out / "results.csv").write_text(comma_separated(comparison), encoding="utf-8")
    files = [out / name for name in ("results.json", "results.md", "results.csv")]
    plots = []
    if fidelity_against_memory(comparison, out / "fidelity-memory.png"):
        plots.append(out / "fidelity-memory.png")
    if sqnr_along_trajectory(comparison, out / "trajectory.png"):
        plots.append(out / "trajectory.png")
    comparison_sheet(comparison, picture).save(out / "contact-sheet.png")
    files += [*plots, out / "contact-sheet.png"]
    if differences:
        comparison_sheet(comparison, picture, differences=True).save(out / "differences.png")
        files.append(out / "differences.png")
    write_page(comparison, out / "report.html", picture, plots=plots)
    return [*files, out / "report.html"]
