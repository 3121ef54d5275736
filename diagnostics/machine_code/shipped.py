"""Every specialization of every kernel that a user's card may run: what the offline proof compiles.

The shapes are those of Ideogram 4: rows of 4608 (hidden), 12288 (SwiGLU), 4096 (text encoder) and
53248 (``llm_cond_proj``), in bf16; the tiles and the kernels of every step in fp16 and fp32 too.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...ops.blocks import FORMATS
from ...ops.kernels.configs import (
    DECODED,
    FEED_FORWARD,
    GEMM_CONFIGS,
    HEAD,
    HIDDEN,
    MAX_ROW,
    ROPE_ROWS,
    ROPE_WARPS,
    TEXT_ENCODER,
    TEXT_FEATURES,
    GemmConfig,
    row_blocks,
)
from ...ops.kernels.gguf import PACKED
from ...ops.kernels.packed import GRID_BLOCK, GRID_WARPS
from .offline import Variant

BF16, OTHERS = "bf16", ("fp16", "fp32")
"""Triton's names of the dtypes a host computes in; the labels leave out bf16, which is usual."""

_GEMM_ARGUMENTS = {
    "a_ptr": "*i8",
    "b_ptr": "*i8",
    "c_ptr": "*bf16",
    "scale_a_ptr": "*fp32",
    "scale_b_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "stride_a": "i32",
    "stride_b": "i32",
    "stride_c": "i32",
}


def _in_dtype(signature: dict[str, str], dtype: str) -> dict[str, str]:
    """The same arguments with ``dtype`` for bf16."""
    return {name: f"*{dtype}" if kind == "*bf16" else kind for name, kind in signature.items()}


def _suffix(dtype: str) -> str:
    return "" if dtype == BF16 else f" {dtype}"


def gemm_variant(config: GemmConfig, *, bias: bool = True, dtype: str = BF16) -> Variant:
    """``int8_gemm`` with one tiling, outputs and bias in ``dtype``, any M (number of tokens)."""
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "HAS_BIAS": bias,
    }
    divisible = tuple(name for name in _GEMM_ARGUMENTS if name != "M")
    return Variant(
        "gemm",
        "int8_gemm_kernel",
        f"{config}" + ("" if bias else " no bias") + _suffix(dtype),
        _in_dtype(_GEMM_ARGUMENTS, dtype),
        constants,
        divisible,
        config.num_warps,
        config.num_stages,
    )


def gemm_variants(arch: int) -> Iterator[Variant]:
    """Every tiling in the table of ``arch``, each once: in every dtype, and without a bias."""
    classes = GEMM_CONFIGS[arch].values()
    for config in dict.fromkeys(config for candidates in classes for config in candidates):
        yield from (gemm_variant(config, dtype=dtype) for dtype in (BF16, *OTHERS))
        yield gemm_variant(config, bias=False)


def _row_label(k: int, rotation: int, smooth: bool) -> str:
    parts = [f"K {k}"]
    if rotation:
        parts.append(f"rotation {rotation}")
    if smooth:
        parts.append("smooth")
    return " ".join(parts)


def quantize_variant(
    k: int, *, swiglu: bool, rotation: int, smooth: bool, dtype: str = BF16
) -> Variant:
    """``quantize_rows``, ``smooth_rotate_quantize_rows`` and ``swiglu_quantize_rows``."""
    cover, num_warps = row_blocks(k)
    signature = {
        "x_ptr": "*bf16",
        "up_ptr": "*bf16",
        "smooth_ptr": "*fp32",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "stride_x": "i32",
        "stride_up": "i32",
    }
    return Variant(
        "rows",
        "quantize_long_rows_kernel" if k > MAX_ROW else "quantize_rows_kernel",
        ("swiglu " if swiglu else "") + _row_label(k, rotation, smooth) + _suffix(dtype),
        _in_dtype(signature, dtype),
        cover | {"SWIGLU": swiglu, "HAS_SMOOTH": smooth, "ROTATION": rotation},
        tuple(signature),
        num_warps,
    )


