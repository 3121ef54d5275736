"""The compiled encoder: torch's bits in every format, on awkward sizes and values."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from ideogram4_quant.errors import BackendUnavailableError
from ideogram4_quant.ops.blocks import FORMATS, quantize
from ideogram4_quant.ops.native import compiler
from ideogram4_quant.ops.native import encode as native
from ideogram4_quant.ops.reference import quantize_rows
from ideogram4_quant.quant import compiled
from ideogram4_quant.quant.encode import encode_tensor
from ideogram4_quant.quant.encodings import Blocks, NativeInt8
from ideogram4_quant.quant.plan import TensorPlan

SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("native")))
        return ctypes.CDLL(str(compiler.build(compiled.check)))


@pytest.fixture
def encoder(library, monkeypatch) -> native.Encoder:
    """The compiled encoder, used by everything."""
    encoder = native.Encoder(library)
    monkeypatch.setattr(native, "_encoder", lambda: encoder)
    return encoder


@pytest.fixture
def without(monkeypatch):
    """A call of torch's formulas alone."""

    def call(work):
        with monkeypatch.context() as patch:
            patch.setattr(native, "_encoder", lambda: None)
            return work()

    return call


def weights(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    made = torch.randn((rows, columns), generator=generator) * 0.02
    if kind == "outliers":
        made *= torch.randn(made.shape, generator=generator).mul_(2).exp_()
        made[0, 5] = 300.0
    elif kind == "few values":
        made = torch.randint(-2, 2, made.shape, generator=generator) * 0.125
    elif kind == "tiny":
        made *= 10.0 ** torch.randint(
            -38, 0, (rows, columns // 32), generator=generator
        ).repeat_interleave(32, 1)
    elif kind == "zeros":
        made[:, : columns // 2] = 0
        made[0] = -0.0
    return made


KINDS = ("gaussian", "outliers", "few values", "tiny", "zeros")
SHAPES = ((1, 256), (9, 768))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEARCHED)
def test_k_quants_are_torchs_to_the_bit(encoder, without, name, kind):
    for rows, columns in SHAPES:
        w = weights(kind, rows, columns)
        importance = weights("outliers", 1, columns)[0].square()
        importance[:300] = 0  # a block of inputs that were not seen
        for weighed in (None, importance):
            found = quantize(w, name, weighed)
            assert torch.equal(found, without(lambda: quantize(w, name, weighed)))  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_q8_0_is_torchs_to_the_bit(encoder, without, kind, dtype):
    for rows, columns in (*SHAPES, (5, 96)):
        w = weights(kind, rows, columns).to(dtype)
        blocks, lost = encoder.q8_0(w)
        formula = without(lambda: quantize(w, "Q8_0"))  # noqa: B023
        assert torch.equal(blocks, formula)
        stored = FORMATS["Q8_0"].dequantize(formula, w.shape, torch.float32)
        check_lost(lost, w.float(), stored)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_q8_0_ends_at_any_block(encoder, without, count):
    """Blocks are taken 16 at a time; the last of a tensor may be fewer."""
    rows = weights("outliers", 1, 32 * count).bfloat16()
    expected = without(lambda: quantize(rows.float(), "Q8_0"))
    made, lost = encoder.q8_0(rows)
    assert torch.equal(made, expected)
    stored = FORMATS["Q8_0"].dequantize(expected, rows.shape, torch.float32)
    error = (stored - rows.float()).double()
    assert lost.noise == pytest.approx(error.square().sum().item(), rel=1e-12)
    assert lost.signal == pytest.approx(rows.double().square().sum().item(), rel=1e-12)
    assert lost.largest == error.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotation", [None, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_rows_are_the_formulas_to_the_bit(encoder, kind, rotation, dtype):
    for rows, columns in SHAPES:
        w = weights(kind, rows, columns).to(dtype)
        codes, scale, lost = encoder.int8_rows(w, rotation)
        true = w.float() if rotation is None else compiled.rotated(w.float())
        formula, formula_scale = quantize_rows(true)
        assert torch.equal(codes, formula)
        assert torch.equal(scale, formula_scale)
        stored = formula.float() * formula_scale[:, None]
        check_lost(lost, w.float(), stored if rotation is None else compiled.rotated(stored))


def check_lost(lost: native.Lost, true: torch.Tensor, stored: torch.Tensor) -> None:
    error = (stored - true).double()
    assert lost.signal == pytest.approx(true.double().square().sum().item(), rel=1e-12)
    assert lost.noise == pytest.approx(error.square().sum().item(), rel=1e-12, abs=1e-300)
    assert lost.largest == error.abs().max().item()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 255])
def test_rows_that_are_not_finite_are_left_to_torch(encoder, value, place):
    w = weights("gaussian", 2, 256)
    w[1, place] = value
    assert encoder.q8_0(w) is None
    assert encoder.int8_rows(w, None) is None
    assert encoder.int8_rows(w, 256) is None
    assert encoder.lost(w, torch.zeros_like(w)) is None
    assert encoder.lost(torch.zeros_like(w), w) is None


