"""The systems of the table: how each stores the linears of the blocks, as data.

All of them quantize the same 24 linears a copy (those in the blocks) and leave the 7 of the stem in
bf16, so that rows differ by the treatment alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ...checkpoint.canonical import is_linear
from ...ops.blocks import quantize
from ...ops.grouped import int8_grid
from ...ops.layouts import (
    FP8Layout,
    GGUFLayout,
    Int8Layout,
    NF4Layout,
    NVFP4Layout,
    W4A4Layout,
    W4A8Layout,
    Weight,
    gguf_tensor,
    int8_tensor,
    w4a8_tensor,
)
from ...ops.layouts.packed import PackedLayout
from ...ops.reference import dequantize_rotate_quantize
from ...quant.calibration import Calibration
from ...quant.encodings import Blocks, Encoding, NativeInt8
from ...quant.input_moments import InputMoments
from ...quant.packed_encoding import PackedInt8
from ...quant.recipes import BLOCK_LINEARS
from ...quant.treatments import input_group, smoothing
from .peers import PEERS, Peer
from .stock_int4 import as_stock

REFERENCE = "BF16"
ROTATION = 256
#: SmoothQuant's strength in the paper.
ALPHA = 0.5
#: The paper protects 17 of 211 linears a copy: 8 %, as 2 of 24 are.
PROTECTED = 2
LADDER = (1, 4, 8)
#: `compute` of int8 weights that are multiplied by their values, as the option ``dense`` does it.
IN_16_BITS = "int8 in 16 bits"
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")

#: (fp32 weight [N, K], vector [K] of smoothing, moments of the inputs or None) -> how it is stored
Store = Callable[[Tensor, "Tensor | InputMoments | None"], QuantizedTensor]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    ``store`` makes a quantized weight from the fp32 one (None: it stays in bf16). ``compute`` says
    how GGUF weights are multiplied, with "w4a4" INT4 ones as stock ComfyUI does, with `IN_16_BITS`
    int8 ones by their values. What needs a calibration: ``smooth`` is SmoothQuant's alpha;
    ``protect`` the number of linears of each copy that stay in bf16, the most fragile first; with
    ``moments`` the encoder searches and rounds for the least output error; ``level`` and
    ``treatment`` are the quantizer's, which writes files.
    ``peer``: another program's linears. With ``stress`` the row is made at stress strength too;
    with ``study`` it is one of the treatments that are compared with the paper's.
    """

    name: str
    store: Store | None = None
    compute: str = "dense"
    smooth: float | None = None
    protect: int = 0
    moments: bool = False
    level: str | None = None
    treatment: str | None = None
    peer: Peer | None = None
    stress: bool = False
    study: bool = True

    @property
    def calibrated(self) -> bool:
        asked = (self.smooth is not None, self.protect > 0, self.moments, bool(self.level))
        return any(asked)


def _int8(weight: Tensor, smooth: Tensor | None) -> QuantizedTensor:
    return QuantizedTensor.from_float(weight, Int8Layout.NAME, smooth=smooth)


def _rotated_by(weight: Tensor, inputs: InputMoments | None) -> QuantizedTensor:
    parts = _led(NativeInt8(ROTATION), inputs).encode(weight)
    return int8_tensor(
        parts["weight"], parts["weight_scale"], dtype=torch.float32, rotation=ROTATION
    )


def _blocks_by(qtype: str) -> Store:
    def store(weight: Tensor, inputs: InputMoments | None) -> QuantizedTensor:
        shape = tuple(weight.shape)
        blocks = _led(Blocks(qtype, shape), inputs).encode(weight)["weight"]
        return gguf_tensor(blocks, qtype, shape, dtype=torch.float32)

    return store


def _packed_by(bits: int, group: int = 16) -> Store:
    """W4A8 and W6A8, multiplied as the int8 grid that they decode to."""

    def store(weight: Tensor, inputs: InputMoments | None) -> QuantizedTensor:
        encoding = _led(PackedInt8(bits, group, ROTATION), inputs)
        parts, constants = encoding.encode(weight), encoding.constants()
        return w4a8_tensor(
            parts["weight"],
            parts["weight_s_rel"],
            parts["weight_s_channel"],
            dtype=torch.float32,
            group_size=group,
            rotation=ROTATION,
            codebook=constants.get("weight_codebook"),
        )

    return store


