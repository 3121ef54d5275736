"""Doctor's last word: one level for this machine, and what to download for it."""

from __future__ import annotations

import pytest

from ideogram4_quant.cards.sizes import copy_bytes
from ideogram4_quant.checkpoint.level_order import AUTO_ORDER, LEVELS, MIXED
from ideogram4_quant.checkpoint.pairs import residency
from ideogram4_quant.checkpoint.published import PUBLISHED
from ideogram4_quant.diagnostics.doctor.cli import _recommendation
from ideogram4_quant.diagnostics.doctor.recommend import recommend

GB = 10**9


def rows(memory: int, here: tuple[str, ...] = (), fits_ram: bool = True) -> list[dict]:
    return [
        {
            "level": level,
            "copy_bytes": copy_bytes(level),
            "on_this_device": residency((copy_bytes(level),) * 2, memory * GB),
            "fits_ram": fits_ram,
            "conditional": "cond" if level in here else None,
            "unconditional": "uncond" if level in here else None,
            "one_branch": None,
        }
        for level in LEVELS
        if level not in MIXED  # which have no size of their own
    ]


def expected() -> list[dict]:
    return [
        {
            "name": item.name,
            "kind": item.kind,
            "nbytes": item.nbytes,
            "url": item.url,
            "folder": f"models/{item.kind}",
            "level": item.level,
            "use": item.use,
            "here": False,
        }
        for item in PUBLISHED
    ]


def said(best: dict | None) -> str:
    return "\n".join(_recommendation({"recommended": best}))


@pytest.mark.parametrize(
    ("memory", "level"), [(24, "INT8 W8A8 rotated"), (16, "Q4_K"), (12, "INT8 W8A8 rotated")]
)
def test_a_published_level_that_fits_is_named_with_its_files(memory, level):
    order = AUTO_ORDER["int8 and bfloat16"]
    best = recommend(rows(memory), order, expected(), encoder=False, vae=False)
    assert best["level"] == level
    files = [item for item in PUBLISHED if item.level == level]
    ends = [item for item in PUBLISHED if item.kind != "diffusion_models" and item.use is None]
    files += [next(i for i in ends if i.kind == kind) for kind in ("text_encoders", "vae")]
    assert [file["name"] for file in best["files"]] == [item.name for item in files]
    assert best["bytes"] == sum(item.nbytes for item in files)
    text = said(best)
    assert text.startswith(f"Recommended for this machine: {level} (")
    for item in files:
        assert item.name in text
        assert item.url in text
    assert f"{best['bytes'] / GB:.2f} GB in all" in text


def test_what_is_here_is_not_downloaded_again():
    order = AUTO_ORDER["int8 and bfloat16"]
    best = recommend(rows(16, here=("Q5_K",)), order, expected(), encoder=True, vae=True)
    assert (best["level"], best["files"]) == ("Q5_K", [])
    assert "its files are here" in said(best)


def test_nothing_is_recommended_that_memory_cannot_hold():
    order = AUTO_ORDER["int8 and bfloat16"]
    small = recommend(rows(4), order, expected(), encoder=True, vae=True)
    assert small is None
    assert "No level fits" in said(small)
    assert recommend(rows(24, fits_ram=False), order, expected(), encoder=True, vae=True) is None
