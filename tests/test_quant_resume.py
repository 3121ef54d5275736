"""Interrupted runs: what they leave, and that going on gives the bytes of a run in one go."""

import fcntl
import json
import signal
import subprocess
import sys
import textwrap

import pytest

from ideogram4_quant.files.partial import ResumeError, partial_path
from ideogram4_quant.quant import (
    NonFiniteWeightError,
    QuantOptions,
    TypeRule,
    quantize_checkpoint,
    stream,
)
from ideogram4_quant.tests import quant_model as model

LEVELS = {"INT8 W8A8 rotated": "q.safetensors", "Q4_K": "q.gguf"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "bf16.safetensors", model.weights())


@pytest.fixture(scope="module", params=LEVELS)
def whole(request, tmp_path_factory, source):
    """(level, file name, bytes of a run in one go, its report)."""
    out = tmp_path_factory.mktemp("whole") / LEVELS[request.param]
    report = quantize_checkpoint(source, request.param, out)
    return request.param, out.name, out.read_bytes(), report


def interrupt(source, level, out, after=400_000, **options):
    """Ctrl-C once this many bytes are written."""
    start = source.stat().st_size

    def progress(done, total):
        if done > start + after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, level, out, progress=progress, keep_partial=True, **options)


def test_going_on_gives_the_same_bytes_and_figures(tmp_path, source, whole, monkeypatch):
    level, name, wanted, report = whole
    out = tmp_path / name
    interrupt(source, level, out)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.partial"]
    encoded = []
    encode = stream.encode_tensor

    def counted(plan, *args, **kwargs):
        encoded.append(plan.name)
        return encode(plan, *args, **kwargs)

    monkeypatch.setattr(stream, "encode_tensor", counted)
    seen = []
    resumed = quantize_checkpoint(
        source, level, out, resume=True, progress=lambda *step: seen.append(step)
    )
    assert out.read_bytes() == wanted
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert 0 < len(encoded) < len(report.tensors)
    assert resumed.tensors == report.tensors
    assert resumed.meter.to_list() == report.meter.to_list()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_twice_interrupted_and_after_kill_9(tmp_path, source, whole):
    level, name, wanted, _ = whole
    out = tmp_path / name
    script = f"""
        import os
        from ideogram4_quant.quant import quantize_checkpoint
        def progress(done, total):
            if done > {source.stat().st_size} + 300_000:
                os.kill(os.getpid(), {int(signal.SIGKILL)})
        quantize_checkpoint(
            {str(source)!r}, {level!r}, {str(out)!r}, progress=progress, keep_partial=True
        )
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.partial"]
    interrupt(source, level, out, after=900_000, resume=True)
    assert not out.exists()
    quantize_checkpoint(source, level, out, resume=True)
    assert out.read_bytes() == wanted


def test_damage_and_cut_lines_are_written_again(tmp_path, source, whole):
    """As after a power cut: data that never reached the disk, a line without its end."""
    level, name, wanted, report = whole
    out = tmp_path / name
    interrupt(source, level, out, after=900_000)
    unfinished = partial_path(out)
    content = bytearray(unfinished.read_bytes())
    content[report.size - 1000 : report.size] = bytes(1000)
    content[report.size // 2] ^= 1
    unfinished.write_bytes(bytes(content) + b'{"part":"layers.0')
    quantize_checkpoint(source, level, out, resume=True)
    assert out.read_bytes() == wanted


@pytest.mark.parametrize("value", [None, [], [1.0, 0.5, 0.1], "12345", [1.0] * 4 + [10**400]])
def test_notes_that_no_meter_gave_are_made_again(tmp_path, source, whole, value):
    level, name, wanted, report = whole
    out = tmp_path / name
    interrupt(source, level, out)
    content = partial_path(out).read_bytes()
    lines = [json.loads(line) for line in content[report.size :].splitlines()]
    notes = [line for line in lines if "note" in line]
    assert notes
    for note in notes:
        note["value"] = value
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    partial_path(out).write_bytes(content[: report.size] + text)
    resumed = quantize_checkpoint(source, level, out, resume=True)
    assert out.read_bytes() == wanted
    assert resumed.tensors == report.tensors


def test_nothing_to_go_on_with_is_a_start(tmp_path, source, whole):
    level, name, wanted, report = whole
    out = tmp_path / name
    quantize_checkpoint(source, level, out, resume=True)
    assert out.read_bytes() == wanted
    for content in (b"", bytes(report.size)):  # killed before the first line
        out.unlink()
        partial_path(out).write_bytes(content)
        quantize_checkpoint(source, level, out, resume=True)
        assert out.read_bytes() == wanted


@pytest.mark.parametrize("kept", [1, 9, -1], ids=["a brace", "a few letters", "all but its end"])
def test_a_first_line_that_was_cut_short_is_a_start(tmp_path, source, whole, kept):
    """Killed while the line that names source and options was on its way to the disk."""
    level, name, wanted, report = whole
    out = tmp_path / name
    interrupt(source, level, out)
    unfinished = partial_path(out)
    content = unfinished.read_bytes()
    first = content[report.size :].split(b"\n")[0]
    unfinished.write_bytes(bytes(report.size) + first[: kept if kept > 0 else len(first)])
    quantize_checkpoint(source, level, out, resume=True)
    assert out.read_bytes() == wanted


def test_a_cut_first_line_of_another_run_is_refused(tmp_path, source, whole):
    level, name, _, report = whole
    out = tmp_path / name
    partial_path(out).write_bytes(bytes(report.size) + b'{"size":1,"fin')
    with pytest.raises(ResumeError, match="another source, or of other options"):
        quantize_checkpoint(source, level, out, resume=True)


def test_another_source_or_other_options_are_refused(tmp_path, source):
    out = tmp_path / "q.gguf"
    interrupt(source, "Q4_K", out)
    before = partial_path(out).read_bytes()
    other = model.write(tmp_path / "other.safetensors", model.weights(1))
    attempts = (
        (other, "Q4_K", None),
        (source, "Q4_0", None),
        (source, "Q5_K", None),
        (source, "Q4_K", QuantOptions(types=(TypeRule("*.o", "Q6_K"),))),
        (source, "Q4_K", QuantOptions(licence="other")),
    )
    for given, level, options in attempts:
        with pytest.raises(ResumeError, match=r"q\.gguf\.partial: .*unfinished file of another"):
            quantize_checkpoint(given, level, out, options=options, resume=True)
        assert partial_path(out).read_bytes() == before
    partial_path(out).write_bytes(b"notes of mine\n")
    with pytest.raises(ResumeError, match="another size"):
        quantize_checkpoint(source, "Q4_K", out, resume=True)
    assert partial_path(out).read_bytes() == b"notes of mine\n"


def test_an_unfinished_file_is_not_thrown_away_unasked(tmp_path, source, whole):
    level, name, wanted, _ = whole
    out = tmp_path / name
    interrupt(source, level, out)
    with pytest.raises(ResumeError, match=r"earlier run.*--resume"):
        quantize_checkpoint(source, level, out, keep_partial=True)
    quantize_checkpoint(source, level, out, keep_partial=True, overwrite=True)
    assert out.read_bytes() == wanted
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_two_processes_do_not_write_one_file(tmp_path, source):
    out = tmp_path / "q.gguf"
    interrupt(source, "Q4_K", out)
    with open(partial_path(out), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResumeError, match="another process"):
            quantize_checkpoint(source, "Q4_K", out, resume=True)
    quantize_checkpoint(source, "Q4_K", out, resume=True)


def test_a_damaged_source_leaves_nothing_to_go_on_with(tmp_path):
    weights = model.weights()
    weights["layers.1.feed_forward.w3.weight"][5, 5] = float("nan")
    source = model.write(tmp_path / "s.safetensors", weights)
    with pytest.raises(NonFiniteWeightError):
        quantize_checkpoint(source, "Q4_K", tmp_path / "q.gguf", keep_partial=True)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
