"""Pairs of two levels on the pocket model: which copy takes a loss better, and why.

    python -m ideogram4_quant.pocket.pairs --work pocket-table

About a quarter of an hour of a core with 32 captions. A run that is broken off goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..table.models import VARIANTS, Variant
from ..table.painting import PART, cases_of_part
from .measured import PairTable
from .report import (
    Row,
    Rows,
    as_csv,
    cause_table,
    gain_table,
    lower_table,
    same_bytes_table,
    write_document,
)
from .settings import SETTINGS, WHOLE, Setting, settings_of
from .walk import batches
from .why import GAIN_EVERY

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "pairs.md"
LEVEL = "Q4_K"
#: Fewer captions, to save time.
_FEWER = {"tokens": 16}
#: Causes are ratios of energies on one path, which captions hardly change.
_CAUSE_CAPTIONS, _GAIN_CAPTIONS = 8, 4
_GAINS = tuple(s for s in SETTINGS if s.guidance == WHOLE.guidance)


def _rows(table: PairTable) -> list[Row]:
    parts = batches(table.cases)
    jobs = list(table.rows())
    found = []
    with tqdm(jobs, desc=table.variant.name, unit="pair") as bar:
        for setting, pair in bar:
            values = tuple(table.decibels(setting, pair, parts))
            size = table.copies.nbytes(*pair)
            found.append(Row(table.variant.name, setting, pair, size, values))
    return found


@torch.inference_mode()
def make(variants: Sequence[Variant], work: Path, captions: int, document: Path | None) -> None:
    """Measures what is not known yet; writes the document where one is given."""
    cases = cases_of_part(0)[:captions]
    tables = [PairTable(v, cases[: _FEWER.get(v.name, PART)], work) for v in variants]
    rows = Rows(row for table in tables for row in _rows(table))
    causes: dict[tuple[str, Setting], dict[str, list[float]]] = {}
    gains: dict[str, dict[str, list[float]]] = {}
    for variant in variants:
        table = PairTable(variant, cases[:_CAUSE_CAPTIONS], work)
        for setting in settings_of(variant.disease is not None):
            causes[variant.name, setting] = table.causes(LEVEL, setting)
    if VARIANTS[0] in variants:
        clean = PairTable(VARIANTS[0], cases[:_GAIN_CAPTIONS], work)
        gains = {setting.name: clean.gains(LEVEL, setting) for setting in _GAINS}
    if document is not None:
        parts = {
            "lower": lower_table(rows, VARIANTS[0].name),
            "same bytes": same_bytes_table(rows),
            "causes": cause_table(causes, rows),
            "gains": gain_table(gains, GAIN_EVERY),
        }
        write_document(document, parts, as_csv(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("pocket-table"), metavar="DIR")
    parser.add_argument("--captions", type=int, default=PART, help=f"at most {PART}")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=None,
        help="write the document (default: when all models are measured)",
    )  # fmt: skip
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="MD")
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual = [v for v in VARIANTS if not v.stress]
    chosen = [v for v in usual if not args.models or v.name in args.models]
    report = args.models is None if args.report is None else args.report
    make(chosen, args.work, args.captions, args.document if report else None)


if __name__ == "__main__":
    main()