def rmsnorm_variant(k: int, *, rotation: int, smooth: bool, dtype: str = BF16) -> Variant:
    """``rmsnorm_scale_quantize_rows``."""
    cover, num_warps = row_blocks(k)
    signature = {
        "x_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "modulation_ptr": "*bf16",
        "smooth_ptr": "*fp32",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "stride_x": "i32",
        "stride_modulation": "i32",
        "rows_per_modulation": "i32",
        "eps": "fp32",
    }
    return Variant(
        "norms",
        "rmsnorm_scale_quantize_rows_kernel",
        _row_label(k, rotation, smooth) + _suffix(dtype),
        _in_dtype(signature, dtype),
        cover | {"HAS_SMOOTH": smooth, "ROTATION": rotation},
        tuple(n for n in signature if n not in ("rows_per_modulation", "eps")),
        num_warps,
    )


def residual_variant(k: int, dtype: str = BF16) -> Variant:
    """``gate_residual_rmsnorm``."""
    cover, num_warps = row_blocks(k)
    signature = {
        "x_ptr": "*bf16",
        "gate_ptr": "*bf16",
        "y_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "out_ptr": "*bf16",
        "stride_x": "i32",
        "stride_gate": "i32",
        "stride_y": "i32",
        "rows_per_gate": "i32",
        "eps": "fp32",
    }
    return Variant(
        "norms",
        "gate_residual_rmsnorm_kernel",
        _row_label(k, 0, False) + _suffix(dtype),
        _in_dtype(signature, dtype),
        cover,
        tuple(n for n in signature if n not in ("rows_per_gate", "eps")),
        num_warps,
    )


