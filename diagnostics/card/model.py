"""Stages of the model at its real width: one block, a whole step of both copies, torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import attention, dispatch, fused
from ...ops.tuning import autotune
from ...sampling import combine, euler_step
from .common import device_of, dtype_of, is_reduced, measured, peak_gb, random, sizes
from .weights import LEVELS, ROTATION, Linear, linear
from .worker import Context, Row, describe

EPS = 1e-5
_ROPE = "rms_rope"
_ADALN = 512
_COMPILED = "INT8 W8A8 rotated"
_STEP_LEVELS = ("Q4_K", "INT8 W8A8 rotated")
Turn = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]

_WORKING = 2.5e9  # bytes that a pass takes beside the weights, at 1024 px
_TUNING = 1_500_000_000  # bytes: whole layers


class Block:
    """One transformer block with random weights of a level; ``fused_`` picks how it runs."""

    def __init__(self, level: str, size, device: torch.device, dtype: torch.dtype):
        h, f = size.hidden, size.feed_forward
        self.heads = size.heads
        self.attends = attention.AUTO
        self.turns: Turn = _turn_eagerly
        make = partial(linear, level, device=device, dtype=dtype)
        self.qkv, self.o = make(n=3 * h, k=h), make(n=h, k=h)
        self.w1, self.w3, self.w2 = make(n=f, k=h), make(n=f, k=h), make(n=h, k=f)
        self.modulation: Linear = linear("BF16", 4 * h, _ADALN, device, dtype)
        self.norm = torch.ones(h, device=device, dtype=dtype)
        self.head_norm = torch.ones(256, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Of its linears."""
        parts = (self.qkv, self.o, self.w1, self.w2, self.w3, self.modulation)
        return sum(part.nbytes for part in parts)

    def attention(self, x: Tensor | fused.Activation, rope: tuple[Tensor, Tensor]) -> Tensor:
        """qkv, norms of q and k, rotary embedding, attention, o."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, 256)
        q, k, v = qkv.unbind(dim=2)
        q, k = self.turns(q, k, self.head_norm, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        backend = attention.choose(self.heads, 256, tokens, v.device, v.dtype, self.attends)
        out = attention.attention(q, k, v, backend=backend)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, -1))

    def plain(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """As the reference's block is written."""
        scale1, gate1, scale2, gate2 = self.modulation(condition).chunk(4, dim=-1)
        norm = partial(F.rms_norm, normalized_shape=x.shape[-1:], weight=self.norm, eps=EPS)
        h = self.attention(norm(x) * (1 + scale1), rope)
        x = x + torch.tanh(gate1) * norm(h)
        h = norm(x) * (1 + scale2)
        h = self.w2(F.silu(self.w1(h)) * self.w3(h))
        return x + torch.tanh(gate2) * norm(h)

    def fused(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """On the pack's kernels."""
        parts = fused.BlockParts(
            modulation=self.modulation,
            attention=partial(self.attention, rope=rope),
            w1=self.w1,
            w2=self.w2,
            w3=self.w3,
            norm_weight=lambda name: self.norm,
            eps=EPS,
        )
        return fused.block(x, condition, parts)


def _turn_eagerly(
    q: Tensor, k: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head, then its halves ``(a, b) -> (a cos - b sin, b cos + a sin)``, by torch.

    ``q`` and ``k`` ``[B, L, H, 256]``, ``rope`` cos and sin ``[1, L, 128]`` fp32.
    """
    cos, sin = (t.repeat(1, 1, 2).unsqueeze(2) for t in rope)
    turned = []
    for x in (q, k):
        wide = F.rms_norm(x, (256,), weight, EPS).float()
        one, two = wide.chunk(2, dim=-1)
        turned.append((wide * cos + torch.cat((-two, one), dim=-1) * sin).to(x.dtype))
    return turned[0], turned[1]


def _turn_by_kernel(
    q: Tensor, k: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same in one pass."""
    return _turning(q.device).get(_ROPE)(q, k, weight, weight, *rope, EPS)


def _turning(device: torch.device) -> dispatch.Backend:
    return dispatch.choose(_ROPE, (256, 256, 256), device)


def _turns(device: torch.device) -> dict[str, Turn]:
    """How norm and rotary embedding of q and k can run: ``heads`` of the rows."""
    there = _ROPE in dispatch.REFERENCE_OPS and _ROPE in _turning(device).ops
    kernel = there and _turning(device).name != dispatch.REFERENCE.name
    return ({"fused": _turn_by_kernel} if kernel else {}) | {"eager": _turn_eagerly}


def _inputs(
    tokens: int, size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    x = random((1, tokens, size.hidden), device, dtype)
    condition = random((1, 1, _ADALN), device, dtype, 1)
    angle = random((1, tokens, 128), device, torch.float32, 2)
    return x, condition, (angle.cos(), angle.sin())


def choices(context: Context) -> Iterator[Row]:
    """What the pack's own tuning picks here, as a load would; the stages after it run on that."""
    there = device_of(context)
    for line in _tuned(context, there):
        yield {"what": "choice", "text": line}


def _tuned(context: Context, there: torch.device) -> tuple[str, ...]:
    """Measure what ``"auto"`` decides, or read it where an earlier process of this run did."""
    size, dtype = sizes(context), dtype_of(there)
    layers, inputs = [], []
    for kind in ("int8", "Q4_K"):
        for name, (n, k) in size.linears.items():
            layers.append(autotune.Layer(kind, n, k, ROTATION if kind == "int8" else 0))
            module = f"{'attention' if name in ('qkv', 'o') else 'feed_forward'}.{name}"
            if kind == "int8" and module in fused.INPUTS:
                inputs.append((fused.INPUTS[module], layers[-1]))
    left = max(0.0, context.deadline - time.perf_counter()) if not is_reduced(context) else 0.5
    folder = Path(context.folder) if context.folder else None
    measure = autotune.Measure(folder, left, _TUNING if there.type == "cuda" else autotune.MEMORY)
    heads = (size.heads, 256)
    autotune.tune(layers, there, dtype, measure, heads=heads, inputs=inputs)
    return autotune.describe(there)


def block(context: Context) -> Iterator[Row]:
    """One block at every level, fused and not, at the tokens of the conditional copy."""
    there, size = device_of(context), sizes(context)
    dtype, tokens = dtype_of(there), size.tokens[0]
    _tuned(context, there)
    with torch.inference_mode():
        inputs = _inputs(tokens, size, there, dtype)
        for level in LEVELS:
            if context.late(level):
                continue
            try:
                own = Block(level, size, there, dtype)
            except Exception as error:  # out of memory, a format that this torch has not
                yield {"level": level, "failed": describe(error)}
                continue
            yield from _block_rows(level, own, inputs, context, there)


def _block_rows(
    level: str, own: Block, inputs: tuple, context: Context, there: torch.device
) -> Iterator[Row]:
    """Fused with the best that there is for q and k; plain, as torch runs it op by op."""
    peak_gb(there)
    best, turn = next(iter(_turns(there).items()))
    heads = {"fused": best, "plain": "eager"}

    def fused_() -> Tensor:
        own.turns = turn
        return own.fused(*inputs)

    def plain() -> Tensor:
        own.turns = _turn_eagerly
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
    level: str, size, context: Context, there: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    """A row an attention; the weights are made once."""
    peak_gb(there)
    copies = _copies(level, size, there, dtype)
    layers = len(copies[0])
    if layers == 0:
        yield {"level": level, "failed": "no layer fits the free memory"}
        return
    inputs = [_inputs(tokens, size, there, dtype) for tokens in size.tokens]
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
    about["heads"], turn = next(iter(_turns(there).items()))
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
    level: str, size, there: torch.device, dtype: torch.dtype
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
    with torch.inference_mode():
        inputs = _inputs(size.tokens[0], size, there, dtype)
        own = Block(_COMPILED, size, there, dtype)
        for way, function in (("fused", own.fused), ("plain", own.plain)):
            if not context.late(way):
                yield from _compiled(way, function, inputs, backend, context, there)


def _compiled(
    way: str,
    function: Callable[..., Tensor],
    inputs: tuple,
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
    with torch.inference_mode():
        inputs = _inputs(size.tokens[0], size, there, dtype)
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


def _launching(own: Block, inputs: tuple, there: torch.device) -> float:
    """Seconds of the host for one block, the device's work not waited for."""
    torch.cuda.synchronize(there)
    started = time.perf_counter()
    own.fused(*inputs)
    took = time.perf_counter() - started
    torch.cuda.synchronize(there)
    return took
