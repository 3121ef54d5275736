"""``ideogram4-quant bench``: every backend of this device side by side, as a table and a chart."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .bench_cases import HEAD_SIZE, Case, attentions, ceilings, linears, timed
from .errors import OpError
from .health import examine
from .new_file import check_output, new_file

_TOKENS = {"cpu": [512]}
_TOKENS_DEVICE = [512, 4608]


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="time every backend of this device side by side",
        description="Time the linears and attentions that this device can compute: each int8 "
        "backend, bf16, fp32, and GGUF, FP8 and NF4 weights decoded before the product. Percents "
        "are of the fastest product that this run measured in the same precision.",
    )
    parser.add_argument("--device", metavar="D", help="default: cuda where there is one, else cpu")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="default: 512 4608")
    parser.add_argument("--features", type=int, default=4608, metavar="K", help="default: 4608")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the times")
    parser.add_argument("--overwrite", action="store_true", help="replace PNG if it exists")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = args.tokens or _TOKENS.get(device.type, _TOKENS_DEVICE)
    if min(*tokens, args.features, args.rounds) < 1:
        found = f"tokens {tokens}, features {args.features}, rounds {args.rounds}"
        raise OpError("sizes must be positive", found=found)
    if args.chart is not None:
        check_output(args.chart, overwrite=args.overwrite)
    document = bench(device, tokens, args.features, args.rounds)
    if args.chart is not None:
        from .bench_chart import draw

        data = draw(document)
        with new_file(args.chart, len(data), overwrite=args.overwrite) as file:
            file.write_at(0, data)
    print(json.dumps(document, indent=1) if args.json else "\n".join(_text(document)))
    if args.chart is not None:
        print(f"chart: {args.chart}", file=sys.stderr)
    return 0


def bench(device: torch.device, tokens: list[int], features: int, rounds: int) -> dict:
    """Everything as plain data: ``health``, ``ceilings`` (operations a second), ``rows``.

    A row: op, tokens, name, milliseconds, operations a second, its part of the ceiling. The ceiling
    of a precision is the largest rate of this run, so no row exceeds it.
    """
    with torch.inference_mode():
        health = examine(device)
        ceiling = ceilings(device, rounds)
        rows = []
        for count in tokens:
            cases = linears(count, features, device)
            rows += _rows("linear", count, cases, 2 * count * features**2, device, rounds)
            cases, heads = attentions(count, device)
            work = 4 * count**2 * HEAD_SIZE * heads
            rows += _rows(f"attention, {heads} heads", count, cases, work, device, rounds)
    for row in rows:
        name = row["precision"]
        ceiling[name] = max(ceiling.get(name, 0.0), row["rate"])
    for row in rows:
        row["of_ceiling"] = row["rate"] / ceiling[row["precision"]]
    return {
        "device": str(device),
        "features": features,
        "head_size": HEAD_SIZE,
        "rounds": rounds,
        "health": health,
        "ceilings": ceiling,
        "rows": rows,
    }


def _rows(
    op: str, tokens: int, cases: list[Case], work: int, device: torch.device, rounds: int
) -> Iterator[dict]:
    times = timed(cases, device, rounds)
    for case in cases:
        seconds = times[case.name]
        yield {
            "op": op,
            "tokens": tokens,
            "name": case.name,
            "precision": case.precision,
            "ms": 1e3 * seconds,
            "rate": work / seconds,
        }


def _text(document: dict) -> Iterator[str]:
    health = document["health"]
    about = {name: value for name, value in health["about"].items() if name != "schema"}
    yield ", ".join(f"{name} {value}" for name, value in about.items())
    yield ", ".join(f"{name} {value:.3g}" for name, value in health["state"].items())
    yield from (f"WARNING: {warning}" for warning in health["warnings"])
    figures = (f"{name} {_rate(rate)}" for name, rate in document["ceilings"].items())
    yield f"ceilings measured in this run: {', '.join(figures)}"
    group = None
    for row in document["rows"]:
        if (row["op"], row["tokens"]) != group:
            group = (row["op"], row["tokens"])
            size = document["features"] if row["op"] == "linear" else document["head_size"]
            edge = f"{size} -> {size}" if row["op"] == "linear" else f"head size {size}"
            yield ""
            yield f"{row['op']}, {edge}, {row['tokens']} tokens"
        yield (
            f"  {row['name']:<32} {row['ms']:>10.3f} ms  {_rate(row['rate']):>14}  "
            f"{row['of_ceiling']:>5.0%} of {row['precision']}"
        )


def _rate(rate: float) -> str:
    return f"{rate / 1e12:.2f} Top/s" if rate >= 1e12 else f"{rate / 1e9:.1f} Gop/s"