def _led(encoding: Encoding, inputs: InputMoments | None) -> Encoding:
    """As the quantizer has it; without inputs where the calibration saw nothing but zeros."""
    return encoding if inputs is None else encoding.led_by(inputs, feedback=True)


def _as_ggml(qtype: str) -> Store:
    """Other programs' files: the bytes of ggml's encoder."""
    return lambda weight, _: gguf_tensor(
        quantize(weight, qtype, as_ggml=True), qtype, tuple(weight.shape), dtype=weight.dtype
    )


def stored(layout: str, **options: object) -> Store:
    return lambda weight, _: QuantizedTensor.from_float(weight, layout, **options)


def _kitchens_int4(weight: Tensor, _: object) -> QuantizedTensor:
    """With comfy-kitchen's own scales, from absmax: `W4A4Layout` tries nearer ones."""
    codes, params = super(W4A4Layout, W4A4Layout).quantize(weight)
    return Weight(codes, W4A4Layout.NAME, params)


_ROTATED = "INT8 W8A8 rotated"

SCHEMES: tuple[Scheme, ...] = (
    Scheme(REFERENCE, stress=True),
    Scheme("W8A8", _int8, stress=True),
    Scheme("W8A8 rotated", stored(Int8Layout.NAME, rotation=ROTATION), stress=True),
    Scheme("W8A8 + smooth", _int8, smooth=ALPHA, stress=True),
    Scheme("W8A8 + protect", _int8, protect=PROTECTED, stress=True),
    Scheme("W8A8 + both", _int8, smooth=ALPHA, protect=PROTECTED, stress=True),
    Scheme("ours: INT8 rotated, calibrated", _rotated_by, moments=True, stress=True),
    Scheme(
        "ours: INT8 rotated, calibrated, in 16 bits",
        _rotated_by,
        compute=IN_16_BITS,
        moments=True,
        study=False,
    ),
    Scheme("ours: INT8 auto-native", level=_ROTATED, treatment="auto-native", study=False),
    Scheme("ours: INT8 auto", level="INT8 W8A8", treatment="auto", stress=True),
    Scheme("Q4_K", _as_ggml("Q4_K")),
    Scheme("ours: Q4_K", stored(GGUFLayout.NAME, qtype="Q4_K")),
    Scheme("ours: Q4_K, calibrated", _blocks_by("Q4_K"), moments=True),
    Scheme("ours: W4A8, calibrated", _packed_by(4), moments=True, study=False),
    Scheme("ours: W4A8 in groups of 32, calibrated", _packed_by(4, 32), moments=True, study=False),
    Scheme("ours: W6A8, calibrated", _packed_by(6), moments=True, study=False),
    Scheme("ours: IQ4_XS, calibrated", _blocks_by("IQ4_XS"), moments=True, study=False),
    Scheme("ours: Q8_0, calibrated", _blocks_by("Q8_0"), moments=True, study=False),
    Scheme("ours: INT4 W4A4, calibrated", compute="w4a4", level="INT4 W4A4", study=False),
    Scheme("ours: INT4 W4A4, calibrated, as this pack computes it", level="INT4 W4A4", study=False),
    Scheme("INT4 W4A4 (comfy-kitchen)", _kitchens_int4, "w4a4", study=False),
    Scheme("W4A8 (comfy-kitchen)", stored(W4A8Layout.NAME), study=False),
    Scheme("W6A8 (comfy-kitchen)", stored(W4A8Layout.NAME, bits=6), study=False),
    Scheme("FP8 per row", stored(FP8Layout.NAME, per_row=True)),
    Scheme("NF4", stored(NF4Layout.NAME)),
    Scheme("Q8_0", _as_ggml("Q8_0")),
    *(Scheme(f"{t} as W8A8", _as_ggml(t), "w8a8") for t in ("Q4_K", "Q8_0")),
    Scheme("FP8 per tensor", stored(FP8Layout.NAME, per_row=False)),
    *(Scheme(t, _as_ggml(t)) for t in ("Q6_K", "Q5_K")),
    *(Scheme(f"W8A8, {k} protected", _int8, protect=k) for k in LADDER),
    Scheme("NVFP4 (comfy-kitchen)", stored(NVFP4Layout.NAME), study=False),
    *(Scheme(name, peer=peer, study=False) for name, peer in PEERS.items()),
)


