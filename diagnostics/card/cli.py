"""``ideogram4-quant card``: measure a card into a file, and make the table of such files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...errors import OpError
from ...files.new_file import check_output, replaced
from . import document as documents
from .supervise import Stage, Supervisor

STAGES = (
    Stage("device", 25, "machine:device"),
    Stage("selftest", 70, "machine:selftest"),
    Stage("tiles", 35, "kernels:tiles"),
    Stage("rows", 20, "kernels:rows"),
    Stage("choices", 15, "model:choices"),
    Stage("block", 40, "model:block"),
    Stage("step", 40, "model:step"),
    Stage("attention", 20, "kernels:attend"),
    Stage("decode", 20, "kernels:decode"),
    Stage("compile", 40, "model:compiled"),
    Stage("graphs", 10, "model:graphs"),
)
"""What is asked most comes first, what may hang in a foreign compiler last."""

SHARE = (
    "To share it: add the file to docs/cards/ in a pull request, or attach it to an issue. It "
    "holds no host name, no user name and no paths; look into it, it is plain text."
)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``card``."""
    parser = subparsers.add_parser(
        "card",
        help="measure this card in under six minutes, or make the table of such files",
        description="Measure what this pack computes on this card, each part within a time of its "
        "own, into a JSON file that is whole after every part. Needs torch and Triton alone. Or "
        "make the table of any number of such files, beside what known cards are modelled to take.",
        epilog="example: ideogram4-quant card --out my-card.json",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE.json", help="measure, and write this file")
    what.add_argument(
        "--render", type=Path, nargs="+", metavar="F",
        help="the table of these files, or of all in a folder, and what is modelled",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table there")
    parser.add_argument("--device", metavar="D", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--reduced", action="store_true", help="small sizes, to try the command (a CPU: always)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(func=run, interrupted=_kept)


def _kept(args: argparse.Namespace) -> str:
    """After Ctrl-C: the file is written before the first part and after every one."""
    if args.out is None or not args.out.exists():
        return "nothing was written"
    return f"{args.out} holds the parts that were measured"


def run(args: argparse.Namespace) -> int:
    """Measure or render; 1 where a part failed."""
    if args.render is not None:
        return _render(args.render, args.markdown, overwrite=args.overwrite)
    if args.markdown is not None:
        raise OpError(
            "--markdown is for the table of measured files",
            found="--out",
            needed="--render",
            hint=f"First measure, then: card --render {args.out} --markdown {args.markdown}",
        )
    return measure(args.out, args.device, reduced=args.reduced, overwrite=args.overwrite)


def measure(
    out: Path,
    device: str | None,
    *,
    reduced: bool,
    overwrite: bool = False,
    stages: tuple[Stage, ...] = STAGES,
    **limits: float,
) -> int:
    """Run ``stages`` into ``out``; ``limits`` are the supervisor's."""
    target = check_output(out, overwrite=overwrite)
    document = documents.new([stage.name for stage in stages], reduced=reduced)
    say = lambda text: print(text, flush=True)
    save = lambda: documents.save(target, document)
    Supervisor(document, save, device, say=say, **limits).run(stages)
    failed = [s["name"] for s in document["stages"] if s["status"] != documents.OK]
    say(f"{out}: {len(stages) - len(failed)} of {len(stages)} parts are whole")
    if not document["reduced"] and documents.rows(document, "device"):
        say(SHARE)
    broken = (documents.FAILED, documents.STOPPED)
    return 1 if any(s["status"] in broken for s in document["stages"]) else 0


def _render(files: list[Path], markdown: Path | None, *, overwrite: bool = False) -> int:
    """Print the page, or write it in the place of an earlier one; of another file with
    ``overwrite`` only."""
    from .render import HEAD, page

    if markdown is not None:
        check_output(markdown, overwrite=overwrite or _begins_with(markdown, HEAD))

    paths = [p for f in files for p in (sorted(f.glob("*.json")) if f.is_dir() else [f])]
    text = page({path.name: documents.load(path) for path in paths})
    if markdown is None:
        sys.stdout.write(text)
        return 0
    with replaced(markdown) as part:
        part.write_text(text, encoding="utf-8")
    return 0


def _begins_with(path: Path, text: str) -> bool:
    start = text.encode()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(start)) == start
