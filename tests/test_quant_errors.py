"""What quantizing refuses, what it says then, and that nothing is left behind."""

import logging
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from ideogram4_quant.checkpoint.writers import OutputExistsError, WriteError
from ideogram4_quant.errors import CheckpointError, Ideogram4QuantError, PairMismatchError
from ideogram4_quant.quant import (
    AlreadyQuantizedError,
    NonFiniteWeightError,
    QuantOptionError,
    QuantOptions,
    plan_quantization,
    quantize_checkpoint,
)
from ideogram4_quant.quant.encode import encode_tensor
from ideogram4_quant.quant.encodings import Blocks, NativeInt8, Unquantized
from ideogram4_quant.quant.plan import TensorPlan
from ideogram4_quant.tests import quant_model as model

LEVELS = {"INT8 W8A8": "q.safetensors", "INT8 W8A8 rotated": "q.safetensors", "Q4_K": "q.gguf"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "bf16.safetensors", model.weights())


@pytest.fixture(scope="module")
def q4(tmp_path_factory, source):
    path = tmp_path_factory.mktemp("q4") / "q4.gguf"
    quantize_checkpoint(source, "Q4_K", path)
    return path


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.1.feed_forward.w3.weight", "layers.0.ffn_norm1.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, level, value, name):
    tensors = model.weights()
    tensors[name].view(-1)[-3] = value
    source = model.write(tmp_path / "s.safetensors", tensors)
    out = tmp_path / LEVELS[level]
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize_checkpoint(source, level, out)
    place = [767, 253] if tensors[name].ndim == 2 else [253]
    assert f"tensor {name}: " in str(caught.value)
    assert f"found {value} at {place}" in str(caught.value)
    assert "s.safetensors" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors"]


def test_a_value_too_large_for_the_type_is_named():
    """Q8_0's block scale is fp16: 1e8 / 127 does not fit."""
    encoding = Blocks("Q8_0", (2, 32))
    plan = TensorPlan("unconditional", "layers.0.x.weight", (2, 32), encoding, True)
    with pytest.raises(
        NonFiniteWeightError, match=r"unconditional\.layers.*stored as Q8_0.*too large.*Protect"
    ):
        encode_tensor(plan, torch.full((2, 32), 1e8))


@pytest.mark.parametrize(
    "encoding", [Unquantized(), NativeInt8(), NativeInt8(256), Blocks("Q4_K", (0, 256))], ids=str
)
def test_no_rows_are_encoded_to_no_rows(encoding):
    plan = TensorPlan("conditional", "layers.0.x.weight", (0, 256), encoding, True)
    stored, meter = encode_tensor(plan, torch.zeros(0, 256))
    assert stored["weight"].shape[0] == 0
    assert meter.sqnr_db == float("inf")


