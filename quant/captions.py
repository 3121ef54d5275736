"""The captions that a calibration samples where none are given: 128 of the pack's own, CC0.

Photographs, drawings, posters, interfaces, labels and diagrams in seventeen languages, with texts
in boxes, with boxes alone and without any: none of them is a caption that the pack is evaluated on.
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("calibration_captions.jsonl")


def calibration_captions(limit: int | None = None) -> list[str]:
    """JSON captions with their keys in the trained order, the first ``limit`` of them or all.

    Neighbours differ in kind, so the first few are as varied as all.
    """
    return FILE.read_text(encoding="utf-8").splitlines()[:limit]