def is_block_linear(name: str) -> bool:
    """Whether the canonical tensor ``name`` is one that all systems quantize."""
    return is_linear(name) and fnmatchcase(name, BLOCK_LINEARS)


def weights(
    scheme: Scheme,
    state: dict[str, Tensor],
    copy: str = "conditional",
    calibration: Calibration | None = None,
) -> dict[str, Tensor]:
    """One copy's tensors, bf16 [N, K] in, as ``scheme`` stores them."""
    if scheme.store is None:
        return state
    kept = () if calibration is None else fragile(calibration, copy)[: scheme.protect]
    out = dict(state)
    for name, tensor in state.items():
        module = name.rpartition(".")[0]
        if is_block_linear(name) and module not in kept:
            known = None
            if scheme.smooth is not None:
                known = smoothing_vector(calibration, copy, module, scheme.smooth)
            elif scheme.moments:
                known = calibration.layer(copy, module).moments
            out[name] = scheme.store(tensor.float(), known)
    return out


def fragile(calibration: Calibration, copy: str) -> list[str]:
    """The block linears of a copy by their output error in naive W8A8, the largest first."""
    ranked = (key.partition(".") for key, _ in calibration.ranking("int8"))
    return [module for which, _, module in ranked if which == copy and is_block(module)]


def is_block(module: str) -> bool:
    """Whether a module's name is that of a linear in the blocks."""
    return fnmatchcase(module, BLOCK_LINEARS)


def smoothing_vector(calibration: Calibration, copy: str, module: str, alpha: float) -> Tensor:
    """SmoothQuant's vector [K] of a linear: shared by those that read the same input."""
    group = input_group(f"{copy}.{module}")
    members = [stats for key, stats in calibration.layers.items() if input_group(key) == group]
    return smoothing(members, alpha)


def unpacked(tensors: dict[str, Tensor], compute: str) -> dict[str, Tensor]:
    """The tensors in the form in which they are multiplied, unpacked once instead of at every call.

    What `ops.linear` does at each call with FP8, NF4 and GGUF weights, done before: they become
    fp32, or with ``compute`` "w8a8" rotated int8; W4A8, W6A8 and INT4 become the int8 they decode
    to, but INT4 with "w4a4". The products are the same; a test compares them.
    """
    return {name: _unpacked(tensor, compute) for name, tensor in tensors.items()}


def _unpacked(tensor: Tensor, compute: str) -> Tensor:
    if isinstance(tensor, QuantizedTensor) and compute == IN_16_BITS:
        return tensor.dequantize()
    if not isinstance(tensor, QuantizedTensor) or tensor._layout_cls == Int8Layout.NAME:
        return tensor
    if compute == "w4a4" and issubclass(tensor.layout_cls, W4A4Layout):
        return as_stock(tensor)
    if issubclass(tensor.layout_cls, PackedLayout):
        packed, s_rel, scale, codebook, group = tensor.layout_cls.grid_parts(tensor)
        grid, rotation = int8_grid(packed, s_rel, codebook, group), tensor._params.convrot_groupsize
        return int8_tensor(grid, scale, dtype=torch.float32, rotation=rotation)
    if compute != "w8a8":
        return tensor.dequantize()
    params = tensor._params
    q, scale = dequantize_rotate_quantize(
        tensor._qdata, params.qtype, params.matrix_shape, ROTATION
    )
    return int8_tensor(q, scale, dtype=torch.float32, rotation=ROTATION)
