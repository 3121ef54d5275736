"""``ideogram4-quant kernels``: compile every shipped kernel offline and print its machine code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BackendUnavailableError, OpError
from ...files.new_file import replaced
from ...ops.kernels.configs import ARCHITECTURES, unsupported_by

if TYPE_CHECKING:
    from .offline import Built, Report, Variant

# GeForce cards and the A100 are the goal; shared memory of the smallest of them.
GATED = (80, 86, 89)
MAX_SHARED = 101376
MAX_PER_IMMA = 2.2
GATED_TILES = ((128, 256), (256, 128))


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``kernels``."""
    parser = subparsers.add_parser(
        "kernels",
        help="compile the Triton kernels without a GPU and show their machine code",
        description="Compile every shipped kernel and configuration offline and print registers, "
        "stack, spills, shared memory, matrix instructions and blocks per multiprocessor. Fails if "
        "a kernel spills, or one for sm_80, 86 or 89 breaks another gate. What was compiled before "
        "from the same source is read from the user's cache folder.",
        epilog="example: ideogram4-quant kernels --arch 86 --only gemm",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        help="compute capabilities to compile for (default: all)",
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="only kernels whose name or configuration contains TEXT"
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write cubins and disassembly")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that compile (default: one a core)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="compile the encoder of quantize for this processor instead, with GCC or clang",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compile, print, and return 1 if a gate is broken, 2 if nothing can be compiled here."""
    if args.cpu:
        return _compile_encoder()
    from . import building, offline

    try:
        reports = []
        version, _ = offline.require_tools()
        refused = {arch: unsupported_by(version, arch) for arch in args.arch}
        skipped = [{"arch": arch, "reason": why} for arch, why in refused.items() if why]
        work = _work([arch for arch, why in refused.items() if not why], args.only)
        for report in _dumped(work, args) if args.dump else building.reports(work, args.jobs):
            reports.append(report)
            if not args.json:
                print(_row(report) if len(reports) > 1 else _table_head(report), flush=True)
    except BackendUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = [text for report in reports for text in broken_gates(report)]
    if args.json:
        document = {"reports": [r.as_dict() for r in reports], "skipped": skipped, "broken": broken}
        print(json.dumps(document, indent=1))
    else:
        for entry in skipped:
            print(f"sm_{entry['arch']} skipped: {entry['reason']}")
        for text in broken:
            print(f"BROKEN GATE {text}")
        print(f"{len(reports)} kernels compiled, {len(broken)} gates broken")
    return 1 if broken else 0


def _compile_encoder() -> int:
    from ...ops.native import compiler
    from ...quant.compiled import check

    try:
        print(f"encodes weights on this processor: {compiler.build(check)}")
    except BackendUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def broken_gates(report: Report) -> list[str]:
    """What a report breaks: local memory anywhere, the rest on sm_80, 86 and 89; empty if none."""
    name = f"sm_{report.arch} {report.kernel} {report.label}"
    broken = []
    if report.stack or report.spills:
        broken.append(f"local memory: stack {report.stack} B, {report.spills} spills")
    if report.arch not in GATED:
        return [f"{name}: {text}" for text in broken]
    if report.shared > MAX_SHARED:
        broken.append(f"{report.shared} B of shared memory, more than {MAX_SHARED}")
    if report.blocks_per_sm < 1:
        broken.append("no block fits a multiprocessor")
    if report.loop_imma and report.loop_prmt:
        broken.append(f"{report.loop_prmt} PRMT in the main loop")
    tile = tuple(map(int, report.label.split()[0].split("x")[:2])) if report.loop_imma else ()
    if tile in GATED_TILES and not report.per_imma < MAX_PER_IMMA:
        broken.append(f"{report.per_imma:.2f} instructions an IMMA, needed below {MAX_PER_IMMA}")
    return [f"{name}: {text}" for text in broken]


def _work(archs: Sequence[int], only: str | None) -> list[tuple[Variant, int]]:
    from . import shipped

    found = [(variant, arch) for arch in archs for variant in shipped.variants(arch)]
    chosen = [pair for pair in found if only is None or only in _named(pair[0])]
    if found and not chosen:  # nothing compiled would pass every gate
        names = sorted({variant.function.removesuffix("_kernel") for variant, _ in found})
        raise OpError("no such kernel", found=f"--only {only}", needed=", ".join(names))
    return chosen


def _named(variant: Variant) -> str:
    return f"{variant.function} {variant.label}"


def _dumped(work: Sequence[tuple[Variant, int]], args: argparse.Namespace) -> Iterator[Report]:
    from . import building

    for each in building.built(work, args.jobs):
        _dump(each, args.dump)
        yield each.report


def _dump(built: Built, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = built.report
    name = f"sm{report.arch}-{report.kernel}-{report.label}".replace(" ", "-")
    for suffix, data in ((".cubin", built.cubin), (".sass", built.disassembly.encode())):
        with replaced(folder / (name + suffix)) as part:
            part.write_bytes(data)


_COLUMNS = ("arch", "kernel", "configuration", "reg", "stack", "spill", "smem", "blocks")
_COLUMNS += ("instr", "IMMA", "HMMA", "LDGSTS", "LDSM", "loop", "PRMT", "instr/IMMA")
_WIDTHS = (6, 28, 34, 4, 5, 5, 7, 6, 6, 5, 5, 6, 5, 5, 5, 10)


def _cells(values: Sequence[object]) -> str:
    pairs = zip(values, _WIDTHS, strict=True)
    return " ".join(f"{v:<{w}}" if i in (1, 2) else f"{v:>{w}}" for i, (v, w) in enumerate(pairs))


def _table_head(report: Report) -> str:
    return f"Triton {report.triton}\n{_cells(_COLUMNS)}\n{_row(report)}"


def _row(report: Report) -> str:
    per_imma = "" if report.per_imma is None else f"{report.per_imma:.2f}"
    return _cells(
        (
            f"sm_{report.arch}",
            report.kernel,
            report.label,
            report.registers,
            report.stack,
            report.spills,
            report.shared,
            report.blocks_per_sm,
            report.instructions,
            report.imma,
            report.hmma,
            report.ldgsts,
            report.ldsm,
            report.loop_instructions,
            report.loop_prmt,
            per_imma,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself: ``python -m ideogram4_quant.diagnostics.machine_code.cli kernels``."""
    parser = argparse.ArgumentParser(prog="ideogram4-quant")
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return args.func(args)


if __name__ == "__main__":
    sys.exit(main())
