#!/usr/bin/env bash
# Question:  is a bf16 weight quantized to the same int8 codes as its exact float32 values?
# Good guess: yes: bf16 values are float32 values, and a quantizer divides in float32.
# Behaviour: comfy-kitchen rotates and divides in the dtype it is handed. From bf16 some 7 % of the
#            codes differ (8 % rotated), half a dB and more is lost, and a few rows reach 126 and not
#            127: no arithmetic in float32 leaves that, so such a file can be told by its codes.
# Versions:  comfy-kitchen 0.2.40 (needs packaging, and does not say so), torch 2.13.0.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11, on the CPU:
#            plain:   7.4 % other codes, 41.12 dB from float32, 40.63 from bf16, 10 rows at 126
#            rotated: 8.2 % other codes, 41.20 dB from float32, 40.46 from bf16, 6 rows at 126
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 comfy-kitchen==0.2.40 packaging==25.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from comfy_kitchen.tensor import QuantizedTensor

weight = torch.randn(512, 4608, generator=torch.Generator().manual_seed(0)).bfloat16()
exact = weight.float()
assert torch.equal(exact.bfloat16(), weight)  # the same numbers in both


def quantized(w, rotated):
    options = {"per_channel": True, "convrot": rotated}
    return QuantizedTensor.from_float(w, "TensorWiseINT8Layout", **options)


def decibels(w):
    error = w.dequantize().float() - exact
    return float(10 * (exact.square().sum() / error.square().sum()).log10())


for name, rotated in (("plain", False), ("rotated", True)):
    wide, narrow = quantized(exact, rotated), quantized(weight, rotated)
    other = float((wide._qdata != narrow._qdata).float().mean())
    peaks = [w._qdata.int().abs().amax(1) for w in (wide, narrow)]
    low = int((peaks[1] == 126).sum())
    print(
        f"{name}: {other:.1%} other codes, {decibels(wide):.2f} dB from float32, "
        f"{decibels(narrow):.2f} from bf16, {low} rows at 126"
    )
    assert 0.05 < other < 0.12
    assert decibels(wide) - decibels(narrow) > 0.3
    assert bool((peaks[0] == 127).all()), "float32 leaves no row below 127"
    assert low > 0
    assert bool((peaks[1] >= 126).all())
PY
