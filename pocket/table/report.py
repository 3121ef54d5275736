"""From runs to the document: tables, plots, contact sheet. Its prose is written by hand and stays.

The document holds ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` around what is made here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ...engine.compare.cases import Case
from ...engine.compare.results import Comparison, SystemScores
from ...engine.compare.statistics import METHOD
from ...engine.compare.tables import comma_separated, gap_lines, table
from ...engine.sheet import Row, contact_sheet
from ...errors import Ideogram4QuantError
from ...quant.provenance import hash_files
from ...version import __version__
from ..data import HELD_OUT
from ..paths import dit_path
from .claims import claims_table
from .levels import (
    FIELD,
    MODELS,
    OURS,
    levels_csv,
    levels_table,
    pairs_table,
    peers_table,
    points_of,
    shared_parts,
    short_table,
)
from .models import COPIES, VARIANTS, Variant
from .painting import cases_of_part
from .runs import Run, RunStore
from .systems import LADDER, PROTECTED, REFERENCE, SCHEMES

#: Systems that the contact sheet shows, and how many prompts.
SHEET = (REFERENCE, "W8A8", "W8A8 + smooth", "W8A8 + protect", "W8A8 rotated", "ours: INT8 auto")
SHEET_PROMPTS = 2


#: Systems of the study of treatments: all on the same pictures, under stress too.
STUDY = frozenset(scheme.name for scheme in SCHEMES if scheme.study)


class DocumentError(Ideogram4QuantError, ValueError):
    """A document without the places that the report fills."""


def common_parts(runs: Sequence[Run]) -> list[int]:
    """The parts of which every system of the study and model that was run at all has a run."""
    parts: dict[tuple[str, str], set[int]] = {}
    for run in (run for run in runs if run.scheme in STUDY):
        parts.setdefault((run.variant, run.scheme), set()).add(run.part)
    return sorted(set.intersection(*parts.values())) if parts else []


def comparison_of(variant: Variant, runs: Sequence[Run], parts: Sequence[int]) -> Comparison:
    """The study's runs of one model as a comparison, in the order of the systems."""
    order = [s.name for s in SCHEMES if s.study and (s.stress or not variant.stress)]
    cases = [case for part in parts for case in cases_of_part(part)]
    systems, gaps = [], []
    for name in order:
        own = [r for r in runs if (r.variant, r.scheme) == (variant.name, name) and r.part in parts]
        if own:
            systems.append(_scores(own))
        else:
            gaps.append(f"{name}: not run")
    return Comparison(REFERENCE, cases, systems, gaps)


def _scores(runs: Sequence[Run]) -> SystemScores:
    scores = SystemScores(runs[0].scheme, "", runs[0].bytes)
    steps: list[list[float]] = []
    for run in runs:
        cases = cases_of_part(run.part)
        for metric, values in run.scores.items():
            for case, value in zip(cases, values, strict=True):
                scores.set(metric, case.key, value)
        for case, along in zip(cases, run.steps, strict=False):
            scores.set("latent_sqnr", case.key, along[-1])
        steps += run.steps
    scores.steps = [sum(column) / len(steps) for column in zip(*steps, strict=True)]
    return scores


def ladder(comparison: Comparison) -> list[tuple[int, SystemScores]]:
    """(linears of each copy kept in bf16, scores) by rising number."""
    names = {0: "W8A8", PROTECTED: "W8A8 + protect"} | {k: f"W8A8, {k} protected" for k in LADDER}
    there = {system.name: system for system in comparison.systems}
    return [(k, there[name]) for k, name in sorted(names.items()) if name in there]


def conditions(parts: Sequence[int]) -> str:
    """What the tables of the study were made from, in a sentence or two."""
    seeds: dict[str, set[int]] = {}
    for case in (case for part in parts for case in cases_of_part(part)):
        seeds.setdefault(case.prompt, set()).add(case.seed)
    counts = sorted({len(s) for s in seeds.values()})
    many = " or ".join(map(str, counts))
    plural = "s" if counts != [1] else ""
    return (
        f"{len(seeds)} of the {len(HELD_OUT)} held-out prompts, {many} seed{plural} each "
        f"({sum(map(len, seeds.values()))} pictures a row), {_made_with()}"
    )


def levels_conditions() -> str:
    """What the table of levels was made from."""
    return (
        f"The {len(HELD_OUT)} held-out prompts or half of them, one seed or two, as each row says, "
        f"{_made_with()}"
    )


def _made_with() -> str:
    hashes = hash_files([dit_path(short) for short in COPIES.values()])
    weights = ", ".join(file.sha256[:12] for file in hashes)
    return (
        f"Default preset, fp32 activations, ideogram4-quant {__version__}; intervals: {METHOD}; "
        f"SHA-256 of the two copies: {weights}."
    )


