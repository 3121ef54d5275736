"""docs/cards.md: the measured cards, held against the model, and the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...cards import block, known, tables
from ...cards.block import How
from . import document as documents
from .document import SUMS_ALONE

Documents = Mapping[str, Mapping[str, Any]]

HEAD = """# Cards

<!-- made by `python -m ideogram4_quant card --render docs/cards --markdown docs/cards.md` -->

## Measured
"""

SEND = """
## Measure yours

    python -m ideogram4_quant card --out my-card.json

takes less than six minutes, downloads nothing and needs torch and Triton; close what else uses the
card. Each part has a time of its own, and the file is whole after each, so a run that was cut short
is worth sending too. It holds the card's name, versions of drivers and libraries, and figures; no
host name, no user name, no paths. Put it into `docs/cards/` in a pull request, named after the card
and the system (`rtx-3090-windows.json`), or attach it to an issue. `card --render docs/cards` makes
this page's tables of all files there.
"""

MODELLED = """Nothing here was measured: bytes and operations against the makers' figures and the
stated shares (`cards/`). Seconds from the queue to the PNG, 1024 px, the Quality preset (48 steps
of both copies); the last column is one branch at 8 steps. *q, k*: their norm and rotary embedding
in one pass; *q, k eager*: the whole picture where torch runs them op by op. *moves*: what transfers
to the card take that nothing hides; streamed weights move while the block before them computes, in
brackets where they do not. `Q8_0` is decoded to 16 bits, as `auto` has it; *as int8* is the choice
`w8a8`."""

LAUNCHES = """One block at 512 px (1024 tokens), milliseconds: what the card works on it, and what
the host needs to launch it op by op. Where the card takes longer, launching is hidden and a CUDA
graph gains nothing."""

_LEVEL = "INT8 W8A8 rotated"
_GAP = "-"


def page(found: Documents) -> str:
    """The whole page, of the files by name."""
    lines = [HEAD, *_measured(found), SEND, *_model()]
    return "\n".join(lines).rstrip() + "\n"


def _measured(found: Documents) -> Iterator[str]:
    real = {name: d for name, d in found.items() if not d["reduced"]}
    if not real:
        yield "No card has been measured yet: `docs/cards/` holds no file. All below is modelled."
    else:
        yield from _summary(real)
        yield from _unfinished(real)
        yield from _against_the_model(real)
    for name in found.keys() - real.keys():
        yield f"\n{_safe(name)}: small sizes, to try the command; no measure of a card.\n"


def _summary(found: Documents) -> Iterator[str]:
    head = (
        "card", "torch, Triton, comfy-kitchen", "int8, Top/s", "bf16, Top/s", "memory, GB/s",
        "best tile of int8", "block, INT8: fused, plain, ms", "block, Q4_K, ms",
        "attention 1024, 2048 px, ms", "step, INT8, s", "step, Q4_K, s", "peak, GB",
        "`torch.compile`, fused", "selftest", "file",
    )  # fmt: skip
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " --- |" * (len(head) - 1)
    for name, document in found.items():
        yield "| " + " | ".join([*_cells(document), _safe(name)]) + " |"
    yield ""


def _cells(d: Mapping[str, Any]) -> Iterator[str]:
    about = _first(documents.rows(d, "device"), what="about")
    yield _safe(about.get("device", "unknown"))
    yield _safe(", ".join(str(about.get(k, _GAP)) for k in ("torch", "triton", "comfy_kitchen")))
    rates = {
        r["ceiling"]: r.get("per_second") for r in documents.rows(d, "device") if "ceiling" in r
    }
    yield _number(rates.get("int8"), 1e12)
    yield _number(rates.get("bf16"), 1e12)
    yield _number(rates.get("memory"), 1e9)
    products = [r for r in documents.rows(d, "tiles") if r.get("way") != SUMS_ALONE]
    shares = [r["of_ceiling"] for r in products if _is(r.get("of_ceiling"))]
    yield f"{max(shares):.0%}" if shares else _GAP
    yield ", ".join(_block(d, _LEVEL, way) for way in ("fused", "plain"))
    yield ", ".join(_block(d, "Q4_K", way) for way in ("fused", "plain"))
    yield ", ".join(_attention(d))
    steps = [r for r in documents.rows(d, "step") if _is(r.get("scaled_seconds"))]
    for level in (_LEVEL, "Q4_K"):
        yield _step([r for r in steps if r.get("level") == level])
    peaks = [r["peak_gb"] for r in steps if _is(r.get("peak_gb"))]
    yield _number(max(peaks, default=None))
    times = [_first(documents.rows(d, "compile"), way="fused", compile=on) for on in ("off", "on")]
    off, on = (row.get("ms") for row in times)
    yield f"{off / on:.2f} x" if _is(off) and _is(on) and on else _GAP
    tests = documents.rows(d, "selftest")
    failed = sum("failed" in row for row in tests)
    passed = sum(row["passed"] for row in tests if _is(row.get("passed")))
    yield f"{passed} passed, {failed} FAILED" if tests else _GAP


def _block(d: Mapping[str, Any], level: str, way: str) -> str:
    return _number(_first(documents.rows(d, "block"), level=level, way=way).get("ms"))


def _attention(d: Mapping[str, Any]) -> Iterator[str]:
    """The fastest at each token count, with its name."""
    rows = [r for r in documents.rows(d, "attention") if _is(r.get("ms")) and _is(r.get("tokens"))]
    for tokens in sorted({r["tokens"] for r in rows}):
        best = min((r for r in rows if r["tokens"] == tokens), key=lambda r: r["ms"])
        yield f"{_number(best['ms'])} ({_safe(best.get('way', ''))})"


def _step(rows: list[Mapping[str, Any]]) -> str:
    """The fastest; where memory had room for some layers only, scaled, and said so."""
    if not rows:
        return _GAP
    best = min(rows, key=lambda r: r["scaled_seconds"])
    whole = best.get("layers") == best.get("of")
    part = "" if whole else f" ({_number(best.get('layers'))} layers, scaled)"
    return f"{_number(best['scaled_seconds'])} ({_safe(best.get('attention', ''))}){part}"


def _unfinished(found: Documents) -> Iterator[str]:
    for name, d in found.items():
        for stage in d["stages"]:
            if stage["status"] != documents.OK:
                note = f": {_safe(stage['note'])}" if stage["note"] else ""
                yield f"- {_safe(name)}, {_safe(stage['name'])}: {stage['status']}{note}"
    yield ""


# ---- measured against modelled


def _against_the_model(found: Documents) -> Iterator[str]:
    yield "### Against the model\n"
    yield "Measured over modelled; above 1 the card is slower than the model has it.\n"
    yield "| card | of what | measured, ms | modelled, ms | measured / modelled |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for name, d in found.items():
        device = str(_first(documents.rows(d, "device"), what="about").get("device", ""))
        card = known.find(device)
        if card is None:
            yield f"| {_safe(device)} ({_safe(name)}) | not among the cards of the model | | | |"
            continue
        for what, measured, modelled in compared(d, card):
            ratio = measured / modelled
            figures = f"{1e3 * measured:.2f} | {1e3 * modelled:.2f} | {ratio:.2f}"
            yield f"| {card.name} | {_safe(what)} | {figures} |"
    yield ""


def compared(d: Mapping[str, Any], card: known.Card) -> Iterator[tuple[str, float, float]]:
    """(of what, measured seconds, modelled seconds) of everything that both know."""
    yield from _products(d, card)
    for row in documents.rows(d, "block"):
        level, tokens = row.get("level"), row.get("tokens")
        if not _is(row.get("ms")) or not _is(tokens) or level not in _modelled_levels():
            continue
        how = How(fused=row.get("way") == "fused", heads_fused=row.get("heads") == "fused")
        modelled = block.block_seconds(card, level, int(tokens), how).total
        yield f"block, {level}, {row.get('way')}, {int(tokens)} tokens", row["ms"] / 1e3, modelled
    for row in documents.rows(d, "attention"):
        attention = {"sdpa": "flash", "int8": "int8"}.get(str(row.get("way")))
        if attention and _is(row.get("ms")) and _is(row.get("tokens")):
            modelled = block.attention_seconds(card, int(row["tokens"]), How(attention=attention))
            yield f"attention, {row['way']}, {int(row['tokens'])} tokens", row["ms"] / 1e3, modelled
    for row in documents.rows(d, "step"):
        counts = [row.get("conditional_tokens"), row.get("unconditional_tokens")]
        level, known_level = row.get("level"), row.get("level") in _modelled_levels()
        if not known_level or not _is(row.get("scaled_seconds")) or not all(map(_is, counts)):
            continue
        attention = "int8" if row.get("attention") == "int8" else "flash"
        how = How(attention=attention, heads_fused=row.get("heads") == "fused")
        once = sum(block.block_seconds(card, level, int(count), how).total for count in counts)
        yield f"step, {level}, {row.get('attention')}", row["scaled_seconds"], block.LAYERS * once


def _products(d: Mapping[str, Any], card: known.Card) -> Iterator[tuple[str, float, float]]:
    """Each product of a block by the fastest way that gives scaled outputs."""
    best: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    for row in documents.rows(d, "tiles"):
        if _is(row.get("ms")) and all(_is(row.get(name)) for name in "mnk"):
            shape = int(row["m"]), int(row["n"]), int(row["k"])
            scaled = row.get("way") != SUMS_ALONE
            if scaled and (shape not in best or row["ms"] < best[shape]["ms"]):
                best[shape] = row
    for (m, n, k), row in best.items():
        if (n, k) in block.LINEARS.values():
            what = f"product {row.get('what')}, {m} tokens, {row.get('way')}"
            yield what, row["ms"] / 1e3, block.gemm_seconds(card, m, n, k)


def _modelled_levels() -> tuple[str, ...]:
    return (*tables.LEVELS, "INT8 W8A8", "BF16", "W6A8", "Q6_K", "Q5_K", "IQ4_XS")


def _model() -> Iterator[str]:
    yield "## Modelled"
    yield ""
    yield MODELLED
    yield ""
    yield from tables.pictures()
    yield ""
    yield LAUNCHES
    yield ""
    yield from tables.launch_lines()
    yield ""
    yield "What was asked of the model:"
    yield ""
    yield from tables.targets()
    yield ""
    yield tables.partly_filled()
    yield ""
    yield "Assumed, with sources:"
    yield ""
    yield from tables.assumptions()


# ---- values of strangers' files


def _first(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The first row with these values; an empty one where there is none."""
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), {})


def _is(value: Any) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _number(value: Any, scale: float = 1.0) -> str:
    if not _is(value):
        return _GAP
    scaled = value / scale
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def _safe(text: Any) -> str:
    """Text of a file inside Markdown: no markup, no cells, no lines of its own."""
    return re.sub(r"[|`<>\[\]*\\\r\n]+", " ", str(text)).strip()[:200]
