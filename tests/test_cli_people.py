"""The command line as people meet it: help, examples, names, files that are found, early errors."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ideogram4_quant import cli

COMMANDS = ("demo", "generate", *cli.DELEGATED)


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = cli._parser([command])
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


def test_no_command_is_the_help_with_three_examples(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ideogram4-quant")
    assert len(re.findall(r"^  ideogram4-quant \w+", shown, re.M)) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_a_text_for_every_option(command):
    parser = parser_of(command)
    assert re.search(rf"example.*ideogram4-quant {command} ", parser.epilog, re.S)
    assert parser.description
    without = [a.dest for a in parser._actions if not a.help]
    assert without == []


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_shown_as_they_are_written(command, monkeypatch):
    """A line that is wrapped within a file's name cannot be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = parser_of(command)
    assert parser.epilog in parser.format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands_that_parse(command, monkeypatch):
    """Each example is read by the parser it stands in, files that are not there included."""
    epilog = parser_of(command).epilog.replace("\\\n", " ")
    for line in re.findall(r"ideogram4-quant (\S[^\n]*)", epilog):
        words = line.replace('"A red fox"', "fox").split()
        assert cli._parser(words).parse_args(words).command == command


# a wrong argument of each kind, and a word of what is said of it
WRONG = {
    "level": (["quantize", "here.safetensors", "--level", "Q4_KX"], "Did you mean Q4_K?"),
    "source": (["quantize", "none.safetensors", "--level", "Q4_K"], "none.safetensors"),
    "output": (
        ["quantize", "here.safetensors", "--level", "Q4_K", "--out", "here.safetensors"],
        "exists already",
    ),
    "budget": (
        ["quantize", "here.safetensors", "--level", "INT8", "--protect-budget", "8"],
        "as 8% or 700MB",
    ),
    "choice": (["quantize", "here.safetensors", "--level", "Q4_K", "--copy", "x"], "both"),
    "inspect": (["inspect", "none.gguf"], "none.gguf"),
    "verify": (["verify", "here.safetensors", "--against", "none.gguf"], "none.gguf"),
    "delta": (["delta", "none.gguf", "--rank", "4", "--out", "x.safetensors"], "none.gguf"),
    "picture": (["generate", "--prompt", "fox", "--out", "x.jpg"], "PNG"),
    "prompt file": (["generate", "--prompt-file", "none.json", "--out", "x.png"], "none.json"),
    "denoise": (["generate", "--prompt", "x", "--denoise", ".5", "--out", "x.png"], "--init-image"),
    "calibration": (["calibrate", "no/none.gguf", "--out", "x.safetensors"], "none.gguf"),
    "suffix": (["calibrate", "here.safetensors", "--out", "x.gguf"], "safetensors file"),
    "compare": (["compare", "--out", "x"], "--system"),
    "comfyui": (["doctor", "--comfyui", "."], "models"),
    "demo": (["demo", "--threads", "0"], "at least 1"),
    "option": (["bench", "--rounds", "many"], "many"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_checked_before_torch_is_imported(name, tmp_path):
    words, said = WRONG[name]
    (tmp_path / "here.safetensors").touch()
    script = (
        "import sys\n"
        "from ideogram4_quant.cli import main\n"
        "try:\n"
        f"    code = main({words!r})\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "print(code, *({'torch', 'diffusers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert said in done.stderr
    assert done.stdout.split() in (["1"], ["2"])


@pytest.fixture
def comfyui(tiny, tmp_path, monkeypatch) -> Path:
    """A ComfyUI with the tiny model's files in its folders."""
    root = tmp_path / "ComfyUI"
    (root / "comfy_api").mkdir(parents=True)
    (root / "main.py").touch()
    models = root / "models"
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (models / kind).mkdir(parents=True)
    shutil.copy(tiny.conditional_file, models / "diffusion_models")
    shutil.copy(tiny.unconditional_file, models / "diffusion_models")
    shutil.copytree(tiny.encoder_dir, models / "text_encoders" / "encoder")
    shutil.copy(next(tiny.vae_dir.glob("*.safetensors")), models / "vae" / "vae.safetensors")
    monkeypatch.setenv("COMFYUI_PATH", str(root))
    return root


@pytest.mark.parametrize("named", [[], ["--level", "bf16"], ["--model", "by name"]])
def test_generate_finds_the_files_that_doctor_knows(named, comfyui, tiny, tmp_path, caplog):
    """The same picture as with every path given; a bare name is one in ComfyUI's folders."""
    if named and named[0] == "--model":
        named = ["--model", tiny.conditional_file.name, "--uncond", tiny.unconditional_file.name]
    picture = ["--prompt", "HELLO", "--width", "64", "--height", "32", "--steps", "2"]
    picture += ["--device", "cpu", "--tokenizer", str(tiny.encoder_dir)]
    found, given = tmp_path / "found.png", tmp_path / "given.png"
    files = ["--model", str(tiny.conditional_file), "--uncond", str(tiny.unconditional_file)]
    files += ["--encoder", str(tiny.encoder_dir), "--vae", str(tiny.vae_dir)]
    assert cli.main(["generate", *picture, *files, "--out", str(given)]) == 0
    vae = ["--vae", str(tiny.vae_dir)]  # a folder has its configuration beside it
    assert cli.main(["generate", *picture, *named, *vae, "--out", str(found)]) == 0
    assert Image.open(found).tobytes() == Image.open(given).tobytes()
    settings = json.loads(Image.open(found).text["ideogram4_quant"])
    assert settings["model"] == tiny.conditional_file.name
    assert settings["uncond"] == tiny.unconditional_file.name
    if not named:
        assert "--model: taken BF16" in caplog.text


def test_generate_without_files_anywhere_says_where_to_look(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cli.main(["generate", "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 1
    assert "no ComfyUI found" in capsys.readouterr().err


def test_sizes_off_the_grid_are_rounded_and_said(comfyui, tiny, tmp_path, caplog):
    out = tmp_path / "odd.png"
    words = ["--prompt", "x", "--width", "70", "--height", "33", "--steps", "1", "--device", "cpu"]
    words += ["--vae", str(tiny.vae_dir), "--out", str(out)]
    assert cli.main(["generate", *words]) == 0
    assert Image.open(out).size == (64, 32)
    assert "70x33 was rounded to 64x32" in caplog.text


def test_compare_finds_them_too(comfyui, tiny, tmp_path):
    """Systems by bare names, the encoder and the VAE by nothing at all."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("HELLO\n")
    names = tiny.conditional_file.name, tiny.unconditional_file.name
    words = ["--system", f"a={','.join(names)}", "--system", f"b={names[0]},none"]
    words += ["--prompts", str(prompts), "--width", "64", "--height", "32", "--steps", "1"]
    words += ["--device", "cpu", "--vae", str(tiny.vae_dir), "--out", str(tmp_path / "out")]
    assert cli.main(["compare", *words]) == 0
    assert list((tmp_path / "out" / "cache").rglob("*.png"))


@pytest.mark.parametrize(
    ("words", "module", "function", "told"),
    [
        ("demo --out F", "engine.commands", "run_demo", "what was made is in F; "),
        ("card --out F.json", "diagnostics.card.cli", "measure", "F.json holds the parts"),
        (
            "sensitivity m --against q --encoder e --out F.json",
            "engine.sensitivity_commands", "run_sensitivity", "F.json holds the pictures that were "
            "measured; --resume",
        ),
        ("compare-merge F g", "engine.compare.store.Store", "merge", "what is in the cache is"),
    ],
)  # fmt: skip
def test_ctrl_c_never_denies_what_was_written(
    words, module, function, told, tmp_path, monkeypatch, capsys
):
    """Commands that write as they go: the target is there when Ctrl-C comes."""

    def interrupt(*_, **__):
        Path(next(word for word in words.split() if word[0] == "F")).touch()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"ideogram4_quant.{module}.{function}", interrupt)
    assert cli.main(words.split()) == 130
    assert capsys.readouterr().err.startswith(f"interrupted: {told}")


def test_a_command_that_says_nothing_of_files_claims_nothing(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ideogram4_quant.diagnostics.cli._run", lambda name: interrupt)
    assert cli.main(["selftest"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
