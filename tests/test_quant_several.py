"""Both copies in one run: nothing is written before both can be, and Ctrl-C loses neither."""

from __future__ import annotations

import shlex

import pytest

from ideogram4_quant.cli import main
from ideogram4_quant.quant import quantize, stream
from ideogram4_quant.tests import quant_model as model


@pytest.fixture
def pair(tmp_path):
    """Two folders, a copy in each, under one name."""
    paths = []
    for copy in ("conditional", "unconditional"):
        folder = tmp_path / copy
        folder.mkdir()
        paths.append(model.write(folder / "m.safetensors", model.weights(), copy))
    return paths


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of ``quantize --level Q8_0``."""

    def command(*argv: object):
        code = main(["quantize", *map(str, argv), "--level", "Q8_0"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_two_of_one_name_are_refused_before_the_first_is_written(pair, tmp_path, run, dry):
    out = tmp_path / "out"
    out.mkdir()
    code, _, errors = run(pair[0], "--pair", pair[1], "--out", out, *dry)
    assert code == 1
    assert "both files would be written under one name" in errors
    assert list(out.iterdir()) == []


def test_same_copy_twice_is_refused_before_the_first_is_written(pair, tmp_path, run):
    code, _, errors = run(pair[0], "--pair", pair[0], "--out", tmp_path / "new.gguf")
    assert code == 1
    assert "both files are the conditional copy" in errors
    assert not list(tmp_path.glob("*.gguf*"))


def test_both_copies_of_a_file_with_one_are_refused_before_it_is_written(pair, run):
    code, _, errors = run(pair[0], "--copy", "both")
    assert code == 1
    assert "the file is the other copy" in errors
    assert not list(pair[0].parent.glob("*.gguf*"))


@pytest.mark.parametrize("at", ["layers.1.attention.qkv.weight", None])
def test_what_ctrl_c_says_goes_on_with_the_second_file(pair, run, monkeypatch, at):
    """In the middle of it, and while its source is read for the hash."""
    words = [pair[0], "--pair", pair[1]]
    assert run(*words)[0] == 0
    outs = [path.parent / "m-Q8_0.gguf" for path in pair]
    wanted = [out.read_bytes() for out in outs]
    for out in outs:
        out.unlink()
    encode, hash_files = stream.encode_tensor, quantize.hash_files

    def interrupted(plan, *args, **kwargs):
        if plan.copy == "unconditional" and plan.name == at:
            raise KeyboardInterrupt
        return encode(plan, *args, **kwargs)

    def unread(paths, *args):
        if at is None and pair[1] in paths:
            raise KeyboardInterrupt
        return hash_files(paths, *args)

    with monkeypatch.context() as patched:
        patched.setattr(stream, "encode_tensor", interrupted)
        patched.setattr(quantize, "hash_files", unread)
        code, _, errors = run(*words)
    assert code == 130
    told = shlex.split(errors.splitlines()[-1])
    assert told[:2] == ["ideogram4-quant", "quantize"]
    stamp = outs[0].stat().st_mtime_ns
    assert main(told[1:]) == 0
    assert [out.read_bytes() for out in outs] == wanted
    assert outs[0].stat().st_mtime_ns == stamp


def test_a_finished_file_of_another_source_is_not_kept(pair, run):
    outs = [path.parent / "m-Q8_0.gguf" for path in pair]
    assert run(pair[0], "--pair", pair[1])[0] == 0
    code, _, errors = run(pair[0], "--pair", pair[1], "--resume")
    assert code == 1  # nothing is left to do
    assert "exists already" in errors
    outs[1].unlink()
    model.write(pair[0], model.weights(seed=5), "conditional")
    code, _, errors = run(pair[0], "--pair", pair[1], "--resume")
    assert code == 1
    assert "not of this choice" in errors
    assert not outs[1].exists()
