#!/usr/bin/env bash
# Question:  does Triton's interpreter, the way to test kernels without a GPU, compute in bf16?
# Good guess: yes, if with float32's rounding: a kernel that is right on a card is right there.
# Behaviour: bf16 arithmetic runs on the *bit patterns*: 1 + 1 is 1.7e38, a sum of four small numbers
#            -1.3e38, and a dot of unit normals reaches 1e10, without an error. Loads, stores and
#            casts to float32 are right, so a kernel that casts first agrees with the card; the cast
#            back to bf16 cuts off and does not round (a card and torch round half to even).
# Versions:  triton 3.7.1 and 3.9.0, torch 2.13.0.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11, the same with both versions of Triton:
#            bf16: 1 + 1 = 1.701e+38, 2 * 2 off, sum off, dot off; cast first: all right
#            1.01171875 to bf16: 1.0078125, torch 1.015625
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > kernels.py <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if CAST:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    tl.store(out_ptr + at, (x + y).to(tl.float32))
    tl.store(out_ptr + N + at, (x * y).to(tl.float32))
    tl.store(out_ptr + 2 * N, tl.sum(x, 0).to(tl.float32))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if CAST:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    tl.store(out_ptr + at, tl.dot(x, y))


@triton.jit
def narrow(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


def run(cast):
    """(sums, products, total) of small numbers and a dot, each beside what is right."""
    x, y = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([1.0, 2.0, 1.0, 1.0])
    out = torch.zeros(9)
    arithmetic[(1,)](x.bfloat16(), y.bfloat16(), out, N=4, CAST=cast)
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    dot = torch.zeros(16, 16)
    product[(1,)](a, b, dot, N=16, CAST=cast)
    pairs = {"+": (out[:4], x + y), "*": (out[4:8], x * y), "sum": (out[8], x.sum())}
    return pairs | {"dot": (dot, a.float() @ b.float())}


print("triton", triton.__version__)
for cast in (False, True):
    found = run(cast)
    right = {n: torch.allclose(got, want, rtol=1e-4, atol=1e-4) for n, (got, want) in found.items()}
    print("cast first" if cast else "bf16", right, f"1 + 1 = {float(found['+'][0][0]):.4g}")
    assert all(right.values()) if cast else not any(right.values())

x, out = torch.tensor([1.01171875]), torch.zeros(1, dtype=torch.bfloat16)
narrow[(1,)](x, out, N=1)
print(f"{float(x)} to bf16: {float(out)}, torch {float(x.bfloat16())}")
assert float(out) == 1.0078125
assert float(x.bfloat16()) == 1.015625
PY
TRITON_INTERPRET=1 venv/bin/python kernels.py
venv/bin/python -m pip install --quiet --no-deps triton==3.9.0
TRITON_INTERPRET=1 venv/bin/python kernels.py
