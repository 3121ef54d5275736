"""Stages of the model at its real width: one block, a whole step of both copies, torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...ops import attention, fused
from ...ops.tuning import autotune
from ...sampling import combine, euler_step
from .common import Sizes, device_of, dtype_of, is_reduced, measured, peak_gb, sizes
from .transformer import Block, Inputs, inputs_of, turn_eagerly, turns
from .weights import LEVELS, ROTATION
from .worker import Context, Row, describe

_COMPILED = "INT8 W8A8 rotated"
_STEP_LEVELS = ("Q4_K", "INT8 W8A8 rotated")
_WORKING = 2.5e9  # bytes that a pass takes beside the weights, at 1024 px
_LOOKED_UP = 0.5  # seconds: what ``choices`` has measured is read
_TUNING = 1_500_000_000  # bytes: whole layers


def choices(context: Context) -> Iterator[Row]:
    """What the pack's own tuning picks here, as a load would; the stages after it run on that."""
    there = device_of(context)
    seconds = _LOOKED_UP if is_reduced(context) else context.left
    for line in _tuned(context, there, seconds):
        yield {"what": "choice", "text": line}


def _tuned(context: Context, there: torch.device, seconds: float = _LOOKED_UP) -> tuple[str, ...]:
    """Measure what ``"auto"`` decides, or read it where an earlier process of this run did."""
    size, dtype = sizes(context), dtype_of(there)
    layers, inputs = [], []
    for kind in ("int8", "Q4_K"):
        for name, (n, k) in size.linears.items():
            layers.append(autotune.Layer(kind, n, k, ROTATION if kind == "int8" else 0))
            module = f"{'attention' if name in ('qkv', 'o') else 'feed_forward'}.{name}"
            if kind == "int8" and module in fused.INPUTS:
                inputs.append((fused.INPUTS[module], layers[-1]))
    folder = Path(context.folder) if context.folder else None
    measure = autotune.Measure(
        folder, seconds, _TUNING if there.type == "cuda" else autotune.MEMORY
    )
    heads = (size.heads, 256)
    autotune.tune(layers, there, dtype, measure, heads=heads, inputs=inputs)
    return autotune.describe(there)


def block(context: Context) -> Iterator[Row]:
    """One block at every level, fused and not, at the tokens of the conditional copy."""
    there, size = device_of(context), sizes(context)
    dtype, tokens = dtype_of(there), size.tokens[0]
    _tuned(context, there)
    with torch.inference_mode():
        inputs = inputs_of(tokens, size, there, dtype)
        for level in LEVELS:
            if context.late(level):
                continue
            try:
                yield from _block_rows(level, inputs, context, there)
            except Exception as error:  # out of memory, a format that this torch has not
                yield {"level": level, "failed": describe(error)}


def _block_rows(level: str, inputs: Inputs, context: Context, there: torch.device) -> Iterator[Row]:
    """Fused with the best that there is for q and k; plain, as torch runs it op by op."""
    own = Block(level, sizes(context), there, inputs[0].dtype)
    peak_gb(there)
    best, turn = next(iter(turns(there).items()))
    heads = {"fused": best, "plain": "eager"}

    def fused_() -> Tensor:
        own.turns = turn
        return own.fused(*inputs)

    def plain() -> Tensor:
        own.turns = turn_eagerly
        return own.plain(*inputs)

    times, failed = measured({"fused": fused_, "plain": plain}, context, there)
    about = {"level": level, "tokens": inputs[0].shape[1], "mb": own.nbytes / 1e6}
    memory = {"peak_gb": peak_gb(there)}
    for way, seconds in times.items():
        yield {**about, "way": way, "heads": heads[way], "ms": 1e3 * seconds, **memory}
    for way, why in failed.items():
        yield {**about, "way": way, "heads": heads[way], "failed": why}


def step(context: Context) -> Iterator[Row]:
    """A denoising step of both copies, every layer with weights of its own, where memory has room.

    With less room fewer layers run, as many as fit: ``layers`` says so, and ``scaled_seconds`` is
    the time of all of them by layer.
    """
    there, size = device_of(context), sizes(context)
    dtype = dtype_of(there)
    _tuned(context, there)
    for level in _STEP_LEVELS:
        if context.late(level):
            continue
        with torch.inference_mode():
            try:
                yield from _step_rows(level, size, context, there, dtype)
            except Exception as error:  # out of memory although there was room
                yield {"level": level, "failed": describe(error)}
        if there.type == "cuda":
            torch.cuda.empty_cache()


