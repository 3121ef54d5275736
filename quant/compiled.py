"""The compiled encoder made ready: built where there is a C compiler, checked against torch."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..ops.blocks import FORMATS
from ..ops.native import compiler
from ..ops.native.encode import Encoder
from ..ops.reference import quantize_rows
from ..ops.rotation import hadamard

_log = logging.getLogger(__name__)

_SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_ROWS, _COLUMNS = 5, 1024


def prepare() -> Path | None:
    """Build the encoder unless it is there; None, with the reason in the log, where none can be.

    For commands that a user started, never for imports: it takes seconds and runs a compiler.
    """
    there = compiler.library_path().is_file()
    try:
        path = compiler.build(check)
    except BackendUnavailableError as error:
        _log.warning("weights are encoded by torch, more slowly: %s", error)
        return None
    if not there:
        _log.info("compiled an encoder for this processor, once: %s", path)
    return path


def check(library: ctypes.CDLL) -> None:
    """Raise BackendUnavailableError unless ``library`` gives torch's bits on a few weights.

    A compiler that rounds otherwise would write other files than torch, and nobody would see it.
    """
    encoder, weights = Encoder(library), _weights()
    blocks = weights.view(-1, 256)
    importance = torch.rand((4, 256), generator=torch.Generator().manual_seed(1)) + 0.01
    for name in _SEARCHED:
        for weighed in (None, importance):
            form = FORMATS[name]
            made = encoder.fit_blocks(blocks, weighed, form.search_of(weighed is None))
            fit, codes, lost, lucky = form.fit_in_torch(blocks, weighed)
            _agree(name, made.codes, codes)
            _agree(name, made.d, fit.d)
            _agree(name, made.scale, fit.scale)
            if fit.minimum is not None:
                _agree(name, made.dmin, fit.dmin)
                _agree(name, made.minimum, fit.minimum)
            if lost is not None:
                _agree(name, made.lost, lost)
                _agree(name, made.lucky, lucky)
    form = FORMATS["Q8_0"]
    made, _ = encoder.q8_0(weights.bfloat16())
    formula = form.encode(weights.view(-1, 32), None).view(len(weights), -1)
    _agree("Q8_0", made, formula)
    for rotation, true in ((None, weights), (256, rotated(weights))):
        codes, scale, _ = encoder.int8_rows(weights, rotation)
        for mine, theirs in zip((codes, scale), quantize_rows(true), strict=True):
            _agree(f"INT8, rotated by {rotation}", mine, theirs)
    stored = form.dequantize(formula, weights.shape, torch.float32)
    largest = encoder.lost(weights, stored).largest
    _agree("largest error", torch.tensor(largest), (stored - weights).abs().max())


def rotated(rows: Tensor) -> Tensor:
    """``rotation.rotate`` by 256, each sum from first to last whatever torch's product does."""
    h16 = hadamard(16, rows.device, rows.dtype)
    grouped = rows.reshape(-1, 16, 16)
    turned = sum_in_order([grouped[:, :, k, None] * h16[k] for k in range(16)])
    across = [turned[:, k, None, :] * h16[:, k, None] for k in range(16)]
    return sum_in_order(across).reshape(rows.shape)


def sum_in_order(terms: list[Tensor]) -> Tensor:
    """The first plus the second, plus the third, and so on."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _weights() -> Tensor:
    """Rows of loud and of tiny weights, of few values and of none."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn((_ROWS, _COLUMNS), generator=generator) * 0.02
    weights[1] *= torch.randn(_COLUMNS, generator=generator).mul_(2).exp_()
    weights[2, :300] = 0
    weights[3] = torch.randint(0, 3, (_COLUMNS,), generator=generator) * 0.25
    weights[4, :512] *= 1e-30
    return weights.bfloat16().float()


def _agree(what: str, mine: Tensor, formula: Tensor) -> None:
    if not torch.equal(mine, formula):
        raise BackendUnavailableError(
            f"the compiled encoder's {what} is not torch's, bit for bit",
            found=f"{int((mine != formula).sum())} of {mine.numel()} values differ",
            hint="Report it with the compiler's version; until then weights are encoded by torch.",
        )
