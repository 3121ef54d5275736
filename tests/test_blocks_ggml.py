"""Block encoding against ggml's C code: its bytes, measured once and kept as digests.

``EXPECTED`` was measured from ggml_quantize_chunk of ggml-python 0.0.45 (x86-64, as pip builds
it). Where that package is installed, the digests are measured anew and larger tensors compared:

    pip install ggml-python==0.0.45        (builds from source, about 90 s)
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache

import gguf
import numpy as np
import pytest
import torch

from ideogram4_quant.ops.blocks import FORMATS, dequantize, quantize

torch.set_num_threads(1)

K = 768

# (format, with importance): sha256 of ggml's bytes for `weights()`, and the RMSE they decode to.
EXPECTED = {
    ("Q8_0", False): (
        "539e677db6796e324db175fdd2a27997194b416069b01dbb0ffe20dcbc386ae2",
        0.000489287802,
    ),
    ("Q4_0", False): (
        "bac15b76e5a513d68f4ca26abed2c69f7084c5ef12761490983cd47c1ba8a338",
        0.00398077769,
    ),
    ("Q4_1", False): (
        "617d57a5d982d84dba34399f72803872a85d5bcfa684a7ee2301f7de2e909d7d",
        0.0049486972,
    ),
    ("Q5_0", False): (
        "a70545a0996dffdac3ba93f8e68a317c8c5b3ae8ba8862c89f7c54f62fd7730f",
        0.0030268287,
    ),
    ("Q5_1", False): (
        "b686eb1c25e72fc43cda45021db1254b8f9fcbe03a29e3aa7434cc11170c2c18",
        0.00220115403,
    ),
    ("Q4_K", False): (
        "c0acbfd75539d0e049c140c7e8910471d2fdd70f63e3aa4e5014d840878edab8",
        0.00337067017,
    ),
    ("Q4_K", True): (
        "52599d7695e1866311cc39e4275bf1fe013c2f37c7b09090e4db97960efef5ee",
        0.00351745803,
    ),
    ("Q5_K", False): (
        "f7c12f543deabd96c2bace02d00cb06f8b270f4cdc82189ee2daff13ed7bfa3b",
        0.00208664427,
    ),
    ("Q5_K", True): (
        "2b99782387630b7f9f40830e914d5ec61d745b4ec4ffeddfe15926237758d7b8",
        0.00215182519,
    ),
    ("Q6_K", False): (
        "dfdeef3befc70996fdcead9c5b74263cce5443737c2b39298cc48f99af7cfcd3",
        0.00134429872,
    ),
    ("Q6_K", True): (
        "b9b8ef5d161cabd2539dfe2fb1417a6225bfc16a7187b31d70426305deacf3ce",
        0.00138096502,
    ),
}


def gaussian(rows: int, k: int, seed: int) -> np.ndarray:
    """Sums of twelve 16-bit integers: near N(0, 1), exact in float32, the same everywhere."""
    words = np.random.PCG64(seed).random_raw(rows * k * 3).astype("<u8").view("<u2")
    total = words.reshape(rows, k, 12).astype(np.int64).sum(2) - 6 * 65535
    return (total.astype(np.float64) / 65536).astype(np.float32)


@cache
def weights() -> np.ndarray:
    """[56, 768]: 24 gaussian rows, 16 heavy-tailed, 12 with outliers, 4 odd ones."""
    weight = gaussian(56, K, seed=1) / np.float32(64)
    weight[24:40] *= np.abs(weight[24:40]) * np.float32(64)
    weight[40:52, 5::97] *= np.float32(48)
    weight[52] = 0
    weight[53] = np.float32(0.25)
    weight[54] = np.abs(weight[54])
    weight[55] = np.round(weight[55] * 512) / 512  # few distinct values: many ties
    return weight


@cache
def importance() -> np.ndarray:
    """[768], at or above zero, some columns without any."""
    values = np.square(gaussian(1, K, seed=2)[0])
    values[7::50] = 0
    return values


def encode(name: str, weight: np.ndarray, weighted: bool) -> np.ndarray:
    column = torch.from_numpy(importance()) if weighted else None
    return quantize(torch.from_numpy(weight), name, column).numpy()


def rmse(name: str, data: np.ndarray) -> float:
    got = dequantize(torch.from_numpy(data), name, weights().shape).numpy()
    return float(np.sqrt(np.square(got.astype(np.float64) - weights()).mean()))


@pytest.mark.parametrize(("name", "weighted"), list(EXPECTED))
def test_bytes_are_those_that_ggml_gave(name, weighted):
    digest, error = EXPECTED[name, weighted]
    data = encode(name, weights(), weighted)
    assert rmse(name, data) <= error * (1 + 1e-6)
    assert hashlib.sha256(data.tobytes()).hexdigest() == digest


# ---- with ggml at hand


@pytest.fixture(scope="module")
def ggml():
    reason = "ggml-python is not installed: pip install ggml-python==0.0.45"
    return pytest.importorskip("ggml", reason=reason)


def ggml_encode(ggml, name: str, weight: np.ndarray, weighted: bool) -> np.ndarray:
    floats = ctypes.POINTER(ctypes.c_float)
    weight = np.ascontiguousarray(weight)
    out = np.zeros((len(weight), FORMATS[name].row_bytes(weight.shape[1])), dtype=np.uint8)
    written = ggml.ggml_quantize_chunk(
        FORMATS[name].ggml_type,
        weight.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        *weight.shape,
        importance().ctypes.data_as(floats) if weighted else None,
    )
    assert written == out.size
    return out


@pytest.mark.parametrize(("name", "weighted"), list(EXPECTED))
def test_the_digests_are_of_ggml(ggml, name, weighted):
    data = ggml_encode(ggml, name, weights(), weighted)
    digest, error = EXPECTED[name, weighted]
    assert hashlib.sha256(data.tobytes()).hexdigest() == digest
    assert rmse(name, data) == pytest.approx(error, rel=1e-6)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1] == FORMATS[name].type_size


@pytest.mark.parametrize("magnitude", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize(("name", "weighted"), list(EXPECTED))
def test_equals_ggml_on_more_weights(ggml, name, weighted, magnitude):
    weight = gaussian(200, K, seed=3) * np.float32(magnitude)
    weight[100:] *= np.abs(weight[100:]) / np.float32(magnitude)
    want = ggml_encode(ggml, name, weight, weighted).reshape(-1, FORMATS[name].type_size)
    got = encode(name, weight, weighted).reshape(want.shape)
    different = np.nonzero((want != got).any(1))[0]
    assert different.size == 0, f"{different.size} of {len(want)} blocks, first {different[0]}"
