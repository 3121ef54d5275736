#!/usr/bin/env bash
# Question:  what does MLX's mx.load make of GGUF blocks and of BF16 tensors?
# Good guess: it reads what it knows bit for bit and refuses the rest; BF16, a dtype of its own, stays.
# Behaviour: Q4_K is read without a word and *wrong*: of a block's eight groups of 32 the odd ones get
#            other scales, off by half the size of the weights (ggml's C and gguf-py agree to the bit).
#            BF16 becomes float16: 65536 is infinity, 1e-8 is zero. Q8_0 is right, but comes as
#            three arrays (weight in uint32, scales, biases) whose bias in float16 costs a rounding.
# Versions:  mlx 0.32.4 with mlx-cpu 0.32.4, gguf 0.19.0, numpy 2.4.6; ggml 0.13.1 as pywhispercpp 1.5.1
#            ships it.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11:
#            Q8_0: 65.2 dB against gguf-py
#            Q4_K: 7.7 dB against gguf-py, error of the groups 0.000 0.422 0.000 0.441 0.000 0.470 ...
#            BF16: float16, 65536 -> inf, 1e-08 -> 0
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet "mlx[cpu]==0.32.4" mlx-cpu==0.32.4 gguf==0.19.0 numpy==2.4.6
venv/bin/python -m pip install --quiet --only-binary :all: --no-deps pywhispercpp==1.5.1
venv/bin/python - <<'PY'
import ctypes
import sysconfig
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

Q8_0, Q4_K, BF16 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "Q4_K", "BF16"))
ROWS, K = 64, 1024
weight = np.random.default_rng(0).standard_normal((ROWS, K)).astype(np.float32)

# ggml's own C code makes the blocks, and its own decoder says what they are
ggml = ctypes.CDLL(str(next(Path(sysconfig.get_paths()["platlib"]).glob("libggml-base.so*"))))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
at = lambda array: array.ctypes.data_as(ctypes.c_void_p)
blocks = np.zeros((ROWS, K // 256 * 144), np.uint8)
long = ctypes.c_int64
written = ggml.ggml_quantize_chunk(
    int(Q4_K), at(weight), at(blocks), long(0), long(ROWS), long(K), ctypes.c_void_p(0)
)
assert written == blocks.nbytes
by_ggml = np.zeros_like(weight)
ggml.dequantize_row_q4_K(at(blocks), at(by_ggml), long(weight.size))
q4_k = gguf.dequantize(blocks, Q4_K)
assert np.array_equal(q4_k, by_ggml)

q8_0 = gguf.quantize(weight, Q8_0)
wide = np.array([[1.0, 65536.0, 1e-8, 3.0]], np.float32)
writer = gguf.GGUFWriter("some.gguf", "test")
writer.add_tensor("q8_0.weight", q8_0, raw_dtype=Q8_0)
writer.add_tensor("q4_k.weight", blocks, raw_dtype=Q4_K)
writer.add_tensor("bf16", (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), raw_dtype=BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = mx.load("some.gguf")


def decibels(got, want):
    return 10 * np.log10(np.square(want).sum() / np.square(got - want).sum())


parts = (read[f"q8_0.{name}"] for name in ("weight", "scales", "biases"))
eight = np.array(mx.dequantize(*parts, group_size=32, bits=8).astype(mx.float32))
four = np.array(read["q4_k.weight"].astype(mx.float32))
groups = np.abs(four - q4_k).reshape(-1, 8, 32).mean((0, 2))
bf16 = np.array(read["bf16"].astype(mx.float32)).ravel()
right = decibels(eight, gguf.dequantize(q8_0, Q8_0))
wrong = decibels(four, q4_k)
print(f"Q8_0: {right:.1f} dB against gguf-py")
print(f"Q4_K: {wrong:.1f} dB against gguf-py, error of the groups", *(f"{g:.3f}" for g in groups))
print(f"BF16: {str(read['bf16'].dtype).rpartition('.')[2]}, 65536 -> {bf16[1]:g}, 1e-08 -> {bf16[2]:g}")
assert right > 60
assert wrong < 15
assert (groups[0::2] < 1e-3).all(), groups
assert (groups[1::2] > 0.05).all(), groups
assert read["bf16"].dtype == mx.float16
assert np.isinf(bf16[1])
assert bf16[2] == 0
PY
