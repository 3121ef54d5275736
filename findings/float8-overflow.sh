#!/usr/bin/env bash
# Question:  what does a float32 value beyond 448 become as float8_e4m3fn?
# Good guess: NaN: the format has no infinity, and NaN is what OCP's conversion without saturation and
#            the format's other library, ml_dtypes (JAX, ONNX, TensorFlow), give above 464.
# Behaviour: torch on a CPU saturates: 1e4 and infinity become 448, and only NaN stays NaN. In the
#            same call float8_e5m2 keeps infinity and does not saturate. So an overflow in a file made
#            by one library is a number, in one by the other a NaN, and nothing warns.
# Versions:  torch 2.13.0, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11:
#            values     464  465  10000  inf  nan
#            torch e4m3 448 448 448 448 nan
#            ml_dtypes  448 nan nan nan nan
#            torch e5m2 448 448 10240 inf nan
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
venv/bin/python - <<'PY'
import warnings

import ml_dtypes
import numpy as np
import torch

values = [464.0, 465.0, 1e4, float("inf"), float("nan")]
x = torch.tensor(values)
found = {
    "torch e4m3": x.to(torch.float8_e4m3fn).float().tolist(),
    "torch e5m2": x.to(torch.float8_e5m2).float().tolist(),
}
with warnings.catch_warnings():
    warnings.simplefilter("error")  # none comes: the overflow is silent
    narrow = np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn)
found["ml_dtypes"] = narrow.astype(np.float32).tolist()
for name, row in found.items():
    print(name, *(f"{value:g}" for value in row))
texts = {name: [f"{value:g}" for value in row] for name, row in found.items()}
assert texts["torch e4m3"] == ["448", "448", "448", "448", "nan"], texts
assert texts["ml_dtypes"] == ["448", "nan", "nan", "nan", "nan"], texts
assert texts["torch e5m2"] == ["448", "448", "10240", "inf", "nan"], texts
PY
