"""The command line: what it imports, what it writes, how it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant import cli
from ideogram4_quant.sampling import PRESETS

HEAVY = {"torch", "numpy", "diffusers", "transformers", "PIL", "tqdm"}


@pytest.fixture
def arguments(tiny, tmp_path):
    return [
        "generate",
        *("--model", str(tiny.conditional_file), "--uncond", str(tiny.unconditional_file)),
        *("--encoder", str(tiny.encoder_dir), "--vae", str(tiny.vae_dir)),
        *("--prompt", "HELLO", "--width", "64", "--height", "32", "--steps", "3"),
        *("--device", "cpu", "--out", str(tmp_path / "picture.png")),
    ]


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_imports_nothing_heavy(command):
    script = (
        "import sys\n"
        "from ideogram4_quant.cli import main\n"
        "try:\n"
        f"    main({command!r})\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0, stop.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ideogram4-quant" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    """As of ``doctor | head -1``: what is left to print has nowhere to go."""
    command = [sys.executable, "-m", "ideogram4_quant", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        errors = running.stderr.read().decode()
    assert "pipe" not in errors.lower()
    assert "Traceback" not in errors
    assert running.returncode == 1


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in ("demo", "generate", *cli.DELEGATED):
        assert re.search(rf"\n    {command}\s", text)


@pytest.mark.parametrize("command", sorted(cli.DELEGATED))
def test_delegated_commands_have_their_own_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: ideogram4-quant {command}" in text
    assert len(text.splitlines()) > 6  # more than the place that the list of commands keeps


def test_preset_names_are_the_presets():
    assert tuple(PRESETS) == cli.PRESET_NAMES


def test_generate_writes_the_picture_and_how_it_was_made(arguments, tmp_path, capsys):
    assert cli.main(arguments) == 0
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (64, 32)
        settings = json.loads(image.text["ideogram4_quant"])
        pixels = np.asarray(image).copy()
    assert settings["prompt"] == "HELLO"
    assert settings["steps"] == 3
    assert settings["model"].endswith(".safetensors")
    assert "/" not in settings["model"]
    assert "64x32, BF16, 3 steps" in capsys.readouterr().out
    assert cli.main([*arguments, "--overwrite"]) == 0
    with Image.open(tmp_path / "picture.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert cli.main([*arguments, "--overwrite", "--seed", "1"]) == 0
    with Image.open(tmp_path / "picture.png") as image:
        assert not np.array_equal(np.asarray(image), pixels)


def test_generate_from_a_picture_and_a_prompt_file(arguments, tmp_path):
    assert cli.main(arguments) == 0
    (tmp_path / "prompt.txt").write_text("HELLO\n")
    place = arguments.index("--prompt")
    arguments[place : place + 2] = ["--prompt-file", str(tmp_path / "prompt.txt")]
    second = tmp_path / "second.png"
    more = ["--init-image", str(tmp_path / "picture.png"), "--denoise", "0.5", "--out", str(second)]
    assert cli.main([*arguments, *more]) == 0
    assert second.exists()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the caption is empty"),
        ('{"high_level_description": "x", ', "JSON that cannot be read"),
        ('[{"type": "text", "text": "HI"}]', "this JSON is a list"),
    ],
)
def test_a_prompt_that_is_none_is_refused_before_a_weight_loads(arguments, capsys, prompt, said):
    arguments[arguments.index("--prompt") + 1] = prompt
    for more in ([], ["--enhance"]):
        assert cli.main([*arguments, *more]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("HELLO", "the prompt is plain text"),
        ('{"high_level_description": "x"}', "compositional_deconstruction"),
    ],
)
def test_a_prompt_that_is_no_caption_warns(arguments, caplog, prompt, said):
    arguments[arguments.index("--prompt") + 1] = prompt
    assert cli.main([*arguments, "--steps", "1"]) == 0
    assert said in caplog.text


def test_untrained_sizes_warn(arguments, caplog):
    assert cli.main([*arguments, "--steps", "1"]) == 0
    assert "64x32 is outside the trained sides" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "too few steps"),
        (["--denoise", "0.5"], "--denoise needs --init-image"),
        (["--out", "picture.jpg"], "picture.jpg: the picture is written as PNG"),
        (["--model", "none.safetensors"], "none.safetensors"),
        (["--vae", "none"], "none: no such file or folder"),
        (["--init-image", "none.png"], "none.png"),
        (["--device", "abacus"], "no such device (found 'abacus'"),
    ],
)
def test_errors_are_one_line(arguments, more, message, capsys):
    assert cli.main([*arguments, *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_errors_before_any_weight_is_read(arguments, tmp_path, capsys, monkeypatch):
    from ideogram4_quant.engine import commands

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(commands, "load_encoder", refuse)
    (tmp_path / "picture.png").write_bytes(b"")
    assert cli.main(arguments) == 1
    assert "the file exists. --overwrite replaces it." in capsys.readouterr().err
    swapped = arguments.copy()
    swapped[2], swapped[4] = swapped[4], swapped[2]
    assert cli.main([*swapped, "--overwrite"]) == 1
    assert "conditional" in capsys.readouterr().err


def test_one_copy_needs_to_be_asked_for(arguments, capsys, caplog):
    place = arguments.index("--uncond")
    del arguments[place : place + 2]
    assert cli.main(arguments) == 1
    assert "--copies conditional" in capsys.readouterr().err
    assert cli.main([*arguments, "--copies", "conditional"]) == 0
    assert "sampling without guidance" in caplog.text


def test_ctrl_c_is_130(arguments, monkeypatch, capsys):
    from ideogram4_quant.engine import commands

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "open_pair", interrupt)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_a_missing_package_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [m for m in sys.modules if m.startswith("ideogram4_quant.engine")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(arguments) == 1
    assert "error: diffusers is not installed" in capsys.readouterr().err


def test_usage_errors_leave_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--model", "x"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantise"])
    assert stop.value.code == 2


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "ideogram4_quant", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("ideogram4-quant ")


def test_a_folder_of_any_name_runs_without_being_installed(tmp_path):
    folder = tmp_path / "custom_nodes" / "ideogram4-quant"
    folder.parent.mkdir()
    folder.symlink_to(Path(cli.__file__).parent, target_is_directory=True)
    # -I -S: neither the working directory nor an installed copy can help
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(folder), "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ideogram4-quant ")


@pytest.fixture
def one_copy(arguments):
    """The arguments without the second file."""
    place = arguments.index("--uncond")
    return [*arguments[:place], *arguments[place + 2 :]]


@pytest.mark.parametrize(("word", "guided"), [("self", True), ("none", False)])
def test_generate_from_one_copy(one_copy, tmp_path, word, guided, caplog):
    assert cli.main([*one_copy, "--uncond", word]) == 0
    assert ("without guidance" in caplog.text) != guided
    with Image.open(tmp_path / "picture.png") as picture:
        assert json.loads(picture.info["ideogram4_quant"])["uncond"] == word


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--uncond", "self"], "--uncond self"),
        (["--uncond", "none"], "--uncond none"),
        (["--copies", "conditional"], "--copies conditional"),
    ],
)
def test_two_stand_ins_at_once_are_refused(one_copy, capsys, words, said):
    assert cli.main([*one_copy, *words, "--uncond-lora", "f.safetensors"]) == 1
    assert said in capsys.readouterr().err
