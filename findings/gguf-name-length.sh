#!/usr/bin/env bash
# Question:  how long may the name of a tensor in a GGUF file be?
# Good guess: any length: names are length-prefixed strings, and gguf-py, the format's own library,
#            writes and reads them back.
# Behaviour: ggml's C reader takes 63 bytes at most. From 64 on it refuses the *whole file* (a null
#            pointer and a line on stderr), though gguf-py wrote it and reads it without a word.
# Versions:  gguf 0.19.0; ggml 0.13.1 as pywhispercpp 1.5.1 ships it (libggml-base); numpy 2.4.6.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11:
#            63 bytes: gguf-py reads [63], ggml opens it
#            64 bytes: gguf-py reads [64], ggml refuses it
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet gguf==0.19.0 numpy==2.4.6
venv/bin/python -m pip install --quiet --only-binary :all: --no-deps pywhispercpp==1.5.1
venv/bin/python - <<'PY'
import ctypes
import sysconfig
from pathlib import Path

import gguf
import numpy as np

library = next(Path(sysconfig.get_paths()["platlib"]).glob("libggml-base.so*"))


class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


ggml = ctypes.CDLL(str(library))
ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]

found = {}
for length in (63, 64):
    writer = gguf.GGUFWriter("named.gguf", "test")
    writer.add_tensor("n" * length, np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names = [len(tensor.name) for tensor in gguf.GGUFReader("named.gguf").tensors]
    opened = bool(ggml.gguf_init_from_file(b"named.gguf", Params(True, None)))
    found[length] = names, opened
    print(f"{length} bytes: gguf-py reads {names}, ggml {'opens' if opened else 'refuses'} it")
assert found == {63: ([63], True), 64: ([64], False)}, found
PY
