"""The part of ``selftest`` at the shapes of real work: Ideogram 4's rows, every tile, every dtype.

A kernel may be right at 33 x 200 x 768 and wrong where a tile is full, a row takes two blocks or a
sum passes 2^24. What is expected here is exact: sums of int8 products in fp64, which holds them
(127 * 128 * 53248 < 2^53), and rows in fp64. Errors are the largest of single values, so that one
wrong element of one tile shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ..ops import blocks, dispatch
from ..ops.grouped import int8_grid
from ..ops.kernels.configs import (
    FEED_FORWARD,
    HEAD,
    HIDDEN,
    TEXT_FEATURES,
    GemmConfig,
    gemm_candidates,
)
from ..ops.linear import int8_linear
from ..ops.reference import SCALE_FLOOR
from ..ops.rotation import hadamard

Check = tuple[str, str, float, Callable[[], float]]

DEPTHS = (HIDDEN, FEED_FORWARD, TEXT_FEATURES)
HALF_DEPTH = 73 * 64
"""A K for the tiles that are 64 deep: 128 does not divide it."""

COLUMNS = 328
"""Output channels: one tile of 256 and a ragged one, two of 128 and a ragged one."""

_ROWS = {"cpu": (16, 33)}
_ROWS_DEVICE = (16, 200, 1100)
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Beside the rounding to the dtype: the sum's to fp32, two scales and the bias.
_PRODUCT = 2.0**-22
# Of a row's largest value: the norm, SwiGLU and eight sums of a rotation in fp32.
_QUANTIZED = 4e-6
_RESIDUAL = 4e-6

_QUANTIZERS = (
    *(("smooth_rotate", k) for k in DEPTHS),
    ("rmsnorm_scale", HIDDEN),
    ("swiglu", FEED_FORWARD),
)
_GROUP = 256
_PACKED = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
_FEW = 5
# W4A8 with the codebook and without, W6A8, W4A4: bits, group (0: none), dtype of scales, codebook
_GRIDS = {
    "W4A8": (4, 16, torch.float8_e4m3fn, True),
    "W4A8, uniform": (4, 32, torch.float32, False),
    "W6A8": (6, 16, torch.float8_e4m3fn, False),
    "INT4 W4A4": (4, 0, None, False),
}


def row_counts(device: torch.device) -> tuple[int, ...]:
    """Tokens of the products: on a GPU one number a class of tiles, the last in two groups of them.

    A CPU has no tiles, and without int8 instructions it would take minutes: few rows there.
    """
    return _ROWS.get(device.type, _ROWS_DEVICE)


def checks(device: torch.device, names: Sequence[str], rows: Sequence[int]) -> Iterator[Check]:
    """(name, backend, allowed error, function that returns the error) of everything to check.

    ``names`` are backends that are there, ``rows`` the tokens of the products.
    """
    for name in names:
        for k, m, dtype in _products(rows):
            run = lambda n=name, k=k, m=m, d=dtype: _product(n, m, k, d, device)
            label = f"product {m} x {COLUMNS} x {k}, {DTYPES[dtype]}"
            yield label, name, _PRODUCT + EPS[dtype], run
        for m, tile in _other_tiles(name, device, rows):
            run = lambda n=name, m=m, t=tile: _product(n, m, HIDDEN, torch.bfloat16, device, t)
            label = f"product {m} x {COLUMNS} x {HIDDEN}, bf16, tile {tile}"
            yield label, name, _PRODUCT + EPS[torch.bfloat16], run
        for op, k in _QUANTIZERS:
            if not _has(name, f"{op}_quantize_rows", k, device):
                continue
            for dtype, short in DTYPES.items():
                run = lambda n=name, o=op, k=k, d=dtype: _quantizer(n, o, k, d, device)
                yield f"{op} to int8, K {k}, {short}", name, _QUANTIZED, run
        if _has(name, "gate_residual_rmsnorm", HIDDEN, device):
            for dtype, short in DTYPES.items():
                run = lambda n=name, d=dtype: _residual(n, d, device)
                label = f"gate and residual, K {HIDDEN}, {short}"
                yield label, name, _RESIDUAL + EPS[dtype], run
        if _has(name, "rms_rope", HEAD, device):
            for dtype, short in DTYPES.items():
                run = lambda n=name, d=dtype: _rope(n, d, device)
                yield f"q and k, heads of {HEAD}, {short}", name, _RESIDUAL + EPS[dtype], run
        if _has(name, "dequantize", HIDDEN, device):
            for qtype in blocks.PACKED:
                for dtype, short in DTYPES.items():
                    run = lambda n=name, q=qtype, d=dtype: _floats(n, q, d, device)
                    yield f"GGUF {qtype} to {short}, K {HIDDEN}", name, 0.0, run
        if _has(name, "dequantize_rotate_quantize", HIDDEN, device):
            for qtype in _PACKED:
                for k in DEPTHS:
                    run = lambda n=name, q=qtype, k=k: _decoder(n, q, k, device)
                    yield f"GGUF {qtype} to int8, K {k}", name, _QUANTIZED, run
        if _has(name, "int8_grid", HIDDEN, device):
            for kind in _GRIDS:
                for k in DEPTHS:
                    run = lambda n=name, i=kind, k=k: _grid(n, i, k, device)
                    yield f"{kind} to its int8 grid, K {k}", name, 0.0, run


def _products(rows: Sequence[int]) -> Iterator[tuple[int, int, torch.dtype]]:
    for k in DEPTHS:
        for m in rows:
            yield from ((k, m, dtype) for dtype in DTYPES)
    yield from ((HALF_DEPTH, m, torch.float32) for m in rows)


def tiles(capability: int, rows: Sequence[int]) -> list[tuple[int, GemmConfig]]:
    """(tokens, tile) of every tile that may be measured as the fastest, beside the first ones."""
    return [(m, tile) for m in rows for tile in gemm_candidates(capability, m, HIDDEN)[1:]]


def _other_tiles(
    name: str, device: torch.device, rows: Sequence[int]
) -> list[tuple[int, GemmConfig]]:
    if name != "triton" or device.type != "cuda":  # the interpreter has no tiles to choose from
        return []
    from ..ops.kernels import launch

    return tiles(launch.architecture(device), rows)


def _has(name: str, op: str, k: int, device: torch.device) -> bool:
    """Whether a backend has ``op`` of its own: the formula it falls back to is checked once."""
    return op in dispatch.choose(op, (_FEW, k, k), device, name).ops


# ---- one function a check: the largest error of a value against what is exact


def _product(
    name: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    tile: GemmConfig | None = None,
) -> float:
    q, scale_x, w, scale_w, bias = (t.to(device) for t in _factors(k, m))
    if name == "comfy_kitchen":  # it multiplies whole layers alone; these rows quantize exactly
        x = (q.float() * scale_x[:, None]).to(dtype)
        found = int8_linear(x, w, scale_w, bias, backend=name)
    else:
        run = dispatch.choose("int8_gemm", (m, COLUMNS, k), device, name).get("int8_gemm")
        chosen = {} if tile is None else {"config": tile}
        found = run(q, scale_x, w, scale_w, bias, dtype, **chosen)
    _, scale_x, _, scale_w, bias = _factors(k, m)
    product = _sums(k, m) * scale_x.double()[:, None] * scale_w.double()
    return _largest((found.cpu().double() - product - bias) / (product.abs() + bias.abs()))


def _quantizer(name: str, op: str, k: int, dtype: torch.dtype, device: torch.device) -> float:
    x, y = (_activations(k, seed).to(dtype) for seed in range(2))
    weight, scale = (randn(k, seed=seed).to(dtype) for seed in (2, 3))
    arguments, values = {
        "smooth_rotate": ((x,), lambda: x.double()),
        "rmsnorm_scale": (
            (x, weight, scale, 1e-5),
            lambda: _normed(x.double(), 1e-5) * weight.double() * scale.double(),
        ),
        "swiglu": ((x, y), lambda: torch.nn.functional.silu(x.double()) * y.double()),
    }[op]
    op = f"{op}_quantize_rows"
    run = dispatch.choose(op, (_FEW, k, k), device, name).get(op)
    found = run(*(there(a, device) for a in arguments), None, _GROUP)
    return _rows_error(found, _rotated(values()))


def _residual(name: str, dtype: torch.dtype, device: torch.device) -> float:
    x, y = (_activations(HIDDEN, seed).to(dtype) for seed in range(2))
    gate, weight = (randn(HIDDEN, seed=seed).to(dtype) for seed in (2, 3))
    op = "gate_residual_rmsnorm"
    run = dispatch.choose(op, (_FEW, HIDDEN, HIDDEN), device, name).get(op)
    found = run(*(t.to(device) for t in (x, gate, y, weight)), 1e-5)
    added = gate.double() * _normed(y.double(), 1e-5) * weight.double()
    size = (x.double().abs() + added.abs()).clamp_min(1e-3)
    return _largest((found.cpu().double() - x.double() - added) / size)


def _rope(name: str, dtype: torch.dtype, device: torch.device) -> float:
    """q and k as the qkv linear leaves them, 18 heads of a few tokens, against fp64."""
    heads, half = HIDDEN // HEAD, HEAD // 2
    q, k, _ = (30 * randn(1, _FEW, 3, heads, HEAD)).to(dtype).unbind(2)
    weights = [(1 + 0.2 * randn(HEAD, seed=seed)).to(dtype) for seed in (1, 2)]
    angles = 1000 * randn(1, _FEW, half, seed=3)
    cos, sin = angles.cos(), angles.sin()
    run = dispatch.choose("rms_rope", (_FEW, HEAD, HEAD), device, name).get("rms_rope")
    there_qkv = torch.stack((q, k, k), 2).to(device)
    moved = (t.to(device) for t in (*weights, cos, sin))
    found = run(there_qkv[:, :, 0], there_qkv[:, :, 1], *moved, 1e-5)
    errors = []
    for x, weight, one in zip((q, k), weights, found, strict=True):
        low, high = (_normed(x.double(), 1e-5) * weight.double()).chunk(2, -1)
        c, s = cos.double().unsqueeze(2), sin.double().unsqueeze(2)
        wanted = torch.cat((low * c - high * s, high * c + low * s), -1)
        size = torch.cat(2 * ((low.abs() + high.abs()),), -1).clamp_min(1e-3)
        errors.append(_largest((one.cpu().double() - wanted) / size))
    return max(errors)


def _floats(name: str, qtype: str, dtype: torch.dtype, device: torch.device) -> float:
    """0 where every bit is the formula's."""
    shape = (_FEW, HIDDEN)
    packed = blocks.quantize(randn(*shape, seed=1), qtype)
    run = dispatch.choose("dequantize", (_FEW, _FEW, HIDDEN), device, name).get("dequantize")
    found = run(packed.to(device), qtype, shape, dtype).cpu()
    return float(not torch.equal(found, blocks.dequantize(packed, qtype, shape, dtype)))


