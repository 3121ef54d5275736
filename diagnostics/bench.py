"""``ideogram4-quant bench``: every backend of this device side by side, as a table and a chart."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module

import torch
from tqdm import tqdm

from ..errors import OpError
from ..files.new_file import check_output, new_file
from .bench_cases import HEAD_SIZE, Case, Progress, attentions, ceilings, linears, timed, title
from .health import examine

_TOKENS = {"cpu": [512]}
_TOKENS_DEVICE = [512, 4608]
# A slow device runs each case of a table at least once and repeats them so long.
_SECONDS = 45.0


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = args.tokens or _TOKENS.get(device.type, _TOKENS_DEVICE)
    if min(*tokens, args.features, args.rounds) < 1:
        found = f"tokens {tokens}, features {args.features}, rounds {args.rounds}"
        raise OpError("sizes must be positive", found=found)
    if args.chart is not None:
        check_output(args.chart, overwrite=args.overwrite)
        import_module("matplotlib")  # missing: told before minutes of measuring
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

    A row: op, tokens, name, milliseconds, operations a second, its part of the ceiling, and how
    many times faster it is than the first of its table. The ceiling of a precision is the largest
    rate of this run, so no row exceeds it. Progress goes to stderr.
    """
    with torch.inference_mode():
        health = examine(device)
        with _bar("ceilings") as progress:
            ceiling = dict(ceilings(device, rounds, progress))
        rows = []
        for count in tokens:
            with _bar(f"linear, {count} tokens") as progress:
                cases = linears(count, features, device)
                times = timed(cases, device, rounds, _SECONDS, progress)
            rows += _rows("linear", count, cases, times, 2 * count * features**2)
            with _bar(f"attention, {count} tokens") as progress:
                cases, heads = attentions(count, device)
                times = timed(cases, device, rounds, _SECONDS, progress)
            work = 4 * count**2 * HEAD_SIZE * heads
            rows += _rows(f"attention, {heads} heads", count, cases, times, work)
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
    op: str, tokens: int, cases: list[Case], times: Mapping[str, float], work: int
) -> Iterator[dict]:
    base = times[cases[0].name]
    for case in cases:
        seconds = times[case.name]
        yield {
            "op": op,
            "tokens": tokens,
            "name": case.name,
            "precision": case.precision,
            "ms": 1e3 * seconds,
            "rate": work / seconds,
            "speed": base / seconds,
        }


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress callback ``(done, total)`` that draws a bar on stderr, gone when it is full."""
    with tqdm(desc=title, unit="run", leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _text(document: dict) -> Iterator[str]:
    health = document["health"]
    about = {name: value for name, value in health["about"].items() if name != "schema"}
    yield ", ".join(f"{name} {value}" for name, value in about.items())
    yield f"health: {'; '.join(_state(health['state']))}"
    yield from (f"WARNING: {warning}" for warning in health["warnings"])
    figures = (f"{name} {_rate(rate)}" for name, rate in document["ceilings"].items())
    yield f"ceilings measured in this run: {', '.join(figures)}"
    group = None
    for row in document["rows"]:
        if (row["op"], row["tokens"]) != group:
            group, first = (row["op"], row["tokens"]), row["name"]
            yield ""
            yield title(row, document)
        yield (
            f"  {row['name']:<32} {row['ms']:>10.3f} ms {row['speed']:>6.2f} x {first}  "
            f"{_rate(row['rate']):>14} {row['of_ceiling']:>5.0%} of the {row['precision']} ceiling"
        )


def _state(state: dict) -> Iterator[str]:
    """Readings, with both values where they changed."""
    for name, value in state["before"].items():
        after = state["after"].get(name, value)
        yield f"{name} {value:.4g}" + ("" if after == value else f", then {after:.4g}")
    yield f"speed {state['drift']:+.1%} within a second"
    if "taken" in state:
        yield f"{state['taken']:.0%} of the threads' time taken by other processes"


def _rate(rate: float) -> str:
    return f"{rate / 1e12:.2f} Top/s" if rate >= 1e12 else f"{rate / 1e9:.1f} Gop/s"
