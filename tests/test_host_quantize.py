"""The quantizing node through the server: its file is the command's, nothing else is touched."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.quant import Calibration, QuantOptions, quantize_checkpoint
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.server import Rejected, Run, Server

pytestmark = pytest.mark.host
STEM = Path(graphs.CONDITIONAL).stem.removesuffix("_bf16")


def graph(**inputs) -> dict:
    chosen = {
        "source": graphs.CONDITIONAL,
        "level": "Q4_K",
        "copy": "as in the file",
        "filename": "",
        "overwrite": False,
        **inputs,
    }
    return {
        "quantized": graphs.node("Ideogram4QuantQuantize", **chosen),
        "report": graphs.node("PreviewAny", source=("quantized", 1)),
    }


def message(run: Run) -> str:
    assert run.status == "error"
    return run.error["exception_message"]


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("Q4_K", f"{STEM}-Q4_K.gguf"),
        ("INT8 W8A8 rotated", f"{STEM}-INT8_W8A8_rotated.safetensors"),
    ],
)
def test_the_file_is_that_of_the_command(server, written_to, tmp_path, level, name):
    run = server.run(graph(level=level))
    assert run.status == "success", run.error
    wanted = tmp_path / name
    quantize_checkpoint(written_to / graphs.CONDITIONAL, level, wanted)
    assert (written_to / name).read_bytes() == wanted.read_bytes()
    shown = run.outputs["report"]["text"][0]
    assert level in shown
    assert "worst 10 of" in shown
    assert "Press R" in shown
    assert not list(written_to.glob("*.partial"))


def test_existing_files_stay_unless_asked(server, written_to):
    (written_to / "mine.gguf").write_bytes(b"mine")
    run = server.run(graph(filename="mine"))
    assert "mine.gguf: exists already" in message(run)
    assert "the node's input overwrite" in message(run)
    assert "--" not in message(run)
    assert (written_to / "mine.gguf").read_bytes() == b"mine"
    run = server.run(graph(filename="mine", overwrite=True))
    assert run.status == "success", run.error
    assert (written_to / "mine.gguf").stat().st_size > 10**6


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "..\\x",
        "/elsewhere/x",
        ".hidden",
        "nul",
        "C:x",
        "x.safetensors",
        "..",
        "x\ny",
    ],
)
def test_names_do_not_leave_the_folder(server, written_to, name):
    before = sorted(path for path in written_to.parent.parent.rglob("*") if path.is_file())
    text = message(server.run(graph(filename=name)))
    assert "needed a plain name" in text
    after = sorted(path for path in written_to.parent.parent.rglob("*") if path.is_file())
    assert [p for p in after if p not in before and p.suffix in (".gguf", ".safetensors")] == []


def test_sources_are_looked_up_and_checked(server, written_to):
    for source in ("no.safetensors", "../../secret.safetensors"):
        with pytest.raises(Rejected) as caught:
            server.run(graph(source=source))
        assert "is not in" in json.dumps(caught.value.report) or "not in list" in json.dumps(
            caught.value.report
        )
    run = server.run(graph(source="pocket-Q4_K-conditional.gguf", level="Q8_0"))
    assert "already quantized below" in message(run)
    assert not list(written_to.glob("*.partial"))


def interrupted(server: Server, written_to, name: str):
    """The run of a prompt that writes ``name``, interrupted once its unfinished file is there."""
    queued = {"prompt": graph(filename=name, level="Q5_K")}
    prompt = server.post("/prompt", queued)["prompt_id"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (written_to / f"{name}.gguf.partial").exists():
        time.sleep(0.005)
    server.post("/interrupt", {})
    return server.wait(prompt)


def test_an_interrupted_run_goes_on(server: Server, written_to, tmp_path):
    # A fast machine may end a run before the interruption comes; it will not do so five times.
    tries = (
        (name, interrupted(server, written_to, name)) for name in map("slow{}".format, range(5))
    )
    name, run = next((n, run) for n, run in tries if run.status != "success")
    out, unfinished = written_to / f"{name}.gguf", written_to / f"{name}.gguf.partial"
    assert any(kind == "execution_interrupted" for kind, _ in run.messages)
    assert unfinished.exists()
    assert not out.exists()
    run = server.run(graph(filename=name, level="Q5_K"))
    assert run.status == "success", run.error
    wanted = tmp_path / "wanted.gguf"
    quantize_checkpoint(written_to / graphs.CONDITIONAL, "Q5_K", wanted)
    assert out.read_bytes() == wanted.read_bytes()
    assert not unfinished.exists()


def test_both_copies_are_written_in_one_run_and_keep_their_names(server, written_to, tmp_path):
    tune = {name: written_to / f"my-tune-v2{end}.safetensors" for name, end in TUNE.items()}
    for name, path in tune.items():
        path.write_bytes((written_to / name).read_bytes())
    first, second = (path.name for path in tune.values())
    run = server.run(graph(source=first, pair=second))
    assert run.status == "success", run.error
    for source, name in ((first, "my-tune-v2-Q4_K.gguf"), (second, "my-tune-v2-uncond-Q4_K.gguf")):
        wanted = tmp_path / name
        quantize_checkpoint(written_to / source, "Q4_K", wanted)
        assert (written_to / name).read_bytes() == wanted.read_bytes()
        assert name in run.outputs["report"]["text"][0]
    named = written_to / "other-unconditional.gguf"
    named.touch()
    again = server.run(graph(source=first, pair=second, filename="other"))
    assert f"{named.name}: exists already" in message(again)
    assert not (written_to / "other.gguf").exists()  # asked before the first one is written
    named.unlink()
    run = server.run(graph(source=first, pair=second, filename="other"))
    assert run.status == "success", run.error
    assert named.read_bytes() == (written_to / "my-tune-v2-uncond-Q4_K.gguf").read_bytes()


TUNE = {graphs.CONDITIONAL: "", graphs.UNCONDITIONAL: "-uncond"}


def test_a_preset_needs_a_calibration_and_makes_the_commands_file(server, written_to, tmp_path):
    text = message(server.run(graph(preset="INT8 auto")))
    assert "Connect Calibrate Ideogram 4 to the input calibration" in text
    made = graph(preset="INT8 auto", filename="best") | {
        **graphs.parts(),
        "calibrated": graphs.node(
            "Ideogram4QuantCalibrate",
            conditional=("model", 0),
            unconditional=("model", 1),
            positive=("positive", 0),
            preset="turbo",
            seed=1,
            pictures=1,
            filename_prefix="calibration/preset",
            width=128,
            height=64,
            steps=2,
        ),
        "path": graphs.node("PreviewAny", source=("calibrated", 1)),
    }
    made["quantized"]["inputs"]["calibration"] = ["calibrated", 0]
    run = server.run(made)
    assert run.status == "success", run.error
    calibration = Calibration.load(run.outputs["path"]["text"][0])
    wanted = tmp_path / "best.safetensors"
    options = QuantOptions(calibration=calibration, treatment="auto")
    quantize_checkpoint(
        written_to / graphs.CONDITIONAL, "INT8 W8A8 rotated", wanted, options=options
    )
    made = open_checkpoint(written_to / "best.safetensors"), open_checkpoint(wanted)
    tensors = [found.load("conditional") for found in made]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        dense = [getattr(t, "dequantize", lambda t=t: t)() for t in (tensor, tensors[1][name])]
        assert torch.equal(*dense), name