def _step_rows(
    level: str, size: Sizes, context: Context, there: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    """A row an attention; the weights are made once."""
    if there.type == "cuda":
        torch.cuda.empty_cache()  # what is reserved does not count as free
    peak_gb(there)
    copies = _copies(level, size, there, dtype)
    layers = len(copies[0])
    if layers == 0:
        yield {"level": level, "failed": "no layer fits the free memory"}
        return
    inputs = [inputs_of(tokens, size, there, dtype) for tokens in size.tokens]
    image = size.tokens[1]

    def run(attends: str) -> Tensor:
        outs = []
        for own, (x, condition, rope) in zip(copies, inputs, strict=True):
            for layer in own:
                layer.attends, layer.turns = attends, turn
                x = layer.fused(x, condition, rope)
            outs.append(x[:, -image:, :128])
        return euler_step(outs[0], combine(*outs, 7.0), 0.5, 0.4)

    nbytes = sum(layer.nbytes for own in copies for layer in own)
    about = {"level": level, "layers": layers, "of": size.layers, "gb": nbytes / 1e9}
    about["heads"], turn = next(iter(turns(there).items()))
    about |= {"conditional_tokens": size.tokens[0], "unconditional_tokens": size.tokens[1]}
    for name in attention.candidates(there):
        times, failed = measured({name: partial(run, name)}, context, there, rounds=3)
        row = {**about, "attention": name}
        if not times:
            yield {**row, "failed": failed.get(name, "no time was left")}
            continue
        scaled = times[name] * size.layers / layers
        memory = {"peak_gb": peak_gb(there)}
        yield {**row, "seconds": times[name], "scaled_seconds": scaled, **memory}


def _copies(
    level: str, size: Sizes, there: torch.device, dtype: torch.dtype
) -> tuple[list[Block], list[Block]]:
    """Both copies, layer by layer, until all are there or the free memory is used."""
    copies: tuple[list[Block], list[Block]] = ([], [])
    for _ in range(size.layers):
        if copies[0] and there.type == "cuda":
            free, _ = torch.cuda.mem_get_info(there)
            if free < 2 * copies[0][0].nbytes + _WORKING:
                break
        for own in copies:
            own.append(Block(level, size, there, dtype))
    return copies


def compiled(context: Context) -> Iterator[Row]:
    """``torch.compile`` of a block on and off, and what compiling took."""
    there, size = device_of(context), sizes(context)
    dtype = dtype_of(there)
    # tests have no C++ compiler to wait for: there the graph alone is traced
    backend = "eager" if is_reduced(context) else "inductor"
    _tuned(context, there)
    with torch.inference_mode():
        inputs = inputs_of(size.tokens[0], size, there, dtype)
        own, took = Block(_COMPILED, size, there, dtype), 0.0
        for way, function in (("fused", own.fused), ("plain", own.plain)):
            if context.left <= took:  # the second would be cut off half-way
                context.missing.append(way)
                continue
            started = time.perf_counter()
            yield from _compiled(way, function, inputs, backend, context, there)
            took = time.perf_counter() - started


def _compiled(
    way: str,
    function: Callable[..., Tensor],
    inputs: Inputs,
    backend: str,
    context: Context,
    there: torch.device,
) -> Iterator[Row]:
    about = {"level": _COMPILED, "way": way, "backend": backend}
    fast = torch.compile(function, backend=backend)
    started = time.perf_counter()
    try:
        fast(*inputs)
    except Exception as error:  # no compiler for the host's part, or its own faults
        yield {**about, "failed": describe(error)}
        return
    took = time.perf_counter() - started
    functions = {"off": lambda: function(*inputs), "on": lambda: fast(*inputs)}
    times, failed = measured(functions, context, there)
    for name, seconds in times.items():
        row = {**about, "compile": name, "ms": 1e3 * seconds}
        yield {**row, "compiling_seconds": took} if name == "on" else row
    for name, why in failed.items():
        yield {**about, "compile": name, "failed": why}


def graphs(context: Context) -> Iterator[Row]:
    """A block launched op by op against the same block replayed as one CUDA graph."""
    there, size = device_of(context), sizes(context)
    if there.type != "cuda":
        yield {"what": "graph", "failed": f"there are no CUDA graphs on {there.type}"}
        return
    dtype = dtype_of(there)
    _tuned(context, there)
    with torch.inference_mode():
        inputs = inputs_of(size.tokens[0], size, there, dtype)
        own = Block(_COMPILED, size, there, dtype)
        for _ in range(2):
            own.fused(*inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(there)
        with torch.cuda.graph(graph):
            own.fused(*inputs)
        ways = {"launched": lambda: own.fused(*inputs), "graph": graph.replay}
        times, failed = measured(ways, context, there)
        for way, seconds in times.items():
            yield {"what": "graph", "level": _COMPILED, "way": way, "ms": 1e3 * seconds}
        for way, why in failed.items():
            yield {"what": "graph", "level": _COMPILED, "way": way, "failed": why}
        yield {"what": "launching", "level": _COMPILED, "ms": 1e3 * _launching(own, inputs, there)}


def _launching(own: Block, inputs: Inputs, there: torch.device) -> float:
    """Seconds of the host for one block, the device's work not waited for."""
    torch.cuda.synchronize(there)
    started = time.perf_counter()
    own.fused(*inputs)
    took = time.perf_counter() - started
    torch.cuda.synchronize(there)
    return took
