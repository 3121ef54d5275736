"""The document of the pocket table, from made-up runs: what is paired, kept and filled."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from ideogram4_quant.engine.compare.statistics import Interval
from ideogram4_quant.pocket.table import claims, report
from ideogram4_quant.pocket.table.models import VARIANTS
from ideogram4_quant.pocket.table.painting import PART, Painted, cases_of_part
from ideogram4_quant.pocket.table.runs import Run, RunStore
from ideogram4_quant.pocket.table.systems import SCHEMES

# System -> latent SQNR of the last step in dB on the clean model, and the share of words read.
LEVELS = {"W8A8": (30.0, 0.5), "W8A8 + smooth": (33.0, 0.5), "Q8_0": (45.0, 1.0)}


def made_up(variant: str, scheme: str, part: int) -> Run:
    spread = np.random.default_rng(part).normal(0, 1, PART)
    worse = 0 if variant == "clean" else 10
    db, share = LEVELS.get(scheme, (None, 1.0))
    exact = [float(i < share * PART) for i in range(PART)]
    scores = {"ocr_exact": exact, "ocr_distance": [1 - e for e in exact]}
    steps: list[list[float]] = []
    if db is not None:
        scores |= {"psnr": [db + 1.0] * PART, "ssim": [0.9] * PART}
        steps = [[60.0, db - worse + float(x)] for x in spread]
    return Run(variant, scheme, part, 10_000_000, 0.2, ["X"] * PART, scores, steps)


@pytest.fixture
def store(tmp_path) -> RunStore:
    store = RunStore(tmp_path / "work")
    painted = Painted([Image.new("RGB", (128, 64))] * PART, torch.zeros(PART, 2, 2, 2), 0.0)
    for part in (0, 1):
        for variant in ("clean", "tokens"):
            for scheme in ("BF16", *LEVELS):
                if (scheme, part) == ("Q8_0", 1):
                    continue
                run = made_up(variant, scheme, part)
                key = f"{variant}-{scheme}-{part}".replace(" ", "")
                store.keep(key, run, painted)
                store.enter(key, run)
    return store


def document(tmp_path, names=("clean", "tokens", "claims", "conditions")):
    marks = "".join(f"<!-- begin {n} -->\nold\n<!-- end {n} -->\n\nProse on {n}.\n" for n in names)
    file = tmp_path / "docs" / "table.md"
    (file.parent / "images").mkdir(parents=True)
    file.write_text(f"# Title\n{marks}", encoding="utf-8")
    return file


def test_a_part_that_one_row_lacks_is_left_out_of_all(store):
    runs = list(store.newest().values())
    assert report.common_parts(runs) == [0]
    assert report.common_parts([r for r in runs if r.scheme != "Q8_0"]) == [0, 1]
    comparison = report.comparison_of(VARIANTS[0], runs, [0])
    assert [s.name for s in comparison.systems] == ["BF16", "W8A8", "W8A8 + smooth", "Q8_0"]
    assert len(comparison.cases) == PART
    assert "NF4: not run" in comparison.gaps


def test_pairs_are_differences_of_the_same_pictures(store):
    runs = list(store.newest().values())
    comparison = report.comparison_of(VARIANTS[0], runs, [0])
    table = claims.claims_table({"clean": comparison})
    (line,) = [x for x in table.splitlines() if x.startswith("| SmoothQuant improves")]
    assert "agrees: +3.0 [3.0, 3.0] dB" in line  # the spread between prompts cancels
    (line,) = [x for x in table.splitlines() if x.startswith("| naive W8A8 loses text")]
    assert "agrees: +50.0 [" in line
    assert "FP8" not in table  # nothing of a row that was not run


def test_a_verdict_follows_from_the_interval_alone():
    assert claims.verdict(Interval(1.0, 0.5, 1.5, 9)) == "agrees"
    assert claims.verdict(Interval(-1.0, -1.5, -0.5, 9)) == "**does not**"
    assert claims.verdict(Interval(1.0, -0.1, 2.0, 9)) == "cannot be told"
    names = {scheme.name for scheme in SCHEMES}
    assert all({claim.name, claim.other} <= names for claim in claims.CLAIMS)


def test_the_document_is_filled_and_its_prose_stays(store, tmp_path):
    file = document(tmp_path)
    files = report.write_report(store, file)
    assert all(f.is_file() for f in files)
    text = file.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("Prose on") == 4
    assert "| W8A8 | 10.0 | 31.00 | 0.9000 |" in text
    assert "32 of the 64 held-out prompts, 1 seed each (32 pictures a row)" in text
    rows = list(csv.DictReader(io.StringIO(file.with_suffix(".csv").read_text())))
    assert {row["model"] for row in rows} == {"clean", "tokens"}
    assert rows[0]["system"] == "BF16"
    again = text
    report.write_report(store, file)
    assert file.read_text(encoding="utf-8") == again


def test_a_document_without_a_place_is_an_error(store, tmp_path):
    with pytest.raises(report.DocumentError, match="tokens"):
        report.write_report(store, document(tmp_path, ("clean", "claims", "conditions")))


def test_the_committed_document_has_every_place():
    from ideogram4_quant.pocket.table.__main__ import DOCUMENT

    text = DOCUMENT.read_text(encoding="utf-8")
    levels = ("levels conditions", "levels", "pairs", "peers", "short")
    for name in (*(v.name for v in VARIANTS), "claims", "conditions", *levels):
        assert text.count(f"<!-- begin {name} -->") == 1
        assert text.count(f"<!-- end {name} -->") == 1


def test_cases_of_a_run_are_those_of_its_part():
    assert [c.text for c in cases_of_part(0)] == [c.text for c in cases_of_part(2)]
    assert {c.seed for c in cases_of_part(0)}.isdisjoint({c.seed for c in cases_of_part(2)})
