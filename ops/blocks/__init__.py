"""GGUF block formats: decoding and encoding, one class a format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OpError
from ..feedback import Feedback
from .base import BlockFormat, half_bytes
from .floats import BF16, F16, F32
from .kquants import Q4_K, Q5_K, Q6_K
from .kquants_low import Q2_K, Q3_K
from .legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .tables import IQ4_NL, IQ4_XS, MXFP4

__all__ = [
    "FORMATS",
    "PACKED",
    "BlockFormat",
    "dequantize",
    "format_of",
    "from_codes",
    "quantize",
]

FORMATS: dict[str, BlockFormat] = {
    each.name: each()
    for each in (
        *(F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1),
        *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4),
    )
}
PACKED = tuple(name for name, each in FORMATS.items() if each.block_size > 1)
"""The formats but for the plain floats."""

_BY_TYPE = {each.ggml_type: each for each in FORMATS.values()}

# The other types of ggml, for messages only. Source: enum ggml_type in ggml.h.
_UNSUPPORTED = {
    4: "Q4_2 (removed from ggml)",
    5: "Q4_3 (removed from ggml)",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4 (removed from ggml)",
    32: "Q4_0_4_8 (removed from ggml)",
    33: "Q4_0_8_8 (removed from ggml)",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4 (removed from ggml)",
    37: "IQ4_NL_4_8 (removed from ggml)",
    38: "IQ4_NL_8_8 (removed from ggml)",
    40: "NVFP4",
    41: "Q1_0",
}


def format_of(ggml_type: int | str) -> BlockFormat:
    """The format of a ggml type number or of a format's name. Raises OpError if there is none."""
    table = FORMATS if isinstance(ggml_type, str) else _BY_TYPE
    if ggml_type in table:
        return table[ggml_type]
    name = "" if isinstance(ggml_type, str) else _UNSUPPORTED.get(ggml_type, "unknown to ggml")
    raise OpError(
        "unsupported GGUF block format",
        found=f"{ggml_type} {name}".rstrip(),
        needed=f"one of {', '.join(FORMATS)}",
        hint="Use a file in one of these formats.",
    )


def dequantize(
    data: Tensor,
    qtype: int | str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``[*shape]`` of packed blocks, bit for bit those of gguf-py.

    data: uint8, any shape, the bytes of a tensor of ``shape`` (the last dimension is the packed
    one); qtype: a name of ``FORMATS`` or a ggml type number; dtype: decoded in float32, then
    rounded once. The result lies on data's device. Raises OpError for bytes that do not match.
    """
    return format_of(qtype).dequantize(data, shape, dtype)


def quantize(
    weight: Tensor,
    qtype: int | str,
    importance: Tensor | None = None,
    *,
    feedback: Feedback | None = None,
    as_ggml: bool = False,
) -> Tensor:
    """Packed blocks of ``weight``: float [..., K] -> uint8 [..., K // block_size * type_size].

    Without importance the least error of the weights, below that of ggml's C code; ``as_ggml``
    gives the very bytes of that code, to compare with. importance: [K], at or above zero, the
    mean square of each input feature: the least output error that it foretells,
    ``sum importance * (decoded - weight)^2``, at the same size (see ``refine``). Only its ratios
    count; inputs that were not seen (at 2e-6 of the mean or below, zero included) count as much as
    that, and blocks of nothing else, or all if all are zero, are as without it. Without it Q8_0,
    Q4_0, Q4_1, Q5_0 and Q5_1 give ggml's bytes; MXFP4 and the float types have nothing to search.
    feedback: codes are then chosen, within the scales found, so that errors of correlated inputs
    cancel (see ``Feedback``). The bytes depend on nothing but the arguments, not on threads.
    Raises OpError for NaN and infinity (with their count), for K that blocks do not fill, for
    weights too large for the format's float16 scales, and for ``as_ggml`` of the formats whose
    encoder in ggml is not at hand (Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4).
    """
    return format_of(qtype).quantize(weight, importance, feedback, as_ggml)


def from_codes(codes: Tensor, qtype: str, step: Tensor, low: Tensor | None = None) -> Tensor:
    """Packed blocks of ``step * code (+ low)``: codes int8 [N, K] -> uint8 [N, bytes of a row].

    qtype: Q8_0, Q4_0 or Q5_0, and with ``low`` Q4_1 or Q5_1; step and low: float [N, K / 32], which
    the blocks hold in float16. Raises OpError for numbers that it cannot hold.
    """
    block = format_of(qtype)
    heads = torch.cat([half_bytes(each.reshape(-1)) for each in (step, low) if each is not None], 1)
    return block.recode(heads, codes.reshape(-1, block.block_size)).view(len(codes), -1)
