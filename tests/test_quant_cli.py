"""The three commands as a user runs them: tables on stdout, one line an error, exit codes."""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.cli import main
from ideogram4_quant.quant import quantize, stream
from ideogram4_quant.tests import quant_model as model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "bf16.safetensors", model.weights())


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of a command line."""

    def command(*argv: object):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_quantize_inspect_verify_in_a_row(tmp_path, source, run):
    out = tmp_path / "q.safetensors"
    code, text, progress = run("quantize", source, "--level", "int8-rotated", "--out", out)
    assert code == 0
    assert "INT8 W8A8 rotated" in text
    assert "worst 10 of 19 linears:" in text
    assert "100%" in progress
    code, text, _ = run("inspect", out)
    assert code == 0
    assert "INT8 W8A8 rotated" in text
    assert "I8" in text
    assert "model_type: ideogram4_cond" in text
    code, text, _ = run("verify", out, "--against", source, "--worst", 3)
    assert code == 0
    assert "worst 3 of 12 that differ:" in text
    assert len(re.findall(r"^layers\S+ +INT8 rot256  ", text, re.M)) == 3


def test_json_agrees_between_the_tools(tmp_path, source, run):
    out = tmp_path / "q.gguf"
    run("quantize", source, "--level", "Q4_K", "--out", out, "--protect", "*.0.*.o")
    code, text, _ = run("inspect", out, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["level"] == "Q4_K"
    assert found["copies"] == ["conditional"]
    assert found["config"]["num_layers"] == 2
    counts = {row["type"]: row["tensors"] for row in found["types"]}
    assert counts == {"Q4_K": 11, "BF16": 7 + 1, "F32": len(model.shapes()) - 19}
    assert found["size"] == out.stat().st_size
    code, text, _ = run("verify", out, "--against", source, "--json")
    verified = json.loads(text)
    assert code == 0
    assert 20 < verified["sqnr_db"] < 30
    assert verified["missing"] == verified["extra"] == []
    figures = {row["name"]: row["sqnr_db"] for row in verified["tensors"]}
    assert figures["layers.0.attention.o.weight"] is None  # equal: no figure
    assert 22 < figures["layers.0.attention.qkv.weight"] < 24


def test_dry_run_writes_nothing(tmp_path, source, run):
    out = tmp_path / "q.gguf"
    code, text, _ = run(
        "quantize", source, "--level", "Q4_K", "--out", out, "--type", "*.w2=Q6_K", "--dry-run"
    )
    assert code == 0
    assert "Q6_K" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--level", "Q3_X"], "unknown level"),
        (["--level", "Q4_K", "--protect", "w9"], "no linear has this name"),
        (["--level", "Q4_K", "--type", "w2"], "--type needs NAME=TYPE"),
        (["--level", "Q4_K", "--copy", "unconditional"], "the file is the other copy"),
        (["--level", "INT8 W8A8"], "does not fit its format"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(tmp_path, source, run, words, message):
    code, text, errors = run("quantize", source, "--out", tmp_path / "q.gguf", *words)
    assert code == 1
    assert text == ""
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_missing_files_and_refused_overwriting(tmp_path, source, run):
    missing = tmp_path / "no.safetensors"
    for words in (["inspect", missing], ["verify", missing, "--against", source]):
        code, _, errors = run(*words)
        assert code == 1
        assert "no.safetensors" in errors
    out = tmp_path / "q.safetensors"
    words = ["quantize", source, "--level", "int8", "--out", out]
    assert run(*words)[0] == 0
    code, _, errors = run(*words)
    assert code == 1
    assert "--overwrite" in errors
    assert run(*words, "--overwrite")[0] == 0


def test_interruption_is_no_traceback(tmp_path, source, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize_checkpoint", interrupted)
    code, _, errors = run("quantize", source, "--level", "Q8_0", "--out", tmp_path / "q.gguf")
    assert code == 130
    assert "interrupted" in errors


def test_ctrl_c_says_how_to_go_on_and_resume_does(tmp_path, source, run, monkeypatch):
    out = tmp_path / "q.gguf"
    words = ["quantize", source, "--level", "Q4_K", "--out", out]
    assert run(*words)[0] == 0
    wanted = out.read_bytes()
    out.unlink()
    encode = stream.encode_tensor

    def interrupted(plan, *args, **kwargs):
        if plan.name == "layers.1.attention.qkv.weight":
            raise KeyboardInterrupt
        return encode(plan, *args, **kwargs)

    monkeypatch.setattr(stream, "encode_tensor", interrupted)
    code, _, errors = run(*words)
    assert code == 130
    assert "q.gguf.partial holds what is done: --resume goes on with it" in errors
    told = shlex.split(errors.splitlines()[-1])
    assert told == ["ideogram4-quant", *map(str, words), "--resume"]
    monkeypatch.undo()
    code, _, errors = run(*words)
    assert code == 1
    assert "Go on with it (--resume)" in errors
    code, text, _ = run(*words, "--resume")
    assert code == 0
    assert "worst 10 of" in text
    assert out.read_bytes() == wanted


def test_verify_names_what_has_no_counterpart_and_what_changed(tmp_path, source, run):
    tensors = load_file(source)
    whole = model.write(tmp_path / "whole.safetensors", tensors, "unconditional")
    code, _, errors = run("verify", whole, "--against", source)
    assert code == 1
    assert "no copy in common" in errors
    tensors["layers.0.attention.o.weight"] = tensors["layers.0.attention.o.weight"] + 1
    del tensors["llm_cond_norm.weight"], tensors["llm_cond_proj.weight"]
    del tensors["llm_cond_proj.bias"]  # an unconditional copy may be without them
    other = model.write(tmp_path / "other.safetensors", tensors, "unconditional")
    code, text, _ = run("verify", other, "--against", whole)
    assert code == 0
    assert "worst 1 of 1 that differ" in text
    assert "3 tensors missing: llm_cond_norm.weight" in text
    code, text, _ = run("verify", source, "--against", source)
    assert "are equal" in text


@pytest.mark.parametrize(("at_least", "code"), [(30, 0), (60, 1), ("nan", 1), (None, 0)])
def test_verify_fails_below_the_figure_that_is_asked_for(tmp_path, source, run, at_least, code):
    """As rounding the weights to their rows' absmax / 127 leaves them: about 40 dB."""
    state = load_file(source)
    for name, weight in state.items():
        if weight.ndim == 2 and "embed" not in name:
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-9) / 127
            state[name] = ((weight.float() / scale).round() * scale).bfloat16()
    rounded = model.write(tmp_path / "rounded.safetensors", state)
    asked = () if at_least is None else ("--at-least", at_least)
    got, text, errors = run("verify", rounded, "--against", source, *asked)
    assert got == code
    assert "worst" in text
    assert (f"below the {at_least} dB asked for" in errors) == bool(code)
    exact, _, _ = run("verify", source, "--against", source, "--at-least", 1000)
    assert exact == 0


def test_verify_of_other_shapes_is_an_error(tmp_path, source, run):
    tensors = load_file(source)
    tensors["llm_cond_proj.weight"] = torch.zeros(256, 416).bfloat16()
    tensors["llm_cond_norm.weight"] = torch.zeros(416).bfloat16()
    other = model.write(tmp_path / "c.safetensors", tensors, metadata={"config": "{}"})
    code, _, errors = run("verify", other, "--against", source)
    assert code == 1
    assert "of another shape" in errors