def rope_variant(*, interleaved: bool, dtype: str = BF16) -> Variant:
    """``rms_rope`` of heads of 256; ``interleaved``: the host's table of 2 x 2 matrices."""
    pointers = ("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr")
    strides = tuple(f"stride_{t}_{d}" for t in "qk" for d in ("batch", "token", "head"))
    table = tuple(f"stride_table_{d}" for d in ("batch", "token", "pair"))
    signature = {
        **dict.fromkeys(pointers, f"*{dtype}"),
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "q_out_ptr": f"*{dtype}",
        "k_out_ptr": f"*{dtype}",
        **dict.fromkeys(("rows", "length", "heads", *strides, *table), "i32"),
        "eps": "fp32",
    }
    constants = {"HALF": HEAD // 2, "WIDTH": HEAD // 2, "ROWS": ROPE_ROWS}
    if not interleaved:
        del signature["stride_table_pair"]
        constants["stride_table_pair"] = 1
    uneven = {"rows", "length", "heads", "eps", "stride_table_pair"}
    if interleaved:
        uneven.add("sin_ptr")  # the third of four numbers
    return Variant(
        "rope",
        "rms_rope_kernel",
        f"D {HEAD}" + (" 2 x 2" if interleaved else "") + _suffix(dtype),
        signature,
        constants,
        tuple(name for name in signature if name not in uneven),
        ROPE_WARPS,
    )


def dequantize_variant(k: int, qtype: str, *, rotation: int) -> Variant:
    """``dequantize_rotate_quantize``; rows of most formats are multiples of 16 B."""
    cover, num_warps = row_blocks(k)
    signature = {"bytes_ptr": "*u8", "q_ptr": "*i8", "scale_ptr": "*fp32", "stride_bytes": "i32"}
    row_bytes = FORMATS[qtype].row_bytes(k)
    divisible = [n for n in signature if n != "stride_bytes" or row_bytes % 16 == 0]
    return Variant(
        "gguf",
        "dequantize_long_rows_kernel" if k > MAX_ROW else "dequantize_rotate_quantize_kernel",
        f"{qtype} {_row_label(k, rotation, False)}",
        signature,
        cover | {"FORMAT": qtype, "ROTATION": rotation},
        tuple(divisible),
        num_warps,
    )


def dequantize_variants() -> Iterator[Variant]:
    """Every block format at the model's widths, and without rotation for odd ones."""
    for qtype in PACKED:
        for k in (HIDDEN, FEED_FORWARD, TEXT_FEATURES):
            yield dequantize_variant(k, qtype, rotation=256)
    for qtype in ("Q8_0", "Q4_K"):
        yield dequantize_variant(HIDDEN, qtype, rotation=0)


def floats_variant(qtype: str, dtype: str = BF16) -> Variant:
    """``dequantize``: blocks of any number to ``dtype``, no product fused with a sum."""
    fmt = FORMATS[qtype]
    return Variant(
        "gguf_floats",
        "dequantize_kernel",
        f"{qtype}{_suffix(dtype)}",
        {"bytes_ptr": "*u8", "out_ptr": f"*{dtype}", "total": "i32"},
        {
            "BLOCK": DECODED.head,
            "BLOCK_BYTES": DECODED.head // fmt.block_size * fmt.type_size,
            "FORMAT": qtype,
        },
        ("bytes_ptr", "out_ptr", "total"),
        DECODED.num_warps,
        fp_fusion=False,
    )


def floats_variants() -> Iterator[Variant]:
    """Every block format to every dtype."""
    for qtype in PACKED:
        yield from (floats_variant(qtype, dtype) for dtype in (BF16, *OTHERS))


def grid_variant(k: int, *, bits: int, group: int) -> Variant:
    """``int8_grid``: W4A8 with the codebook, W6A8 without; ``group`` 0 is W4A4's signed codes."""
    signature = {
        "packed_ptr": "*u8",
        "s_rel_ptr": "*u8",
        "codebook_ptr": "*fp32" if bits == 4 and group else "*u8",
        "out_ptr": "*i8",
        "stride_packed": "i32",
    }
    return Variant(
        "packed",
        "int8_grid_kernel",
        f"{bits} bits g{group} K {k}",
        signature,
        {
            "K": k,
            "BLOCK": GRID_BLOCK,
            "GROUP": group,
            "SIX_BITS": bits == 6,
            "HAS_CODEBOOK": bits == 4 and group > 0,
            "E4M3_SCALES": group > 0,
        },
        tuple(signature),
        GRID_WARPS,
    )


def grid_variants() -> Iterator[Variant]:
    """The packed int8 layouts at the model's widths."""
    for k in (HIDDEN, FEED_FORWARD):
        for bits, group in ((4, 16), (4, 32), (6, 16), (4, 0)):
            yield grid_variant(k, bits=bits, group=group)


def row_variants() -> Iterator[Variant]:
    """The row kernels at the model's widths; they are the same on every architecture."""
    for k in (HIDDEN, FEED_FORWARD, TEXT_ENCODER):
        yield quantize_variant(k, swiglu=False, rotation=0, smooth=False)
        yield quantize_variant(k, swiglu=False, rotation=256, smooth=False)
    yield quantize_variant(HIDDEN, swiglu=False, rotation=0, smooth=True)
    yield quantize_variant(HIDDEN, swiglu=False, rotation=64, smooth=False)
    for smooth, rotation in ((False, 0), (False, 256), (True, 0), (True, 256)):
        yield quantize_variant(FEED_FORWARD, swiglu=True, rotation=rotation, smooth=smooth)
        yield rmsnorm_variant(HIDDEN, rotation=rotation, smooth=smooth)
    yield residual_variant(HIDDEN)
    yield quantize_variant(TEXT_FEATURES, swiglu=False, rotation=256, smooth=False)
    for dtype in OTHERS:
        for k in (HIDDEN, FEED_FORWARD, TEXT_FEATURES):
            yield quantize_variant(k, swiglu=False, rotation=256, smooth=False, dtype=dtype)
        yield quantize_variant(FEED_FORWARD, swiglu=True, rotation=256, smooth=False, dtype=dtype)
        yield rmsnorm_variant(HIDDEN, rotation=256, smooth=False, dtype=dtype)
        yield residual_variant(HIDDEN, dtype)
    for dtype in (BF16, *OTHERS):
        yield from (rope_variant(interleaved=known, dtype=dtype) for known in (False, True))
    yield from dequantize_variants()
    yield from floats_variants()
    yield from grid_variants()


def variants(arch: int) -> Iterator[Variant]:
    """Everything that ``sm_arch`` may run."""
    yield from gemm_variants(arch)
    yield from row_variants()
