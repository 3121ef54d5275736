"""What there is to measure for a model: its kinds of linears, and the candidates of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import attention, dispatch, fused, prequantized
from ..chunks import CACHED, tile_values
from ..gguf_compute import FEW_TOKENS, W8A8_FORMATS
from ..linear import LinearOptions, gguf_linear, int8_linear
from ..rotation import largest_group
from . import choices, kernel_jobs
from .choices import ATTENTION, FUSED, GGUF, LINEAR, Key, dtype_name
from .job import Job, random_values, some_rows

# 1024 px with its text, 512 px, and few tokens. A CPU takes one count, or it would take minutes.
_TOKENS = {"cpu": (512,)}
_TOKENS_DEVICE = (4608, 1536, 512)
# From many to few: where decoding to floats has won, it wins for fewer tokens too.
_GGUF_TOKENS = (2048, 512, 256, 128, FEW_TOKENS)
_ERROR_TOKENS = 512
# Products whose int32 sums are written out, and whose quantizers may be formulas.
_IN_TILES = ("int_mm", dispatch.REFERENCE.name)


@dataclass(frozen=True)
class Layer:
    """A kind of linear: ``"int8"`` or a GGUF format, ``[n, k]``, its rotation (0: none)."""

    kind: str
    n: int
    k: int
    rotation: int = 0


def layers_of(weights: Iterable[Tensor]) -> tuple[Layer, ...]:
    """The distinct kinds of quantized linears among ``weights``, those with most weights first."""
    counts: Counter[Layer] = Counter()
    for weight in weights:
        params = getattr(weight, "_params", None)
        shape = getattr(params, "matrix_shape", None)
        if shape is None:
            continue
        n, k = shape
        if hasattr(params, "qtype"):
            counts[Layer(params.qtype, n, k)] += n * k
        elif hasattr(params, "rotation"):
            counts[Layer("int8", n, k, params.rotation or 0)] += n * k
    return tuple(layer for layer, _ in counts.most_common())


def inputs_of(weights: Mapping[str, Tensor]) -> tuple[tuple[str, Layer], ...]:
    """The linears that ``fused.block`` makes the input of: (its kind, the layer), each once."""
    found: dict[tuple[str, Layer], None] = {}
    for module, kind in fused.INPUTS.items():
        own = (weight for name, weight in weights.items() if name.endswith(f".{module}.weight"))
        found |= {(kind, layer): None for layer in layers_of(own)}
    return tuple(found)


def jobs(
    layers: Iterable[Layer],
    device: torch.device,
    dtype: torch.dtype,
    options: LinearOptions,
    heads: tuple[int, int] | None,
    memory: int,
    inputs: Iterable[tuple[str, Layer]] = (),
    rope: tuple[int, int] | None = None,
) -> Iterator[Job]:
    """Everything that is left to ``"auto"`` and has more than one candidate, in order of weight.

    Each is cut to fit ``memory`` bytes, where it can be. What one is depends on the results of
    those before it, which the caller is to ``choices.remember``.
    """
    layers = tuple(layers)
    tokens = _TOKENS.get(device.type, _TOKENS_DEVICE)
    for count in tokens:
        if options.backend == dispatch.AUTO:
            for layer in dict.fromkeys(_int8_layer(layer, options) for layer in layers):
                if layer is not None:
                    yield from kernel_jobs.tile_job(layer.n, layer.k, device, dtype, count, memory)
                    yield from _linear_job(layer, device, dtype, count, memory)
            for kind, layer in dict.fromkeys((i, _int8_layer(own, options)) for i, own in inputs):
                if layer is not None:
                    yield from _fused_job(kind, layer, device, dtype, count, memory)
        if heads is not None:
            yield from _attention_job(heads, device, dtype, count)
        if rope is not None:
            yield from kernel_jobs.rope_job(rope, device, dtype, count)
    if (options.backend, options.gguf_compute) != (dispatch.AUTO, "auto"):
        return
    for layer in layers:
        if layer.kind in W8A8_FORMATS and layer.k % 256 == 0:
            counts = [_gguf_job(layer, device, dtype, count, memory) for count in _GGUF_TOKENS]
            for index, job in enumerate(counts):
                yield replace(job, after=tuple(more.key for more in counts[:index]))


def _int8_layer(layer: Layer, options: LinearOptions) -> Layer | None:
    """The int8 product that a layer runs as; None for one that is computed densely."""
    if layer.kind == "int8":
        return None if options.int8_dense() else layer
    through_int8 = options.gguf_compute == "w8a8" or (
        options.gguf_compute == "auto" and layer.kind in W8A8_FORMATS and layer.k % 256 == 0
    )
    return Layer("int8", layer.n, layer.k, largest_group(layer.k) or 0) if through_int8 else None


def _linear_job(
    layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, memory: int
) -> Iterator[Job]:
    n, k, rotation = layer.n, layer.k, layer.rotation or None
    names = dispatch.candidates("int8_linear", device)
    if len(names) < 2:
        return
    formula = dispatch.REFERENCE.name in names
    # x and its int8 copy; a channel's weights, and its outputs as int32, fp32 and in dtype
    fixed = tokens * k * (dtype.itemsize + 1) + _fp32_copies(tokens * k, device, formula)
    each = k * (1 + 4 * formula) + tokens * (8 + dtype.itemsize)
    rows = some_rows(n, k, device, (memory - fixed) // each)

    def make(count: int) -> Mapping[str, Callable[[], Tensor]]:
        x = random_values((count, k), device, dtype)
        weight = random_values((rows, k), device, torch.int8)
        scale = torch.full((rows,), 1e-3, device=device)
        run = lambda name: int8_linear(x, weight, scale, rotation=rotation, backend=name)
        return {name: lambda name=name: run(name) for name in names}

    key = Key(LINEAR, n, k, choices.rounded(tokens), dtype_name(dtype), str(layer.rotation))
    yield Job(key, names, fixed + rows * each, make, scale=n / rows)


def _fused_job(
    kind: str, layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, memory: int
) -> Iterator[Job]:
    """Rows for the best product against values for the best linear, where that cannot be split."""
    n, k, rotation = layer.n, layer.k, layer.rotation or None
    best = {
        op: dispatch.choose(op, (tokens, n, k), device, dtype=dtype, rotation=layer.rotation).name
        for op in ("int8_linear", "int8_gemm")
    }
    if best["int8_linear"] not in prequantized.WHOLE_LAYERS_ONLY:
        return
    # never cut: the input would weigh too much beside a part of the product
    made, out = tokens * k * dtype.itemsize, tokens * n * dtype.itemsize
    held = 2 * made + tokens * k + n * k + out
    if best["int8_gemm"] in _IN_TILES:
        held += _fp32_copies(tokens * k, device, formula=True) + 8 * tokens * n
    nbytes = max(held, 3 * made)
    if nbytes > memory:
        return

    def make(count: int) -> Mapping[str, Callable[[], Tensor]]:
        x, one = random_values((count, k), device, dtype), torch.ones(k, device=device, dtype=dtype)
        weight = random_values((n, k), device, torch.int8)
        scale = torch.full((n,), 1e-3, device=device)
        users = 2 if kind == fused.NORMED_SHARED else 1

        def run(multiply: Callable[[fused.Activation], Tensor]) -> Tensor:
            gated = kind == fused.GATED
            h = fused.Gated(x, x) if gated else fused.Normed(x, one, one, 1e-5, users=users)
            for _ in range(users):
                out = multiply(h)
            return out

        def rows(h: fused.Activation) -> Tensor:
            q, scale_x = h.rows(None, rotation, dispatch.AUTO)
            name = best["int8_gemm"]
            return prequantized.int8_product(q, scale_x, weight, scale, None, dtype, name)

        def values(h: fused.Activation) -> Tensor:
            name = best["int8_linear"]
            found = h.within(weight, scale, None, rotation, name)
            if found is not None:
                return found
            return int8_linear(h.dense(), weight, scale, rotation=rotation, backend=name)

        return {choices.ROWS: lambda: run(rows), choices.VALUES: lambda: run(values)}

    detail = fused.fused_detail(kind, rotation)
    key = Key(FUSED, n, k, choices.rounded(tokens), dtype_name(dtype), detail)
    yield Job(key, (choices.ROWS, choices.VALUES), nbytes, make)


def _gguf_job(
    layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, memory: int
) -> Job:
    from ..blocks import FORMATS

    n, k = layer.n, layer.k
    # as above; a weight is packed, in dtype, and on its way in fp32, a chunk at a time for int8
    fixed = tokens * k * (dtype.itemsize + 1) + _fp32_copies(tokens * k, device)
    fixed += 3 * 4 * min(n * k, CACHED)
    each = k * (1 + dtype.itemsize + 4) + tokens * (8 + dtype.itemsize)
    rows = some_rows(n, k, device, (memory - fixed) // each)
    fmt = FORMATS[layer.kind]

    def make(count: int) -> Mapping[str, Callable[[], Tensor]]:
        x = random_values((count, k), device, dtype)
        shape = (rows, k // fmt.block_size * fmt.type_size)
        blocks = torch.zeros(shape, device=device, dtype=torch.uint8)  # as slow as any values
        backend = dispatch.choose("int8_linear", (count, n, k), device, dtype=dtype).name
        run = lambda how: gguf_linear(
            x, blocks, layer.kind, (rows, k), compute=how, backend=backend
        )
        return {how: lambda how=how: run(how) for how in ("w8a8", "dense")}

    key = Key(GGUF, n, k, tokens, dtype_name(dtype), layer.kind)
    return Job(key, ("w8a8", "dense"), fixed + rows * each, make, scale=n / rows)


def _attention_job(
    heads: tuple[int, int], device: torch.device, dtype: torch.dtype, tokens: int
) -> Iterator[Job]:
    names = attention.candidates(device)
    if len(names) < 2:
        return
    number, size = heads

    def inputs(count: int) -> tuple[Tensor, ...]:
        shape = (1, number, count, size)
        return tuple(random_values(shape, device, dtype, seed) for seed in range(3))

    def make(count: int) -> Mapping[str, Callable[[], Tensor]]:
        q, k, v = inputs(count)
        return {name: lambda name=name: attention.BACKENDS[name](q, k, v) for name in names}

    def errors() -> Mapping[str, float]:
        return attention.errors(*inputs(_ERROR_TOKENS), names)

    nbytes = tokens * number * size * (4 * dtype.itemsize + 3)
    key = Key(ATTENTION, number, size, choices.rounded(tokens), dtype_name(dtype))
    yield Job(key, names, nbytes, make, errors=errors)


def _fp32_copies(values: int, device: torch.device, formula: bool = False) -> int:
    """Bytes of activations on their way to int8; the reference ``formula`` takes all at once."""
    return 3 * 4 * (values if formula else min(values, tile_values(device)))
