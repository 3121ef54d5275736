"""Block encoding against ggml's C code: its bytes and errors, measured once and kept.

``EXPECTED`` and ``WITH_IMPORTANCE`` were measured from ggml_quantize_chunk of ggml-python 0.0.45
(x86-64, as pip builds it). Where that package is installed, they are measured anew and larger
tensors compared:

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

# sha256 of ggml's bytes for `weights()`, and the RMSE they decode to.
EXPECTED = {
    "Q8_0": (
        "539e677db6796e324db175fdd2a27997194b416069b01dbb0ffe20dcbc386ae2",
        0.000489287802,
    ),
    "Q4_0": (
        "bac15b76e5a513d68f4ca26abed2c69f7084c5ef12761490983cd47c1ba8a338",
        0.00398077769,
    ),
    "Q4_1": (
        "617d57a5d982d84dba34399f72803872a85d5bcfa684a7ee2301f7de2e909d7d",
        0.0049486972,
    ),
    "Q5_0": (
        "a70545a0996dffdac3ba93f8e68a317c8c5b3ae8ba8862c89f7c54f62fd7730f",
        0.0030268287,
    ),
    "Q5_1": (
        "b686eb1c25e72fc43cda45021db1254b8f9fcbe03a29e3aa7434cc11170c2c18",
        0.00220115403,
    ),
    "Q4_K": (
        "c0acbfd75539d0e049c140c7e8910471d2fdd70f63e3aa4e5014d840878edab8",
        0.00337067017,
    ),
    "Q5_K": (
        "f7c12f543deabd96c2bace02d00cb06f8b270f4cdc82189ee2daff13ed7bfa3b",
        0.00208664427,
    ),
    "Q6_K": (
        "dfdeef3befc70996fdcead9c5b74263cce5443737c2b39298cc48f99af7cfcd3",
        0.00134429872,
    ),
}

# The RMSE of formats whose bytes as ggml's are not made here, too.
ERRORS = {name: error for name, (_, error) in EXPECTED.items()} | {
    "Q2_K": 0.00992331118,
    "Q3_K": 0.00435689201,
    "IQ4_NL": 0.00386418684,
    "IQ4_XS": 0.00399637541,
}

# What ggml reaches on `weights()` with `importance()`: sqrt(mean(importance * error^2)).
WITH_IMPORTANCE = {
    "Q8_0": 0.000502486714,
    "Q4_0": 0.0040314913,
    "Q4_1": 0.00309791778,
    "Q5_0": 0.00306174275,
    "Q5_1": 0.00183075172,
    "Q4_K": 0.00324267042,
    "Q5_K": 0.00201472061,
    "Q6_K": 0.00125672373,
    "Q2_K": 0.00960153844,
    "Q3_K": 0.00451432202,
    "IQ4_NL": 0.00370140093,
    "IQ4_XS": 0.00398190628,
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


def encode(
    name: str, weight: np.ndarray, column: np.ndarray | None = None, as_ggml: bool = False
) -> np.ndarray:
    importance = None if column is None else torch.from_numpy(column)
    return quantize(torch.from_numpy(weight), name, importance, as_ggml=as_ggml).numpy()


def rms_error(name: str, data: np.ndarray, weight: np.ndarray, column: np.ndarray | float) -> float:
    return float(np.sqrt((np.square(decode(name, data, weight) - weight) * column).mean()))


def decode(name: str, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64, of the shape of ``weight``."""
    return dequantize(torch.from_numpy(data), name, weight.shape).numpy().astype(np.float64)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_bytes_are_those_that_ggml_gave(name):
    digest, error = EXPECTED[name]
    data = encode(name, weights(), as_ggml=True)
    assert rms_error(name, data, weights(), 1.0) <= error * (1 + 1e-6)
    assert hashlib.sha256(data.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", list(ERRORS))
def test_error_is_at_most_that_of_ggml(name):
    data = encode(name, weights())
    assert rms_error(name, data, weights(), 1.0) <= ERRORS[name] * (1 + 1e-6)


@pytest.mark.parametrize("magnitude", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_error_is_below_that_of_bytes_as_ggml(name, magnitude):
    weight = gaussian(200, K, seed=4) * np.float32(magnitude)
    weight[100:] *= np.abs(weight[100:]) / np.float32(magnitude)
    for rows in (weight[:100], weight[100:], np.abs(weight[:100])):
        error = rms_error(name, encode(name, rows), rows, 1.0)
        assert error < rms_error(name, encode(name, rows, as_ggml=True), rows, 1.0)


def loud(*values: float) -> np.ndarray:
    """60 gaussian blocks with ``values`` among the 256, in other places of each."""
    weight = gaussian(60, 256, seed=11) * np.float32(0.02)
    for number, value in enumerate(values):
        weight[np.arange(60), (np.arange(60) * 37 + number * 53) % 256] = value
    return weight


# Blocks whose error depends on what float16 steps, or codes, happen to meet.
UNUSUAL = {
    "one loud weight, 3e4": lambda: loud(-3e4),
    "one loud weight, 0.3": lambda: loud(0.3),
    "two loud weights": lambda: loud(0.4, 0.36),
    "two of opposite signs": lambda: loud(-0.24, 0.22),
    "seven loud weights": lambda: loud(*[1.0] * 7),
    "twelve loud weights": lambda: loud(*np.linspace(-0.3, 0.4, 12)),
    "one loud group": lambda: (
        gaussian(60, 256, 12) * np.repeat(np.logspace(-4, 0, 8, dtype="f4"), 32)
    ),
    "two values": lambda: np.sign(gaussian(60, 256, 13)) * np.float32(100),
    "three values": lambda: np.clip(np.round(gaussian(60, 256, 14)), -1, 1),
    "few weights": lambda: gaussian(60, 256, 15) * (np.abs(gaussian(60, 256, 16)) > 2),
    "far from zero": lambda: gaussian(60, 256, 17) + np.float32(5),
    "near float16's least steps": lambda: gaussian(60, 256, 18) * np.float32(1e-6),
    "below float16's least steps": lambda: loud(5.0, -4.5) * np.float32(1e-6),
    "zero": lambda: np.zeros((3, 256), np.float32),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_no_unusual_block_costs_more_than_as_ggml(name, kind):
    """Where luck decides, the same luck is had."""
    weight = UNUSUAL[kind]()
    ours, theirs = (
        np.square(decode(name, encode(name, weight, as_ggml=as_ggml), weight) - weight).sum(1)
        for as_ggml in (False, True)
    )
    assert (ours <= theirs * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", list(ERRORS))
def test_with_importance_less_error_than_ggml_reaches_with_it(name):
    error = rms_error(name, encode(name, weights(), importance()), weights(), importance())
    assert error < 0.995 * WITH_IMPORTANCE[name]


# ---- with ggml at hand


@pytest.fixture(scope="module")
def ggml():
    reason = "ggml-python is not installed: pip install ggml-python==0.0.45"
    return pytest.importorskip("ggml", reason=reason)


def ggml_encode(
    ggml, name: str, weight: np.ndarray, column: np.ndarray | None = None
) -> np.ndarray:
    floats = ctypes.POINTER(ctypes.c_float)
    weight = np.ascontiguousarray(weight)
    out = np.zeros((len(weight), FORMATS[name].row_bytes(weight.shape[1])), dtype=np.uint8)
    written = ggml.ggml_quantize_chunk(
        FORMATS[name].ggml_type,
        weight.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        *weight.shape,
        None if column is None else column.ctypes.data_as(floats),
    )
    assert written == out.size
    return out


@pytest.mark.parametrize("name", list(ERRORS))
def test_the_figures_are_of_ggml(ggml, name):
    data = ggml_encode(ggml, name, weights())
    if name in EXPECTED:
        assert hashlib.sha256(data.tobytes()).hexdigest() == EXPECTED[name][0]
    assert rms_error(name, data, weights(), 1.0) == pytest.approx(ERRORS[name], rel=1e-6)
    weighted = ggml_encode(ggml, name, weights(), importance())
    error = rms_error(name, weighted, weights(), importance())
    assert error == pytest.approx(WITH_IMPORTANCE[name], rel=1e-6)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1] == FORMATS[name].type_size


@pytest.mark.parametrize("magnitude", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_equals_ggml_on_more_weights(ggml, name, magnitude):
    weight = gaussian(200, K, seed=3) * np.float32(magnitude)
    weight[100:] *= np.abs(weight[100:]) / np.float32(magnitude)
    want = ggml_encode(ggml, name, weight).reshape(-1, FORMATS[name].type_size)
    got = encode(name, weight, as_ggml=True).reshape(want.shape)
    different = np.nonzero((want != got).any(1))[0]
    assert different.size == 0, f"{different.size} of {len(want)} blocks, first {different[0]}"
    error = rms_error(name, encode(name, weight), weight, 1.0)
    assert error <= rms_error(name, want, weight, 1.0) * (1 + 1e-6)


@pytest.mark.parametrize("magnitude", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize("name", list(ERRORS))
def test_with_importance_beats_ggml_on_more_weights(ggml, name, magnitude):
    weight = gaussian(200, K, seed=3) * np.float32(magnitude)
    weight[100:] *= np.abs(weight[100:]) / np.float32(magnitude)
    theirs = ggml_encode(ggml, name, weight, importance())
    ours = encode(name, weight, importance())
    error = rms_error(name, ours, weight, importance())
    assert error < rms_error(name, theirs, weight, importance())


NEARER = [name for name in ERRORS if name not in EXPECTED]


@pytest.mark.parametrize("name", [*NEARER, "MXFP4"])
def test_is_decoded_as_ggml_does(ggml, name):
    """The bytes of ggml's encoder through its own decoder, and ours through both."""
    for data in (ggml_encode(ggml, name, weights()), encode(name, weights())):
        data = np.ascontiguousarray(data)
        want = np.empty_like(weights())
        traits = ggml.ggml_internal_get_type_traits(FORMATS[name].ggml_type)
        traits.to_float(
            data.ctypes.data_as(ctypes.c_void_p),
            want.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            want.size,
        )
        got = dequantize(torch.from_numpy(data), name, want.shape).numpy()
        assert np.array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("magnitude", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize("name", NEARER)
def test_beats_ggml_on_more_weights(ggml, name, magnitude):
    weight = gaussian(200, K, seed=3) * np.float32(magnitude)
    weight[100:] *= np.abs(weight[100:]) / np.float32(magnitude)
    for rows in (weight[:100], weight[100:]):
        error = rms_error(name, encode(name, rows), rows, 1.0)
        assert error < 0.97 * rms_error(name, ggml_encode(ggml, name, rows), rows, 1.0)


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", NEARER)
def test_unusual_blocks_together_cost_no_more_than_ggmls(ggml, name, kind):
    """None of them by more than 1.2 times."""
    weight = np.ascontiguousarray(UNUSUAL[kind](), dtype=np.float32)
    ours, theirs = (
        np.square(decode(name, data, weight) - weight).sum(1)
        for data in (encode(name, weight), ggml_encode(ggml, name, weight))
    )
    assert ours.sum() <= theirs.sum() * (1 + 1e-5)
    assert (ours <= theirs * 1.2**2).all()