def test_what_float16_scales_cannot_hold_is_refused_as_in_torch(encoder, without):
    w = weights("gaussian", 2, 256) * 1e10
    assert encoder.q8_0(w) is None
    for name in ("Q8_0", *SEARCHED):
        messages = []
        for call in (lambda work: work(), without):
            with pytest.raises(ValueError, match="too large for float16") as caught:
                call(lambda: quantize(w, name))  # noqa: B023
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_halves_are_torchs_at_every_edge(encoder):
    """Scales pass through float16: normal, subnormal, ties, the last before infinity."""
    edges = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (edges[1:] + edges[:-1]) / 2
    above, below = (torch.nextafter(middles, torch.tensor(to)) for to in (torch.inf, 0.0))
    scales = torch.cat([edges, middles, above, below])
    w = torch.zeros(len(scales), 32)
    w[:, 3] = scales * 127
    exact = (w[:, 3] / 127) == scales  # so that the scale is the value itself
    blocks, _ = encoder.q8_0(w)
    stored = blocks[:, :2].contiguous().view(torch.float16)[:, 0]
    assert exact.float().mean() > 0.5
    assert torch.equal(stored[exact], scales[exact].half())
    assert torch.equal(stored, (w[:, 3] / 127).half())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_is_the_same_in_any_threads(encoder, without, monkeypatch, threads):
    w = weights("outliers", 700, 4608).bfloat16()  # several chunks
    for encoding in (
        NativeInt8(256),
        NativeInt8(),
        Blocks("Q8_0", (700, 4608)),
        Blocks("Q6_K", (700, 4608)),
    ):
        plan = TensorPlan(
            "conditional", "layers.0.w", (700, 4608), encoding, linear=True, quantized=True
        )
        default = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            shares = []
            stored, meter = encode_tensor(plan, w, advance=shares.append)
            torch.set_num_threads(1)
            formula, formula_meter = without(lambda: encode_tensor(plan, w))  # noqa: B023
        finally:
            torch.set_num_threads(default)
        assert shares == sorted(shares)
        assert shares[-1] == 1
        for suffix, tensor in formula.items():
            assert torch.equal(stored[suffix], tensor)
        for mine, theirs in zip(meter.to_list(), formula_meter.to_list(), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)


def test_nothing_is_compiled_unless_asked(tmp_path):
    """Importing and encoding run no compiler, and leave nothing in the user's folder."""
    code = (
        "import subprocess, torch\n"
        "def refuse(*a, **k): raise SystemExit('a compiler was started')\n"
        "subprocess.run = subprocess.Popen = refuse\n"
        "import ideogram4_quant.quant.quantize, ideogram4_quant.quant.compiled\n"
        "from ideogram4_quant.ops.blocks import quantize\n"
        "quantize(torch.ones(1, 256), 'Q4_K')\n"
    )
    where = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_torch_encodes_and_one_line_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    compiler.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert compiled.prepare() is None
    assert len(caplog.records) == 1
    assert "no C compiler" in caplog.text
    assert compiler.load() is None
    compiler.load.cache_clear()


@pytest.fixture
def copied(library, monkeypatch, tmp_path):
    """An empty folder of the user's, where compiling is copying what was compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_compile", lambda cc, out: shutil.copyfile(library._name, out))
    compiler.load.cache_clear()
    yield
    compiler.load.cache_clear()


def test_what_is_built_after_the_first_weights_encodes_the_next(copied):
    assert native.encoder_for(torch.ones(1)) is None
    compiler.build(compiled.check)
    assert native.encoder_for(torch.ones(1)) is not None


def test_a_library_that_was_cut_off_is_built_again(copied, caplog):
    path = compiler.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF and no more")
    assert native.encoder_for(torch.ones(1)) is None
    assert compiler.COMMAND in caplog.text  # what it says to do helps
    compiler.build(compiled.check)
    assert native.encoder_for(torch.ones(1)) is not None


def test_building_the_encoder_is_no_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.load.cache_clear()
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert compiled.prepare() == compiler.library_path()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    compiler.load.cache_clear()


def test_a_library_of_other_bits_is_not_kept(monkeypatch, tmp_path):
    """As of a compiler that takes liberties with float arithmetic."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast = tuple(flag for flag in compiler.FLAGS if "contract" not in flag)
    monkeypatch.setattr(compiler, "FLAGS", (*fast, "-ffast-math"))
    with pytest.raises(BackendUnavailableError, match="bit for bit"):
        compiler.build(compiled.check)
    assert not compiler.library_path().exists()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "FLAGS", ("-no-such-flag-at-all",))
    with pytest.raises(BackendUnavailableError, match="no-such-flag"):
        compiler.build(compiled.check)


def test_another_source_or_processor_is_another_library(monkeypatch, tmp_path):
    here = compiler.library_path()
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    assert compiler.library_path() != here