def _decoder(name: str, qtype: str, k: int, device: torch.device) -> float:
    packed, shape = blocks.quantize(randn(_FEW, k, seed=1), qtype), (_FEW, k)
    op = "dequantize_rotate_quantize"
    run = dispatch.choose(op, (_FEW, _FEW, k), device, name).get(op)
    found = run(packed.to(device), qtype, shape, _GROUP)
    return _rows_error(found, _rotated(blocks.dequantize(packed, qtype, shape).double()))


def _grid(name: str, kind: str, k: int, device: torch.device) -> float:
    """Of whole numbers: any difference is an error."""
    bits, group, dtype, coded = _GRIDS[kind]
    generator = torch.Generator().manual_seed(k)
    packed = torch.randint(0, 256, (_FEW, k * bits // 8), generator=generator, dtype=torch.uint8)
    s_rel = (4 + 12 * randn(_FEW, k // group, seed=1).abs()).to(dtype) if group else None
    codebook = randn(16, seed=2).sort().values * 8 if coded else None
    arguments = (packed.view(torch.int8), s_rel, codebook)
    run = dispatch.choose("int8_grid", (_FEW, _FEW, k), device, name).get("int8_grid")
    found = run(*(there(a, device) for a in arguments), group)
    return _largest(found.cpu().double() - int8_grid(*arguments, group).double())


# ---- inputs, and what is exact


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal fp32 from a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def there(value: object, device: torch.device) -> object:
    """A tensor on ``device``; what is no tensor, as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


@cache
def _both_sides(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    rows = max(*_ROWS["cpu"], *_ROWS_DEVICE)
    q = torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (COLUMNS, k), generator=generator, dtype=torch.int8)
    q[:, 0] = 127  # every row has its largest value, so that quantizing gives it back
    q[0], w[0] = 127, -128  # the largest sum there is
    return q, w


def _factors(k: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q [m, k]``, its scales, ``w [COLUMNS, k]``, its scales, a bias that bf16 holds exactly."""
    q, w = _both_sides(k)
    scale_x = 2.0 ** -(6.0 + torch.arange(m) % 4)
    scale_w = (0.5 + torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1))) / k**0.5 / 50
    bias = (torch.arange(COLUMNS) % 63 - 31.5) / 8
    return q[:m], scale_x, w, scale_w, bias


@cache
def _sums(k: int, m: int) -> Tensor:
    """``q @ w.T`` in fp64, exactly: a few columns at a time, or the copies would take gigabytes."""
    q, w = _both_sides(k)
    total = torch.zeros(m, COLUMNS, dtype=torch.float64)
    for a, b in zip(q[:m].split(4096, dim=1), w.split(4096, dim=1), strict=True):
        total += a.double() @ b.double().t()
    return total


def _activations(k: int, seed: int) -> Tensor:
    x = randn(_FEW, k, seed=seed)
    x[:, ::97] *= 30  # outlier channels, and a row of zeros
    x[_FEW // 2] = 0
    return x


def _normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _rotated(x: Tensor) -> Tensor:
    """One product with the whole matrix of a group, where the kernels take a few sums."""
    return (x.reshape(-1, _GROUP) @ hadamard(_GROUP, "cpu", torch.float64)).reshape(x.shape)


def _rows_error(found: tuple[Tensor, Tensor], values: Tensor) -> float:
    """The larger of the scales' error and of what q is off beyond half a step, of 127 steps."""
    q, scale = (t.cpu().double() for t in found)
    exact = (values.abs().amax(1) / 127).clamp_min(SCALE_FLOOR)
    off = (q - values / exact[:, None]).abs() - 0.5
    return _largest(torch.cat((scale / exact - 1, off.clamp_min(0).flatten() / 127)))


def _largest(errors: Tensor) -> float:
    """NaN where there is one."""
    return errors.abs().max().item()
