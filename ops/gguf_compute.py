"""Whether a GGUF weight runs through int8 or is decoded to the dtype of the activations."""

from __future__ import annotations

import torch

from ..errors import OpError
from . import dispatch
from .tuning import choices

W8A8_FORMATS = (
    *("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""GGUF formats that ``"auto"`` runs through int8: their own error hides that of the activations."""

FEW_TOKENS = 64
"""Below this many, decoding is the cost of a GGUF layer: int8 would only add to its error.

The least that is asked for where nothing was measured, and never less where it was (``choices``).
"""


def resolve_compute(
    compute: str, qtype: str, in_features: int, tokens: int = FEW_TOKENS, few: int = FEW_TOKENS
) -> str:
    """``"w8a8"`` or ``"dense"`` for ``LinearOptions.gguf_compute``; OpError for another word.

    ``"auto"`` is dense for fewer than ``few`` tokens, a format of 6 or more bits, and in_features
    that are no multiple of 256.
    """
    if compute == "auto":
        through_int8 = qtype in W8A8_FORMATS and in_features % 256 == 0
        return "w8a8" if through_int8 and tokens >= few else "dense"
    if compute not in ("w8a8", "dense"):
        raise OpError(
            "unknown compute mode", found=repr(compute), needed="'auto', 'w8a8' or 'dense'"
        )
    return compute


def compute_here(
    compute: str,
    qtype: str,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> str:
    """``resolve_compute`` with what ``device`` is like: ``shape`` (M, N, K), x in ``dtype``."""
    m, n, k = shape
    found = resolve_compute(compute, qtype, k, m)
    if compute != "auto" or found == "dense":
        return found
    return resolve_compute(compute, qtype, k, m, few_tokens(qtype, n, k, device, dtype, backend))


@torch.compiler.assume_constant_result
def few_tokens(
    qtype: str, n: int, k: int, device: torch.device, dtype: torch.dtype, backend: str
) -> int:
    """From how many tokens on ``"auto"`` takes int8 for a weight ``[n, k]``: a look-up.

    Int8 that no backend speeds up would only add to the error, so it is never taken there.
    """
    few = choices.table(device).few_tokens(qtype, n, k, choices.dtype_name(dtype))
    if few is not None:
        return few
    if backend != dispatch.AUTO:
        return FEW_TOKENS
    fast = dispatch.choose("int8_gemm", (FEW_TOKENS, n, k), device, dtype=dtype)
    return choices.ALWAYS_DENSE if fast is dispatch.REFERENCE else FEW_TOKENS
