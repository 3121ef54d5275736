"""Linear layers on quantized weights: checked entry points over ``ops.dispatch``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OpError
from . import adapters, decoding, dispatch, prequantized
from .chunks import MULTIPLIED, row_chunks
from .fused import Activation
from .gguf_compute import compute_here, resolve_compute
from .library import define
from .rotation import check_group, largest_group

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

COMPUTES = ("auto", "w8a8", "dense")
"""Through int8 activations, or decoded and multiplied in the dtype of the activations."""


@dataclass(frozen=True)
class LinearOptions:
    """How ``linear`` computes.

    ``backend``: ``"auto"`` or a name of ``dispatch.reports``. ``gguf_compute``: ``"w8a8"`` (int8
    tensor cores), ``"dense"`` (decode to the dtype of the activations) or ``"auto"`` (w8a8 for
    formats of 2 to 5 bits with in_features a multiple of 256, else dense; dense for few tokens).
    ``int8_compute``: the same for weights on an int8 grid (INT8, W4A8, W6A8, INT4); ``"auto"`` is
    w8a8 but for weights whose file wants the other. Raises OpError for another word there.
    """

    backend: str = dispatch.AUTO
    gguf_compute: str = "auto"
    int8_compute: str = COMPUTES[0]

    def __post_init__(self) -> None:
        if self.int8_compute not in COMPUTES:
            raise OpError(
                "unknown compute mode of int8 weights",
                found=repr(self.int8_compute),
                needed=" or ".join(COMPUTES),
            )

    def int8_dense(self, wish: bool = False) -> bool:
        """Whether a weight on an int8 grid is decoded, so that no activation is rounded.

        ``wish``: its file says so.
        """
        return self.int8_compute == "dense" or (self.int8_compute == "auto" and wish)


def linear(
    x: Tensor | Activation,
    weight: Tensor,
    bias: Tensor | None = None,
    options: LinearOptions = LinearOptions(),
) -> Tensor:
    """``x @ weight.T + bias`` for a weight of any layout or none, in the dtype of ``x``.

    ``x [..., K]``, ``weight [N, K]`` a Tensor or a QuantizedTensor -> ``[..., N]``. Where ``x``
    needs a gradient it gets the one of the dequantized weight; where it is an ``Activation`` it is
    quantized for the layout in the op that computes it. Raises OpError for arguments that do not
    fit each other, BackendUnavailableError for a backend that is not there.
    """
    if isinstance(x, Activation):
        product = _product(x, weight, bias, options)
        return linear(x.dense(), weight, bias, options) if product is None else product
    own = getattr(getattr(weight, "layout_cls", None), "linear", None)
    if own is not None and not (x.requires_grad and torch.is_grad_enabled()):
        return own(x, weight, bias, options)
    _check_activations(x, weight, (*ACTIVATION_DTYPES, torch.float64))
    _check_in_features(x, weight.shape[1])
    _check_vector("bias", bias, weight.shape[0], x)
    if own is None and not hasattr(weight, "layout_cls"):
        weight = weight.to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _product(
    x: Activation, weight: Tensor, bias: Tensor | None, options: LinearOptions
) -> Tensor | None:
    """``linear`` by quantized rows, or with the input made inside; None where it takes values."""
    layout = getattr(weight, "layout_cls", None)
    recipe = getattr(layout, "input_recipe", None)
    if recipe is None or 0 in x.shape or x.shape[-1] != weight.shape[1]:
        return None
    found = recipe(weight, math.prod(x.shape[:-1]), x.dtype, options)
    if found is None:
        return None
    whole = options.backend in prequantized.WHOLE_LAYERS_ONLY
    if whole or (options.backend == dispatch.AUTO and not x.rows_pay(weight.shape[0], *found)):
        operands = getattr(layout, "int8_operands", None)
        smooth, rotation = found
        if operands is None or smooth is not None:
            return None
        return x.within(*operands(weight), bias, rotation, options.backend)
    q, scale = x.rows(*found, options.backend)
    out = layout.multiply_rows(q, scale, weight, bias, x.dtype, options)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    rotation: int | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """``quantize(R(x / smooth)) @ weight.T * scales + bias``: see ``reference.int8_linear``.

    ``x [..., K]`` bf16, fp16 or fp32; ``weight int8 [N, K]``; ``weight_scale fp32 [N]`` or
    ``[N, 1]``; ``bias [N]``; ``smooth [K]`` -> ``[..., N]`` in the dtype of ``x``. Raises OpError
    for what does not fit; the *values* of scales are checked when a weight is made
    (``layouts.int8_tensor(..., validate=True)``), since looking at them waits for the device.
    """
    _check_activations(x, weight)
    n, k = weight.shape
    if weight.dtype != torch.int8:
        raise OpError("the weight is not int8", found=weight.dtype, needed=torch.int8)
    _check_in_features(x, k)
    _check_vector("weight_scale", weight_scale, n, x)
    _check_vector("bias", bias, n, x)
    _check_vector("smooth", smooth, k, x)
    if rotation is not None:
        check_group(k, rotation)
    if backend != dispatch.AUTO and not torch.compiler.is_compiling():
        dispatch.choose("int8_linear", (x.numel() // k, n, k), x.device, backend)
    scale = weight_scale.reshape(n).float()
    return _int8_linear_op(x, weight, scale, bias, smooth, rotation or 0, backend)


def gguf_linear(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    compute: str = "auto",
    rotation: int | None = None,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """``x @ dequantize(blocks).T + bias`` with the weight kept packed: see ``reference``.

    ``x [..., K]``, ``blocks uint8 [N, row_bytes]`` of format ``qtype``, ``shape (N, K)``, ``bias
    [N]`` -> ``[..., N]`` in the dtype of ``x``. ``compute`` as ``LinearOptions.gguf_compute``;
    ``rotation`` None takes the largest group up to 256 that divides K. Raises OpError for what does
    not fit. Decoded weights live for one call: on a GPU in memory that its caching allocator hands
    to the next layer, on a CPU a few rows at a time.
    """
    from .blocks import FORMATS

    _check_activations(x, blocks)
    n, k = shape
    _check_in_features(x, k)
    fmt = FORMATS.get(qtype)
    if fmt is None:
        raise OpError("unknown GGUF format", found=repr(qtype), needed=f"one of {list(FORMATS)}")
    row_bytes = k // fmt.block_size * fmt.type_size
    if blocks.dtype != torch.uint8 or tuple(blocks.shape) != (n, row_bytes):
        raise OpError(
            f"the {qtype} blocks do not fit a weight of shape {(n, k)}",
            found=f"{blocks.dtype} {tuple(blocks.shape)}",
            needed=f"torch.uint8 {(n, row_bytes)}",
        )
    _check_vector("bias", bias, n, x)
    resolve_compute(compute, qtype, k)
    if rotation is None:
        rotation = largest_group(k)
    else:
        check_group(k, rotation)
    if backend != dispatch.AUTO and not torch.compiler.is_compiling():
        dispatch.choose("int8_linear", (x.numel() // k, n, k), x.device, backend)
    return _gguf_linear_op(x, blocks, qtype, bias, compute, rotation or 0, backend)


# ---- checks


def _check_activations(
    x: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...] = ACTIVATION_DTYPES
) -> None:
    if x.dtype not in dtypes:
        raise OpError("x has a dtype that is not computed", found=x.dtype, needed=dtypes)
    if x.dim() == 0 or x.shape[-1] == 0 or weight.dim() != 2:
        raise OpError(
            "a linear layer needs x [..., K] and a weight [N, K], K > 0",
            found=f"x {tuple(x.shape)}, weight {tuple(weight.shape)}",
        )
    if weight.device != x.device:
        raise OpError("x and weight lie on different devices", found=weight.device, needed=x.device)


def _check_in_features(x: Tensor, k: int) -> None:
    if x.shape[-1] != k:
        raise OpError(
            "in_features of x and weight differ", found=f"x {tuple(x.shape)}", needed=f"[..., {k}]"
        )


def _check_vector(name: str, values: Tensor | None, size: int, x: Tensor) -> None:
    if values is None:
        return
    if values.numel() != size or not values.is_floating_point():
        raise OpError(
            f"{name} does not fit",
            found=f"{values.dtype} {tuple(values.shape)}",
            needed=f"floating point [{size}]",
        )
    if values.device != x.device:
        raise OpError(f"{name} lies on another device", found=values.device, needed=x.device)


# ---- implementations behind the custom ops


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    smooth: Tensor | None,
    rotation: int,
    backend: str,
) -> Tensor:
    n, k = weight.shape
    rows = x.reshape(-1, k).contiguous()
    weight = weight.contiguous()
    if not rows.numel() or not n:
        return x.new_empty((*x.shape[:-1], n))
    # A backend that only has the whole layer would have to smooth outside its quantizer, and to
    # rotate there in groups that its kernels do not know.
    within = smooth is None and rotation in (0, *adapters.KITCHEN_GROUPS)
    wanted = "int8_linear" if within else "int8_gemm"
    chosen = dispatch.choose(
        wanted, (rows.shape[0], n, k), x.device, backend, dtype=x.dtype, rotation=rotation
    )
    whole = chosen.ops.get("int8_linear")
    if whole is not None:
        out = whole(rows, weight, weight_scale, bias, smooth=smooth, rotation=rotation or None)
    else:
        quantize = chosen.get("smooth_rotate_quantize_rows")
        q, scale_x = quantize(rows, smooth, rotation or None)
        out = chosen.get("int8_gemm")(q, scale_x, weight, weight_scale, bias, x.dtype)
    return out.reshape(*x.shape[:-1], n)


def _gguf_linear(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    bias: Tensor | None,
    compute: str,
    rotation: int,
    backend: str,
) -> Tensor:
    n, k = blocks.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    if not rows.numel() or not n:
        return x.new_empty((*x.shape[:-1], n))
    shape = (rows.shape[0], n, k)
    if compute_here(compute, qtype, shape, x.device, x.dtype, backend) == "dense":
        out = _gguf_dense(rows, blocks, qtype, bias, backend)
    else:
        out = _gguf_w8a8(rows, blocks, qtype, bias, rotation or None, backend)
    return out.reshape(*x.shape[:-1], n)


def _gguf_w8a8(
    x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None, rotation: int | None, backend: str
) -> Tensor:
    """``x [M, K]`` through int8: on a CPU a few output channels at a time, else in one go."""
    n, (m, k) = blocks.shape[0], x.shape
    op = "dequantize_rotate_quantize"
    if x.device.type != "cpu":
        # comfy-kitchen multiplies but does not decode: the best decoder serves it.
        decoder = dispatch.AUTO if backend == "comfy_kitchen" else backend
        decode = dispatch.choose(op, (m, n, k), x.device, decoder).get(op)
        q, scale = decode(blocks, qtype, (n, k), rotation)
        return _int8_linear(x, q, scale, bias, None, rotation or 0, backend)
    q, scale = prequantized.quantize_rows(x, None, rotation, backend)
    return prequantized.gguf_product(q, scale, blocks, qtype, bias, rotation, x.dtype, backend)


def _gguf_dense(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None, backend: str) -> Tensor:
    """``x [M, K]`` against the decoded weight in x's dtype; on a CPU in fp32, faster there."""
    from .blocks import dequantize

    n, (m, k) = blocks.shape[0], x.shape
    if x.device.type != "cpu":
        weight = decoding.dequantize(blocks, qtype, (n, k), x.dtype, backend)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    values = x.float()
    out = torch.empty((m, n), dtype=x.dtype)
    for rows in row_chunks((n, k), values=MULTIPLIED):
        weight = dequantize(blocks[rows], qtype, (rows.stop - rows.start, k))
        out[:, rows] = F.linear(values, weight, None if bias is None else bias[rows].float())
    return out


def _int8_linear_fake(x, weight, weight_scale, bias, smooth, rotation, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _gguf_linear_fake(x, blocks, qtype, bias, compute, rotation, backend):
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


_int8_linear_op = define(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? smooth, int rotation,"
    " str backend) -> Tensor",
    _int8_linear,
    _int8_linear_fake,
)
_gguf_linear_op = define(
    "gguf_linear",
    "(Tensor x, Tensor blocks, str qtype, Tensor? bias, str compute, int rotation, str backend)"
    " -> Tensor",
    _gguf_linear,
    _gguf_linear_fake,
)
