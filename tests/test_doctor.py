"""The doctor: what it finds in a ComfyUI's folders, what it says is missing, its exit code."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ideogram4_quant import cli
from ideogram4_quant.cards.sizes import encoder_bytes
from ideogram4_quant.checkpoint.level_order import LEVELS
from ideogram4_quant.checkpoint.pairs import WORKING_MEMORY
from ideogram4_quant.diagnostics.doctor import examine
from ideogram4_quant.diagnostics.doctor.comfyui import find_host, model_folders
from ideogram4_quant.diagnostics.doctor.machine import Device
from ideogram4_quant.diagnostics.doctor.main_memory import SYSTEM
from ideogram4_quant.ops.dispatch import BackendReport
from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.tests.tiny_writer import write_tiny_writer

GB = 10**9


@pytest.fixture
def comfyui(tmp_path, monkeypatch) -> Path:
    """An empty ComfyUI 0.33; a socket opened by the doctor would fail its test."""
    root = tmp_path / "ComfyUI"
    for folder in ("comfy_api", "models/diffusion_models", "models/text_encoders", "models/vae"):
        (root / folder).mkdir(parents=True)
    (root / "main.py").touch()
    (root / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(root))

    def refuse(*_, **__):
        raise AssertionError("the doctor went to the network")

    monkeypatch.setattr(socket, "socket", refuse)
    return root


@pytest.fixture
def complete(comfyui, tiny) -> Path:
    """The same with both copies of a small model, its encoder and its VAE."""
    models = comfyui / "models"
    for file in (tiny.conditional_file, tiny.unconditional_file):
        (models / "diffusion_models" / file.name).symlink_to(file)
    (models / "text_encoders" / "encoder").symlink_to(tiny.encoder_dir, target_is_directory=True)
    (models / "vae" / "vae.safetensors").symlink_to(tiny.vae_file)
    return comfyui


def as_json(capsys, *arguments: str) -> tuple[int, dict]:
    code = cli.main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_encoders_that_write_are_told_from_others(comfyui, capsys, tmp_path):
    """A head in the file, one beside it under any name, none that fits."""
    files = write_tiny_writer(tmp_path / "writer", layers=1)
    encoders = comfyui / "models" / "text_encoders"
    for name in ("whole", "headless"):
        (encoders / name).symlink_to(getattr(files, name), target_is_directory=True)

    def said() -> dict:
        found = as_json(capsys)[1]
        listed = {f["name"].split("/")[0]: f for f in found["found"]["text_encoders"]}
        (item,) = [f for f in found["expected"] if f["use"]]
        told = {name: (f["writes"], f["sees"]) for name, f in listed.items()}
        return told | {"published head": item["here"]}

    whole = ("model.safetensors", True)
    assert said() == {"whole": whole, "headless": (None, False), "published head": False}
    (encoders / "any_name.safetensors").symlink_to(files.head)
    beside = ("any_name.safetensors", False)
    assert said() == {"whole": whole, "headless": beside, "published head": True}
    cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "with the head of any_name.safetensors, not of pictures" in text
    assert "with the head of model.safetensors, of pictures too" in text


def test_copies_of_two_levels_are_a_pair(comfyui, tiny, capsys):
    """Nothing else is there, so that is what auto takes: it has no size of its own to look up."""
    models = comfyui / "models"
    pair = {"INT8 W8A8 rotated": tiny.conditional_file, "Q4_K": tiny.unconditional_file}
    for level, source in pair.items():
        suffix = "gguf" if level == "Q4_K" else "safetensors"
        out = models / "diffusion_models" / f"{source.stem}_{level.split()[0]}.{suffix}"
        quantize_checkpoint(source, level, out)
    (models / "text_encoders" / "encoder").symlink_to(tiny.encoder_dir, target_is_directory=True)
    (models / "vae" / "vae.safetensors").symlink_to(tiny.vae_file)
    code, found = as_json(capsys)
    assert (code, found["auto"]) == (0, "INT8 W8A8 rotated + Q4_K")
    cli.main(["doctor"])
    assert "INT8 W8A8 rotated + Q4_K" in capsys.readouterr().out
    next((models / "diffusion_models").glob("*.gguf")).unlink()
    code, found = as_json(capsys)
    assert (code, found["missing"]) == (
        1,
        ["no unconditional copy beside the conditional one (INT8 W8A8 rotated): no guidance"],
    )


def test_empty_comfyui_lacks_everything(comfyui, capsys):
    code, found = as_json(capsys)
    assert code == 1
    assert [line.split(":")[0] for line in found["missing"]] == [
        "no Ideogram 4 model",
        "no text encoder",
        "no VAE",
    ]
    assert found["comfyui"]["version"] == "0.33.0"
    assert found["auto"] is None
    for item in found["expected"]:
        assert not item["here"]
        assert item["url"].startswith("https://huggingface.co/")
        assert Path(item["folder"]) == comfyui / "models" / item["kind"]


def test_complete_comfyui_can_make_pictures(complete, capsys):
    code, found = as_json(capsys)
    assert (code, found["missing"]) == (0, [])
    bf16 = found["levels"][LEVELS.index("BF16")]
    assert bf16["conditional"]
    assert bf16["unconditional"]
    assert bf16["copy_bytes"] < GB
    assert found["auto"] == "BF16"
    assert [file["name"].split("/")[0] for file in found["found"]["text_encoders"]] == ["encoder"]
    assert [file["name"] for file in found["found"]["vae"]] == ["vae.safetensors"]


def test_text_says_the_same_for_people(complete, capsys):
    assert cli.main(["doctor", "--comfyui", str(complete)]) == 0
    shown = capsys.readouterr().out
    for words in ("ComfyUI 0.33.0", "comfy-kitchen", "int8 by", "Nothing is missing", "auto picks"):
        assert words in shown
    assert "ideogram4_int8_convrot.safetensors, 9.58 GB" in shown


def test_folded_file_is_said_with_what_it_means_for_loras(complete, tiny, capsys):
    assert not any(file["folded"] for file in as_json(capsys)[1]["found"]["diffusion_models"])
    path = complete / "models" / "diffusion_models" / "folded.safetensors"
    name = "layers.0.attention.qkv"
    with safe_open(tiny.conditional_file, "pt") as opened:
        metadata = opened.metadata() | {"lora_basis": "folded"}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    width = tensors[f"{name}.weight"].shape[1]
    save_file(tensors | {f"fold.{name}.smooth": torch.ones(width)}, path, metadata)
    (file,) = [f for f in as_json(capsys)[1]["found"]["diffusion_models"] if f["folded"]]
    assert file["name"] == path.name
    cli.main(["doctor"])
    assert "LoRAs are right with Load LoRA for Ideogram 4 alone" in capsys.readouterr().out
    save_file(tensors | {f"fold.{name}.smooth": torch.zeros(width)}, path, metadata)
    code, found = as_json(capsys)
    assert code == 1
    assert "factors that cannot be divided by" in found["broken"][path.name]


def test_checksums_are_those_of_the_files(complete, tiny, capsys):
    _, found = as_json(capsys, "--sha256")
    files = {file["name"]: file["sha256"] for file in found["found"]["diffusion_models"]}
    whole = hashlib.sha256(tiny.conditional_file.read_bytes()).hexdigest()
    assert files[tiny.conditional_file.name] == whole


def test_lone_conditional_copy_is_named(complete, tiny, capsys):
    (complete / "models" / "diffusion_models" / tiny.unconditional_file.name).unlink()
    code, found = as_json(capsys)
    assert code == 1
    assert "no unconditional copy" in found["missing"][0]


def test_broken_download_is_named_with_its_reason(complete, tiny, capsys):
    cut = complete / "models" / "diffusion_models" / "ideogram4_fp8_scaled.safetensors"
    whole = tiny.conditional_file.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    code, found = as_json(capsys)
    assert code == 1
    assert cut.name in found["missing"][0]
    assert "ownload" in found["missing"][0]
    (item,) = [item for item in found["expected"] if item["name"] == cut.name]
    assert item["here"]
    assert item["size_differs"]


def test_other_models_are_passed_over(complete, tiny, capsys):
    other = complete / "models" / "diffusion_models" / "other.safetensors"
    other.symlink_to(tiny.vae_file)
    code, found = as_json(capsys)
    assert code == 0
    assert len(found["found"]["diffusion_models"]) == 2


@pytest.mark.parametrize(
    ("version", "told"),
    [("0.2.31", True), ("0.2.39.post1", True), ("0.2.40", False), ("0.3", False), (None, False)],
)
def test_a_comfy_kitchen_without_six_bits_is_named(complete, capsys, monkeypatch, version, told):
    """0.2.31 on the codes that 0.2.40 makes: ValueError, "s_rel must have shape (256, 48)"."""
    monkeypatch.setattr(examine, "versions", lambda: {"comfy-kitchen": version})
    _, found = as_json(capsys)
    line = f"comfy-kitchen {version}: ComfyUI's own loader needs 0.2.40 or newer for W6A8"
    assert any(note.startswith(line) for note in found["notes"]) == told


def test_folders_of_the_extra_file_are_read(complete, tiny, tmp_path, capsys):
    pytest.importorskip("yaml")
    (complete / "models" / "vae" / "vae.safetensors").unlink()
    (tmp_path / "shared" / "vaes").mkdir(parents=True)
    (tmp_path / "shared" / "vaes" / "v.safetensors").symlink_to(tiny.vae_file)
    extra = complete / "extra_model_paths.yaml"
    extra.write_text("mine:\n  base_path: ../shared\n  vae: |\n    vaes\n  unet: dit\n")
    code, found = as_json(capsys)
    assert code == 0
    assert [file["name"] for file in found["found"]["vae"]] == ["v.safetensors"]
    assert found["folders"]["diffusion_models"][-1] == str(tmp_path / "shared" / "dit")
    extra.write_text("mine: [")
    folders, notes = model_folders(complete)
    assert set(folders) == {"diffusion_models", "text_encoders", "vae", "loras"}
    assert "no valid YAML" in notes[0]


@pytest.mark.parametrize(
    ("memory", "fits"),
    [(22 * GB, "both"), (12 * GB, "alternating"), (9 * GB, "streamed")],
)
def test_levels_say_what_fits_a_card(comfyui, monkeypatch, memory, fits):
    backends = (BackendReport("triton", True, "here"),)
    card = Device("cuda", "a card", memory, True, backends)
    monkeypatch.setattr(examine, "find_device", lambda: card)
    found = examine.examine(find_host())
    int8 = found["levels"][LEVELS.index("INT8 W8A8")]
    assert int8["on_this_device"] == fits
    assert int8["copy_bytes"] + WORKING_MEMORY < 12 * GB


@pytest.mark.parametrize(("memory", "fits"), [(11 * GB, False), (13 * GB, True), (None, None)])
def test_levels_are_held_against_the_main_memory(comfyui, monkeypatch, memory, fits):
    card = Device("cuda", "a card", 24 * GB, True, ())
    monkeypatch.setattr(examine, "find_device", lambda: card)
    monkeypatch.setattr(examine, "ram", lambda: memory)
    row = examine.examine(find_host())["levels"][LEVELS.index("INT8 W8A8")]
    assert row["fits_ram"] is fits
    assert row["ram_needed"] == SYSTEM
    assert row["ram_at_speed"] == encoder_bytes("FP8") + SYSTEM


def test_a_machine_short_of_main_memory_is_told_what_to_do(complete, monkeypatch, capsys):
    monkeypatch.setattr(examine, "ram", lambda: 3 * GB)
    code, found = as_json(capsys)
    assert code == 0  # a swap file may do
    (note,) = found["notes"]
    for words in ("BF16 needs 4.", "this machine has 3.00 GB", "smaller encoder", "swap file"):
        assert words in note
    cli.main(["doctor"])
    assert "MORE THAN HERE" in capsys.readouterr().out


def test_floats_count_in_the_dtype_that_computes(complete, monkeypatch, capsys):
    """Without bfloat16, as on this CPU, they are held in float32."""
    bf16 = LEVELS.index("BF16")
    wide = as_json(capsys)[1]["levels"][bf16]
    monkeypatch.setattr(
        examine, "find_device", lambda: Device("cpu", "a processor", 64 * GB, True, ())
    )
    found = as_json(capsys)[1]
    narrow, encoder = found["levels"][bf16], found["encoder_in_memory"]
    weights = [row["ram_at_speed"] - SYSTEM - encoder for row in (wide, narrow)]
    assert wide["ram_needed"] - SYSTEM == weights[0]  # converted, so not mapped
    assert narrow["ram_needed"] == SYSTEM
    assert weights[0] == 2 * weights[1] > 0


@pytest.mark.parametrize("where", ["--comfyui", "nowhere"])
def test_missing_comfyui_is_an_error_with_advice(tmp_path, monkeypatch, capsys, where):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    named = ["--comfyui", str(tmp_path)] if where == "--comfyui" else []
    if not named and not isinstance(find_host(), str):
        pytest.skip("the pack lies in a ComfyUI's custom_nodes")
    assert cli.main(["doctor", *named]) == 1
    assert "Name" in capsys.readouterr().err
