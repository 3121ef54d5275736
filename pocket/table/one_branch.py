"""Makes the table of the one-branch pocket model: every level that is written, by ``compare``.

    python -m ideogram4_quant.pocket.table.one_branch --work one-branch-table

Quantizes the model to every level, paints the held-out prompts with the Instant preset (8 steps,
no guidance), compares with BF16, and puts the table into docs/pocket-one-branch.md. About half a
minute a level on two cores; what a run that is broken off has painted stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...engine.compare.cli import add_parsers, run_compare
from ...quant import RECIPES, quantize_checkpoint
from ..data import HELD_OUT
from ..paths import dit_path, encoder_dir, vae_dir
from .report import fill

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "pocket-one-branch.md"
REFERENCE = "BF16"


def levels_of(work: Path) -> dict[str, Path]:
    """Level -> the model's file, made where it is not there yet; the reference first."""
    source = dit_path("one_branch")
    files = {REFERENCE: source}
    for level, recipe in RECIPES.items():
        out = work / f"instant_{level.replace(' ', '_')}.{recipe.file_format}"
        if not out.exists():
            quantize_checkpoint(source, level, out)
        files[level] = out
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("one-branch-table"), metavar="DIR")
    parser.add_argument("--limit", type=int, default=len(HELD_OUT), help="prompts (default: all)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="MD")
    parser.add_argument("--jobs", default="1", help="processes (default: 1)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "prompts.jsonl"
    rows = (
        {"prompt": p.caption, "text": p.word, "seed": p.seed, "width": p.width, "height": p.height}
        for p in HELD_OUT[: args.limit]
    )
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    out = args.work / "compare"
    words = ["compare", "--out", out, "--encoder", encoder_dir(), "--vae", vae_dir()]
    words += ["--prompts", prompts, "--preset", "instant", "--jobs", args.jobs]
    for level, file in levels_of(args.work).items():
        words += ["--system", f"{level}={file}"]
    commands = argparse.ArgumentParser()
    add_parsers(commands.add_subparsers())
    run_compare(commands.parse_args([str(word) for word in words]))
    found = (out / "results.md").read_text(encoding="utf-8")
    text = args.document.read_text(encoding="utf-8")
    args.document.write_text(fill(text, {"table": f"{found.strip()}\n"}), encoding="utf-8")
    print(args.document)


if __name__ == "__main__":
    main()