def test_rows_are_encoded_alike_in_chunks_and_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(63, 256, generator=generator)
    plan = TensorPlan("conditional", "layers.0.x.weight", (63, 256), NativeInt8(256), True)
    whole, meter = encode_tensor(plan, weight)
    monkeypatch.setattr("ideogram4_quant.quant.encode.CACHED", 1000)
    parts, chunked = encode_tensor(plan, weight)
    assert all(torch.equal(whole[suffix], parts[suffix]) for suffix in whole)
    assert chunked.sqnr_db == pytest.approx(meter.sqnr_db, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_an_existing_output_stays_unless_asked(tmp_path, source, level):
    out = tmp_path / LEVELS[level]
    out.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        quantize_checkpoint(source, level, out)
    assert out.read_bytes() == b"mine"
    report = quantize_checkpoint(source, level, out, overwrite=True)
    assert out.stat().st_size == report.size
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_the_source_is_never_the_output(tmp_path, source):
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    before = source.read_bytes()
    for out in (source, link):
        with pytest.raises(QuantOptionError, match="output is the source itself"):
            quantize_checkpoint(source, "INT8 W8A8", out, overwrite=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize(("level", "out"), [("INT8 W8A8", "q.gguf"), ("Q8_0", "q.safetensors")])
def test_the_name_must_fit_the_format(tmp_path, source, level, out):
    with pytest.raises(QuantOptionError, match="a name ending in"):
        quantize_checkpoint(source, level, tmp_path / out)


@pytest.mark.parametrize("level", ["INT8 W8A8", "Q8_0", "Q6_K", "Q5_K"])
def test_a_source_below_the_level_is_refused(tmp_path, q4, level):
    out = tmp_path / ("q.gguf" if level.startswith("Q") else "q.safetensors")
    with pytest.raises(
        AlreadyQuantizedError, match=r"q4\.gguf: tensor layers.*found Q4_K.*BF16 or FP8"
    ):
        quantize_checkpoint(q4, level, out)
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_the_same_class_is_rounded_again_with_a_warning(tmp_path, source, caplog):
    int8 = tmp_path / "int8.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", int8)
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(int8, "Q8_0", tmp_path / "q.gguf")
    assert [r.message for r in caplog.records if "a second time" in r.message]


def test_a_quantized_source_above_the_level_is_fine(tmp_path, source, caplog):
    q8 = tmp_path / "q8.gguf"
    quantize_checkpoint(source, "Q8_0", q8)
    with caplog.at_level(logging.WARNING):
        report = quantize_checkpoint(q8, "Q4_K", tmp_path / "q4.gguf")
    assert not [r for r in caplog.records if "a second time" in r.message]
    assert 20 < report.meter.sqnr_db < 25


def test_copies_must_be_in_the_file_and_spelt_right(tmp_path, source):
    with pytest.raises(CheckpointError, match="no such copy"):
        quantize_checkpoint(source, "INT8 W8A8", tmp_path / "q.safetensors", copy="cond")
    with pytest.raises(PairMismatchError, match=r"other copy.*needed unconditional"):
        quantize_checkpoint(source, "INT8 W8A8", tmp_path / "q.safetensors", copy="unconditional")


def test_both_copies_need_a_choice_or_a_container_for_both(tmp_path, source):
    other = model.write(tmp_path / "u.safetensors", model.weights(9), "unconditional")
    both = tmp_path / "both.safetensors"
    lab = QuantOptions("transformer-lab")
    quantize_checkpoint(source, "INT8 W8A8", both, pair=other, options=lab)
    with pytest.raises(QuantOptionError, match=r"holds both copies.*--copy conditional"):
        quantize_checkpoint(both, "Q4_K", tmp_path / "q.gguf", base=source)
    report = quantize_checkpoint(both, "Q4_K", tmp_path / "q.gguf", base=source, copy="conditional")
    assert report.copies == ("conditional",)


def test_pairs_must_be_two_copies_of_one_shape(tmp_path, source):
    lab = QuantOptions("transformer-lab")
    out = tmp_path / "q.safetensors"
    with pytest.raises(PairMismatchError, match="this is not the unconditional copy"):
        quantize_checkpoint(source, "INT8 W8A8", out, pair=source, options=lab)
    with pytest.raises(QuantOptionError, match="second source is for files with both"):
        quantize_checkpoint(source, "INT8 W8A8", out, pair=source)
    deeper = model.write(
        tmp_path / "deep.safetensors", model.weights(layers=3), "unconditional", {"config": "{}"}
    )
    with pytest.raises(PairMismatchError, match=r"does not belong to.*num_layers 2 against 3"):
        quantize_checkpoint(source, "INT8 W8A8", out, pair=deeper, options=lab)


def test_a_full_disk_is_told_before_the_work(tmp_path, source, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    for level, name in LEVELS.items():
        with pytest.raises(WriteError, match="not enough free space"):
            quantize_checkpoint(source, level, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("level", LEVELS)
def test_an_interruption_leaves_nothing(tmp_path, source, level):
    size = source.stat().st_size

    def progress(done, total):
        if done > size:  # while tensors are being written, not while the source is hashed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, level, tmp_path / LEVELS[level], progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_kill_mid_write_leaves_nothing_under_the_name(tmp_path, source):
    out = tmp_path / "q.safetensors"
    script = f"""
        import os
        from ideogram4_quant.quant import quantize_checkpoint
        def progress(done, total):
            if done > {source.stat().st_size} + 100_000:
                os.kill(os.getpid(), {int(signal.SIGKILL)})
        quantize_checkpoint({str(source)!r}, "INT8 W8A8", {str(out)!r}, progress=progress)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    quantize_checkpoint(source, "INT8 W8A8", out)


def test_not_ideogram_4_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"model.embed.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        quantize_checkpoint(path, "INT8 W8A8", tmp_path / "q.safetensors")


def test_plans_write_nothing_and_know_the_size(tmp_path, source):
    for level, name in LEVELS.items():
        out = tmp_path / name
        plan = plan_quantization(source, level, out)
        assert list(tmp_path.iterdir()) == []
        report = quantize_checkpoint(source, level, out)
        header = report.size - plan.nbytes
        assert 0 < header < 20_000
        assert plan.nbytes == sum(t.nbytes for t in report.tensors)
        assert level in plan.table()
        out.unlink()


def test_progress_runs_from_the_hash_to_the_last_byte(tmp_path, source):
    seen = []
    quantize_checkpoint(
        source, "INT8 W8A8", tmp_path / "q.safetensors", progress=lambda d, t: seen.append((d, t))
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][0] == source.stat().st_size


def test_every_error_is_one_of_the_packs():
    for error in (AlreadyQuantizedError, NonFiniteWeightError, QuantOptionError, WriteError):
        assert issubclass(error, Ideogram4QuantError)
