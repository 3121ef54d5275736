#!/usr/bin/env bash
# Question:  what does `weight += delta` do to a QuantizedTensor of comfy-kitchen?
# Good guess: it raises, as quantized storage cannot take it, or it quantizes the result again.
# Behaviour: it returns a QuantizedTensor and *changes nothing*: the operation runs on a dense copy
#            that is thrown away. add_, mul_, zero_, fill_, `w[0] = x` and a merge through `.data`
#            (as PEFT merges a LoRA) are all lost without a word; only `copy_` raises.
#            By the way: `t()` stays quantized, but `.T`, `transpose(0, 1)`, row slices, `split` and
#            `cat` quietly become dense floats of two to four times the size.
# Versions:  comfy-kitchen 0.2.40 (needs packaging, and does not say so), torch 2.13.0.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11:
#            lost: +=, .data +=, add_, fill_, mul_, w[0] = 5, zero_
#            quantized: clone, contiguous, detach, t(), to(bfloat16)
#            dense: .T, cat, chunk, rows, split, transpose
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 comfy-kitchen==0.2.40 packaging==25.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from comfy_kitchen.tensor import QuantizedTensor

VALUES = torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(96, 512)


def weight():
    return QuantizedTensor.from_float(VALUES, "TensorWiseINT8Layout", per_channel=True)


CHANGES = {
    "+=": lambda w: w.__iadd__(ONES),
    ".data +=": lambda w: w.data.add_(ONES),
    "add_": lambda w: w.add_(ONES),
    "fill_": lambda w: w.fill_(3.0),
    "mul_": lambda w: w.mul_(2),
    "w[0] = 5": lambda w: w.__setitem__(0, 5.0),
    "zero_": lambda w: w.zero_(),
}
lost = []
for name, change in CHANGES.items():
    w = weight()
    before = w.dequantize().clone()
    change(w)
    if torch.equal(w.dequantize(), before):
        lost.append(name)
print("lost:", ", ".join(lost))

READS = {
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "detach": lambda w: w.detach(),
    "t()": lambda w: w.t(),
    "to(bfloat16)": lambda w: w.to(torch.bfloat16),
    ".T": lambda w: w.T,
    "cat": lambda w: torch.cat([w, w]),
    "chunk": lambda w: w.chunk(3)[0],
    "rows": lambda w: w[:32],
    "split": lambda w: w.split(32)[0],
    "transpose": lambda w: w.transpose(0, 1),
}
kept = {name for name, read in READS.items() if isinstance(read(weight()), QuantizedTensor)}
print("quantized:", ", ".join(sorted(kept)))
print("dense:", ", ".join(sorted(READS.keys() - kept)))
assert lost == list(CHANGES), lost
assert kept == {"clone", "contiguous", "detach", "t()", "to(bfloat16)"}, kept
PY
