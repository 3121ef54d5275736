"""Arguments that commands share which sample captions: importing it imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

GUIDED_PRESETS = ("quality", "default", "turbo")
PRESET_NAMES = (*GUIDED_PRESETS, "instant", "fast", "turbotime")
"""Those of ``sampling.presets``, without importing torch."""


def add_files(
    parser: argparse.ArgumentParser, *, encoder: str, encoder_required: bool = False
) -> argparse._ArgumentGroup:
    """The model and its encoder; the group is returned, for what is written."""
    files = parser.add_argument_group("files")
    files.add_argument("model", metavar="MODEL", help="the conditional copy, or a file with both")
    files.add_argument("--uncond", metavar="F", help="the unconditional copy")
    files.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only file its other tensors"
    )
    files.add_argument("--encoder", required=encoder_required, metavar="DIR|F", help=encoder)
    files.add_argument("--tokenizer", metavar="DIR", help="where the encoder brings none")
    return files


def add_picture(
    parser: argparse.ArgumentParser, *, prompts: str, preset: str
) -> argparse._ArgumentGroup:
    """What is sampled; ``prompts`` and ``preset``: help for these two."""
    picture = parser.add_argument_group("what is sampled")
    picture.add_argument("--prompts", type=Path, metavar="F", help=prompts)
    picture.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    picture.add_argument("--width", type=int, help="multiple of 16 (default: 1024)")
    picture.add_argument("--height", type=int, help="multiple of 16 (default: 1024)")
    picture.add_argument("--preset", choices=PRESET_NAMES, help=preset)
    picture.add_argument("--steps", type=int, metavar="N", help="instead of the preset's")
    picture.add_argument("--guidance", type=float, metavar="G", help="one factor for every step")
    picture.add_argument(
        "--copies", choices=("both", "conditional"), default="both", help="conditional: one copy"
    )
    return picture


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument(
        "--device",
        metavar="D",
        help="where to compute (default: cuda where there is one, else cpu)",
    )
