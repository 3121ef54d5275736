"""Everything a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from .cases import Case
from .page import write_page
from .plots import fidelity_against_memory, sqnr_along_trajectory
from .results import Comparison, write_json
from .sheet import contact_sheet, difference_map
from .tables import comma_separated, markdown

Picture = Callable[[str, Case], "Image.Image | None"]

#: Rows of the contact sheet: enough to look at, small enough for a picture viewer.
SHEET_CASES = 12


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
    sheet(comparison, picture).save(out / "contact-sheet.png")
    files += [*plots, out / "contact-sheet.png"]
    if differences:
        sheet(comparison, picture, differences=True).save(out / "differences.png")
        files.append(out / "differences.png")
    write_page(comparison, out / "report.html", picture, plots=plots)
    return [*files, out / "report.html"]


def sheet(comparison: Comparison, picture: Picture, *, differences: bool = False) -> Image.Image:
    """Prompts x systems, the reference first; with ``differences``, its distance maps instead."""
    names = [comparison.reference]
    names += [s.name for s in comparison.systems if s.name != comparison.reference]
    cases = comparison.cases[:SHEET_CASES]

    def cell(row: int, column: int) -> tuple[Image.Image | None, str]:
        case, name = cases[row], names[column]
        image = picture(name, case)
        if image is None:
            return None, "no picture"
        if differences and column:
            wanted = picture(comparison.reference, case)
            if wanted is None or wanted.size != image.size:
                return None, "nothing to compare with"
            image = difference_map(wanted, image)
        return image, _caption(comparison, name, case)

    rows = [f"{case.text or case.prompt_id} / {case.seed}" for case in cases]
    title = "Differences x 8" if differences else "Same prompt, same seed"
    return contact_sheet(rows, names, cell, title=title)


def _caption(comparison: Comparison, name: str, case: Case) -> str:
    values = comparison.system(name).values
    parts = []
    if case.key in values.get("psnr", {}):
        parts.append(f"{values['psnr'][case.key]:.1f} dB")
    if case.key in values.get("ocr_exact", {}):
        parts.append("read" if values["ocr_exact"][case.key] else "not read")
    return ", ".join(parts)
