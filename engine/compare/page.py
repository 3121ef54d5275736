"""One self-contained HTML page: table, plots and pictures, opens from disk without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

from PIL import Image

from ...files.new_file import replaced
from .cases import Case
from .metrics import METRICS
from .results import Cell, Comparison, extent
from .sheet import Picture, remark
from .statistics import METHOD, UNCORRECTED
from .tables import COLUMNS, cell_text, known_columns

_LONGEST_SIDE = 512

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .6rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap;
  font-size: .87rem; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td.worse { color: #c0392b; } td.better { color: #1e8449; } td.gap { opacity: .5; }
tr.reference td { background: var(--soft); font-weight: 600; }
.pictures td, .pictures th { vertical-align: top; text-align: center; }
.pictures img { width: 256px; height: auto; border-radius: 3px; }
.pictures img[src^="data:image/png"] { image-rendering: pixelated; }
.pictures .score { font-size: .8rem; opacity: .75; }
.pictures .prompt { max-width: 22rem; white-space: normal; overflow-wrap: anywhere;
  font-size: .8rem; text-align: left; }
img.plot { max-width: 100%; background: #fff; border-radius: 4px; }
"""


def write_page(
    comparison: Comparison,
    path: Path,
    picture: Picture,
    *,
    plots: list[Path],
    title: str = "Levels side by side",
    most_cases: int = 24,
) -> None:
    """Write the page; ``picture(system, case)`` gives a picture or ``None`` (a marked gap)."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(comparison.systems)} systems, {extent(comparison)}; "
        f"reference: <b>{html.escape(comparison.reference)}</b>. Means with 95 % "
        f"intervals over prompts ({html.escape(METHOD)}). Red and green: the paired difference to "
        f"the reference excludes zero. {UNCORRECTED}</p>",
        _table(comparison),
        *(_plot(file) for file in plots),
        _pictures(comparison, picture, most_cases),
        _settings(comparison),
        "</html>",
    ]
    with replaced(path) as part:
        part.write_text("\n".join(parts), encoding="utf-8")


def _table(comparison: Comparison) -> str:
    metrics = comparison.metrics()
    known = known_columns(comparison)
    labels = ["system", *known, *(METRICS[m].label for m in metrics)]
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    rows = []
    for system in comparison.systems:
        cells = [(comparison.cell(system, m), METRICS[m].digits) for m in metrics]
        marked = " class=reference" if system.name == comparison.reference else ""
        first = "".join(f"<td>{html.escape(COLUMNS[c](system))}</td>" for c in known)
        rows.append(
            f"<tr{marked}><td>{html.escape(system.name)}</td>{first}"
            f"{''.join(_cell(*cell) for cell in cells)}</tr>"
        )
    gaps = "".join(f"<li>{html.escape(gap)}</li>" for gap in comparison.gaps)
    return (
        f"<h2>Table</h2><div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"
        + (f"<p>Gaps:</p><ul>{gaps}</ul>" if gaps else "")
    )


def _cell(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "<td class=gap>n/a</td>"
    kind = cell.verdict if cell.verdict in ("better", "worse") else ""
    return f"<td class='{kind}'>{html.escape(cell_text(cell, digits))}</td>"


def _plot(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<p><img class=plot alt='{html.escape(path.stem)}' src='data:image/png;base64,{data}'></p>"
    )


def _pictures(comparison: Comparison, picture: Picture, most: int) -> str:
    names = [system.name for system in comparison.systems]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for case in comparison.cases[:most]:
        cells = "".join(_thumbnail(comparison, name, case, picture) for name in names)
        asked = f"<b>{html.escape(case.text)}</b><br>" if case.text else ""
        rows.append(
            f"<tr><td class=prompt>{asked}seed {case.seed}<details><summary>prompt</summary>"
            f"{html.escape(case.prompt)}</details></td>{cells}</tr>"
        )
    left = len(comparison.cases) - most
    more = f"<p>{left} more cases are not shown; the table counts them.</p>" if left > 0 else ""
    return (
        f"<h2>Pictures</h2><div class=scroll><table class=pictures><tr><th>case</th>{head}</tr>"
        f"{''.join(rows)}</table></div>{more}"
    )


def _thumbnail(comparison: Comparison, name: str, case: Case, picture: Picture) -> str:
    image = picture(name, case)
    if image is None:
        return "<td class=gap>no picture</td>"
    size = f"width={image.width} height={image.height}"
    label = html.escape(f"{name}, seed {case.seed}")
    return (
        f"<td><img {size} alt='{label}' src='{_data_url(image)}'>"
        f"<div class=score>{html.escape(remark(comparison, name, case))}</div></td>"
    )


def _data_url(image: Image.Image) -> str:
    """Small pictures pixel by pixel; larger ones reduced, so that a page of 200 stays in 20 MB."""
    buffer = io.BytesIO()
    if max(image.size) <= _LONGEST_SIDE:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        reduced = image.copy()
        reduced.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        reduced.save(buffer, format="WEBP", quality=90)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _settings(comparison: Comparison) -> str:
    text = html.escape(json.dumps(comparison.settings, indent=1, default=str))
    summary = "<summary>what made this page</summary>"
    return f"<h2>Settings</h2><details>{summary}<pre>{text}</pre></details>"
