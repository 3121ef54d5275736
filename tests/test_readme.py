"""The README is short and true: its length, links and figures, and the pages beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from ideogram4_quant.cards.sizes import copy_bytes

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "pocket-levels.csv"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [ROOT / "README.md", *PAGES, *sorted((ROOT / "web" / "docs").glob("*.md"))]
FIRST_SCREEN = README.partition("## Then the real one")[0]

# the README's words for a row of docs/pocket-table.md, and its level
ROWS = {
    "INT8, calibrated here": ("ours: INT8 auto", "INT8 W8A8 rotated"),
    "the same for ComfyUI's own loader": ("ours: INT8 rotated, calibrated", "INT8 W8A8 rotated"),
    "OrbitQuant W8A8 (GPTQ)": ("OrbitQuant W8A8, GPTQ", "INT8 W8A8 rotated"),
    "INT8 as published (rotated)": ("W8A8 rotated", "INT8 W8A8 rotated"),
    "Q4_K, calibrated here": ("ours: Q4_K, calibrated", "Q4_K"),
    "ggml's Q4_K with imatrix": ("ggml Q4_K, imatrix", "Q4_K"),
    "Q4_K as published": ("Q4_K", "Q4_K"),
}


def test_it_is_read_in_minutes():
    assert len(README.split()) < 1200


@pytest.mark.parametrize(
    "word",
    ["W8A8", "SQNR", " dB", "ConvRot", "GPTQ", "latent", "tensor", "conditional", "guider", "bf16"],
)
def test_the_first_screen_has_no_jargon(word):
    assert word.casefold() not in FIRST_SCREEN.casefold()


def test_it_begins_with_the_two_commands_and_the_clone():
    assert "\n   git clone ADDRESS ideogram4-quant\n" in FIRST_SCREEN
    for command in ("make demo", "make test"):
        assert re.search(rf"^{command} ", README, re.M)


def strays(system: str) -> tuple[float, float]:
    """Per cent of the latents: as trained, and the worst of the models with outliers.

    SQNR is 10 log10 of energies, so the ratio of lengths is 10^(-dB / 20).
    """
    with TABLE.open(encoding="utf-8") as file:
        of = {r["model"]: float(r["sqnr"]) for r in csv.DictReader(file) if r["level"] == system}
    found = {model: 100 * 10 ** (-db / 20) for model, db in of.items()}
    return found.pop("clean"), max(found.values())


def test_it_prints_what_the_table_says():
    block = README.partition("<!-- begin near -->")[2].partition("<!-- end near -->")[0]
    row = r"^\| (.+?) \| (.+?) \| ([\d.]+) GB \| ([\d.]+) % \| ([\d.]+) % \|$"
    rows = re.findall(row, block, re.M)
    assert [name for name, *_ in rows] == list(ROWS)
    for name, _, size, *printed in rows:
        system, level = ROWS[name]
        assert size == f"{copy_bytes(level) / 1e9:.1f}", name
        wanted = [f"{percent:.1f}" for percent in strays(system)]
        assert printed == wanted, f"{name}: the table says {wanted}"


def test_what_it_calls_nearest_is_nearest():
    of = {name: strays(system) for name, (system, _) in ROWS.items()}
    eight = [of[name] for name in ROWS if "Q4_K" not in name]
    four = [of[name] for name in ROWS if "Q4_K" in name]
    assert of["OrbitQuant W8A8 (GPTQ)"][0] == min(clean for clean, _ in eight)
    assert of["INT8, calibrated here"][1] == min(worst for _, worst in eight)
    ours = of["Q4_K, calibrated here"]
    assert ours == tuple(min(column) for column in zip(*four, strict=True))


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(<?([^)>\s]+(?: [^)>]+)?)>?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_list_of_pages_has_every_page():
    listed = set(
        re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text("utf-8"))
    )
    assert listed == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("the file ends before this tensor does", "gguf_loader/reader.py"),
        ("is already quantized below the level asked for", "quant/source.py"),
        ("compute: float32", "nodes/report.py"),
        ("without guidance", "nodes/sampling_report.py"),
    ],
)
def test_troubleshooting_quotes_what_is_printed(words, file):
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert words.casefold() in page.casefold()
    assert words in (ROOT / file).read_text(encoding="utf-8")


def test_nodes_have_the_names_that_are_shown():
    """Every name in bold or italics that the README and the troubleshooting give a node."""
    shown = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("nodes/node_*.py"))
    page = README + (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for name in ("Load Ideogram 4 (quantized)", "Load LoRA for Ideogram 4"):
        assert f'display_name="{name}"' in shown
        assert f"**{name}**" in page
    assert 'display_name="Caption (Ideogram 4)"' in shown
