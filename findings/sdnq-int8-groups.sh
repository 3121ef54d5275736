#!/usr/bin/env bash
# Question:  what shape has an int8 weight [64, 4608] of SDNQ, and how many scales a row?
# Good guess: [64, 4608] and one scale a row, as everywhere for int8; asked for groups of 1,024, it
#            takes those, or a smaller divisor of 4,608.
# Behaviour: by default int8 is grouped, and 4,608, no multiple of 1,024, is cut into *larger* groups:
#            three of 1,536, stored as [64, 3, 1536]. `use_svd` doubles the wish to 2,048, which
#            leaves K = 4,608 one group. With `use_quantized_matmul` nothing is grouped and the weight is
#            stored transposed, [4608, 64]. So K alone does not tell how such a file is laid out.
# Versions:  sdnq 0.2.8, torch 2.13.0, diffusers 0.42.1, transformers 5.24.0.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11, on the CPU:
#            K = 4096: [64, 4, 1024]; svd [64, 2, 2048]; matmul [4096, 64]
#            K = 4608: [64, 3, 1536]; svd [64, 4608]; matmul [4608, 64]
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 sdnq==0.2.8 diffusers==0.42.1 \
    transformers==5.24.0 numpy==2.4.6
venv/bin/python 2>log - <<'PY' || { cat log; exit 1; }
import torch
from sdnq import SDNQConfig, sdnq_quantize_layer

WAYS = {"": {}, "svd": {"use_svd": True}, "matmul": {"use_quantized_matmul": True}}
places = {"quantization_device": "cpu", "return_device": "cpu"}
found = {}
for k in (4096, 4608):
    for name, way in WAYS.items():
        config = SDNQConfig(weights_dtype="int8", **places, **way)
        layer, _ = sdnq_quantize_layer(torch.nn.Linear(k, 64, bias=False), config)
        assert layer.weight.dtype == torch.int8
        found[k, name] = list(layer.weight.shape)
    shapes = "; ".join(f"{name} {found[k, name]}".strip() for name in WAYS)
    print(f"K = {k}: {shapes}")
assert found == {
    (4096, ""): [64, 4, 1024],
    (4096, "svd"): [64, 2, 2048],
    (4096, "matmul"): [4096, 64],
    (4608, ""): [64, 3, 1536],
    (4608, "svd"): [64, 4608],
    (4608, "matmul"): [4608, 64],
}, found
PY
