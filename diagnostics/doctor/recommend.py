"""One recommendation for a machine: a level, and what is still to be downloaded for it."""

from __future__ import annotations

from collections.abc import Sequence

from ...checkpoint.pairs import ALTERNATING, BOTH

_ENDS = ("text_encoders", "vae")


def recommend(
    levels: Sequence[dict],
    order: Sequence[str],
    expected: Sequence[dict],
    encoder: bool,
    vae: bool,
) -> dict | None:
    """The first level of ``order`` that is here or published and fits: both copies, else in turns.

    levels, expected: rows of `examine`, for every level and every published file. encoder, vae:
    whether there is one. None where nothing fits, as without a known amount of memory. ``files``
    are those to download, ``bytes`` their sum.
    """
    by_level = {row["level"]: row for row in levels}
    published = {item["level"] for item in expected}
    rows = [by_level[name] for name in order if name in by_level]
    reachable = [row for row in rows if _here(row) or row["level"] in published]
    for held in (BOTH, ALTERNATING):
        for row in reachable:
            if row["on_this_device"] == held and row["fits_ram"] is not False:
                return _for(row, expected, encoder, vae)
    return None


def _here(row: dict) -> bool:
    """Whether nothing of a level is missing."""
    whole = row["unconditional"] is not None or row["one_branch"] is not None
    return row["conditional"] is not None and whole


def _for(row: dict, expected: Sequence[dict], encoder: bool, vae: bool) -> dict:
    there = {"text_encoders": encoder, "vae": vae}
    wanted = [] if _here(row) else [item for item in expected if item["level"] == row["level"]]
    wanted = [item for item in wanted if not item["here"]]
    ends = [item for item in expected if item["use"] is None]
    for kind in _ENDS:  # of several encoders the first will do
        if not there[kind]:
            wanted += [item for item in ends if item["kind"] == kind][:1]
    files = [{k: item[k] for k in ("name", "nbytes", "url", "folder")} for item in wanted]
    return {
        "level": row["level"],
        "on_this_device": row["on_this_device"],
        "copy_bytes": row["copy_bytes"],
        "one_branch": row["one_branch"],
        "files": files,
        "bytes": sum(item["nbytes"] or 0 for item in wanted),
    }