def sheet(store: RunStore, part: int) -> Image.Image:
    """Some prompts of every model across the systems of :data:`SHEET`."""
    newest = store.newest()
    cases = cases_of_part(part)[:SHEET_PROMPTS]
    rows = []
    for variant in VARIANTS:
        found = {
            run.scheme: (run, store.painted(key).pictures)
            for key, run in newest.items()
            if (run.variant, run.part) == (variant.name, part) and run.scheme in SHEET
        }
        rows += [_sheet_row(variant, i, case, found) for i, case in enumerate(cases) if found]
    return contact_sheet(rows, SHEET)


def _sheet_row(
    variant: Variant, i: int, case: Case, found: Mapping[str, tuple[Run, Sequence[Image.Image]]]
) -> Row:
    pictures, remarks = [], []
    for name in SHEET:
        run, painted = found.get(name, (None, None))
        pictures.append(None if painted is None else painted[i])
        right = run is not None and run.scores["ocr_exact"][i] == 1.0
        remarks.append("" if run is None or right else f"read: {run.read[i] or 'nothing'}")
    return Row(case.text or "", [variant.name], pictures, remarks)


def fill(document: str, parts: Mapping[str, str]) -> str:
    """The document with the text between its marks replaced; DocumentError for a mark not there."""
    for name, text in parts.items():
        mark = re.compile(
            rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S
        )
        document, count = mark.subn(lambda m, t=text: f"{m[1]}{t.rstrip()}\n{m[2]}", document)
        if count != 1:
            raise DocumentError(f"the document has no place for {name!r}", found=count, needed=1)
    return document


def write_levels(store: RunStore, document: Path) -> list[Path]:
    """Fill the document's tables of levels and peers; write their figures and plot beside it."""
    from .plots import levels

    runs = list(store.newest().values())
    names = [level.name for level in (*OURS, *FIELD)]
    comparisons = {}
    for model in MODELS:
        own = [run for run in runs if run.variant == model.name]
        systems = [
            _scores(of)
            for name in (REFERENCE, *names)
            if (of := [r for r in own if r.scheme == name and r.part in shared_parts(name, runs)])
        ]
        cases = [case for part in shared_parts(REFERENCE, runs) for case in cases_of_part(part)]
        comparisons[model.name] = Comparison(REFERENCE, cases, systems)
    if any(len(comparison.systems) < 2 for comparison in comparisons.values()):
        raise DocumentError("no level is measured on all three models", file=store.folder)
    texts = {
        "levels": levels_table(comparisons, runs),
        "pairs": pairs_table(comparisons),
        "short": short_table(comparisons, runs),
        "peers": peers_table(runs),
        "levels conditions": levels_conditions(),
    }
    document.write_text(fill(document.read_text(encoding="utf-8"), texts), encoding="utf-8")
    figures = document.with_name("pocket-levels.csv")
    figures.write_text(levels_csv(comparisons, runs), encoding="utf-8")
    plot = document.parent / "images" / "pocket-levels.png"
    plot.parent.mkdir(exist_ok=True)
    levels(points_of(comparisons, runs), plot)
    return [document, figures, plot]


def write_report(store: RunStore, document: Path) -> list[Path]:
    """Fill the document's tables of the study, write its plots, sheet and CSV beside it; returns
    the files."""
    from .plots import fidelity, ladders, trajectories

    runs = list(store.newest().values())
    parts = common_parts(runs)
    if not parts:
        raise DocumentError("no part of the table is complete", file=store.folder)
    comparisons = {v.name: comparison_of(v, runs, parts) for v in VARIANTS}
    comparisons = {name: c for name, c in comparisons.items() if len(c.systems) > 1}
    texts = {name: "\n".join([table(c), "", *gap_lines(c)]) for name, c in comparisons.items()}
    texts |= {"conditions": conditions(parts), "claims": claims_table(comparisons)}
    document.write_text(fill(document.read_text(encoding="utf-8"), texts), encoding="utf-8")
    images = document.parent / "images"
    usual = {
        v.name: comparisons[v.name] for v in VARIANTS if not v.stress and v.name in comparisons
    }
    fidelity(usual, images / "pocket-fidelity.png")
    trajectories(usual, images / "pocket-trajectories.png")
    ladders({name: ladder(c) for name, c in usual.items()}, images / "pocket-ladder.png")
    sheet(store, parts[0]).save(images / "pocket-sheet.png", optimize=True)
    figures = document.with_suffix(".csv")
    figures.write_text(_csv(comparisons), encoding="utf-8")
    names = ("fidelity", "trajectories", "ladder", "sheet")
    return [document, figures, *(images / f"pocket-{name}.png" for name in names)]


def _csv(comparisons: Mapping[str, Comparison]) -> str:
    lines = []
    for name, comparison in comparisons.items():
        head, *rows = comma_separated(comparison).splitlines()
        if not lines:
            lines.append(f"model,{head}")
        lines += [f'"{name}",{row}' for row in rows]
    return "\n".join(lines) + "\n"
