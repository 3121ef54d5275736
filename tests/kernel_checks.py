"""How far a kernel under Triton's interpreter may be from its formula, and rows to try it on."""

import torch

from ideogram4_quant.ops import reference


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in units in the last place; equal NaNs are zero apart."""
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    # Bits of floats of one sign are ordered as the floats are; mirror the negative ones.
    bits = [t.view(torch.int32).long() for t in (a, b)]
    ordered = [torch.where(t < 0, -(t & 0x7FFFFFFF), t) for t in bits]
    return int((ordered[0] - ordered[1]).abs().max()) if a.numel() else 0


def check_quantized(result, expected, values, *, scale_ulps=4):
    """Scales within ulps; int8 equal but for one step where the value lies at a tie.

    ``expected`` is the reference's answer, ``values`` fp64 [M, K] are what was quantized: scales
    are held to those, since a rotation in fp32 leaves the reference itself some ulps off.
    """
    q, scale = result
    assert q.dtype == torch.int8
    assert q.shape == expected[0].shape
    exact = (values.abs().amax(1) / 127).clamp_min(reference.SCALE_FLOOR)
    assert ulps(scale, exact.float()) <= scale_ulps
    off = q != expected[0]
    steps = values / exact[:, None]
    from_tie = (steps - steps.floor() - 0.5).abs()
    assert (q.int() - expected[0].int()).abs().max() <= 1
    assert not off.any() or from_tie[off].max() <= 1e-4


def outliers(m: int, k: int, dtype=torch.float32) -> torch.Tensor:
    """Normal values, a few channels 30 times as large, a zero row if there are rows to spare."""
    x = torch.randn(m, k)
    x[:, :: max(k // 3, 1)] *= 30
    if m > 2:
        x[1] = 0
    return x.to(dtype)
