"""The library: its names, its errors, and diffusers' own pipeline on the pack's files."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Pipeline

import ideogram4_quant
from ideogram4_quant import api
from ideogram4_quant.engine.compare.metrics import psnr
from ideogram4_quant.pocket import paths
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.export import load_transformer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = HELD_OUT[0]


def python(code: str, cwd: Path = ROOT.parent) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_names_are_there_and_listing_them_is_light():
    code = (
        "import json, sys, ideogram4_quant as p; names = dir(p)\n"
        "print(json.dumps([names, 'torch' in sys.modules, hasattr(p, 'NODE_CLASS_MAPPINGS')]))"
    )
    names, heavy, mappings = json.loads(python(code))
    assert set(api.NAMES) <= set(names)
    assert (heavy, mappings) == (False, False)
    for name in api.NAMES:
        assert getattr(ideogram4_quant, name) is getattr(api, name)


def test_opening_a_file_needs_no_diffusers():
    code = (
        "import sys; from ideogram4_quant import open_checkpoint\n"
        "print([n for n in ('diffusers', 'transformers') if n in sys.modules])"
    )
    assert python(code).strip() == "[]"


@pytest.mark.parametrize(
    ("name", "arguments", "keywords", "culprit"),
    [
        ("open_checkpoint", (3,), {}, "path"),
        ("open_checkpoint", ("x",), {"base": [4]}, "base"),
        ("open_checkpoint", ("x",), {"bases": "y"}, "bases"),
        ("quantize_checkpoint", ("x", 8, "y"), {}, "level"),
        ("quantize_checkpoint", ("x", "Q8_0"), {}, "out"),
        ("quantize_checkpoint", ("x", "Q8_0", "y"), {"overwrite": 1}, "overwrite"),
        ("verify_file", ("x", None), {}, "against"),
        ("inspect_file", (None,), {}, "path"),
        ("load_transformer", ("x.gguf",), {}, "ck"),
        ("load_pipeline", ("x", "y", None, "z"), {}, "encoder"),
        ("linear", ([1.0], torch.ones(1, 1)), {}, "x"),
    ],
)
def test_a_wrong_type_names_its_argument(name, arguments, keywords, culprit):
    with pytest.raises(api.ArgumentTypeError, match=rf"{name}: .*\b{culprit}\b") as caught:
        getattr(api, name)(*arguments, **keywords)
    assert isinstance(caught.value, TypeError)


def test_a_right_type_goes_on_to_the_errors_of_the_commands(tmp_path):
    with pytest.raises(api.CheckpointError, match="no such file"):
        api.inspect_file(tmp_path / "none.gguf")
    with pytest.raises(api.QuantOptionError):
        api.quantize_checkpoint(paths.dit_path("cond"), "Q9", tmp_path / "out.gguf")


def test_functions_keep_signature_and_docstring():
    from ideogram4_quant.quant import quantize_checkpoint

    assert inspect.signature(api.quantize_checkpoint) == inspect.signature(quantize_checkpoint)
    assert api.quantize_checkpoint.__doc__ == quantize_checkpoint.__doc__


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("library")
    files = [folder / "cond.gguf", folder / "uncond.gguf"]
    for copy, file in zip(("cond", "uncond"), files, strict=True):
        api.quantize_checkpoint(paths.dit_path(copy), "Q8_0", file)
    return files


def loaded(files, **keywords) -> Ideogram4Pipeline:
    pipe = api.load_pipeline(*files, paths.encoder_dir(), paths.vae_dir(), device="cpu", **keywords)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    return pipe(
        PROMPT.caption,
        width=PROMPT.width,
        height=PROMPT.height,
        num_inference_steps=6,
        guidance_schedule=(7.0,) * 6,
        generator=torch.Generator().manual_seed(PROMPT.seed),
        max_sequence_length=128,
    ).images[0]


BF16 = [paths.dit_path("cond"), paths.dit_path("uncond")]


def test_bf16_files_paint_the_unmodified_pipelines_picture(pocket):
    pipe = loaded(BF16)
    assert isinstance(pipe, Ideogram4Pipeline)
    assert pipe.transformer.dtype == torch.float32  # though its linears are kept in bf16
    assert psnr(picture(pocket.pipeline()), picture(pipe)) >= 60


def test_one_branch_paints_the_unmodified_pipelines_picture_in_its_own_steps(pocket):
    """diffusers' pipeline at a guidance of 1, where any second copy is weighed with 0."""
    theirs = replace(pocket, conditional=load_transformer("one_branch", paths.WEIGHTS)).pipeline()
    asked = {"width": PROMPT.width, "height": PROMPT.height, "max_sequence_length": 128}

    def paint(pipe, **more):
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(PROMPT.seed)
        return pipe(PROMPT.caption, generator=seed, **asked, **more).images[0]

    pipe = loaded([paths.dit_path("one_branch"), None])
    steps = {"num_inference_steps": 8, "mu": 0.0, "std": 1.75}  # fal's Instant
    wanted = paint(theirs, guidance_scale=1.0, guidance_schedule=None, **steps)
    assert psnr(wanted, paint(pipe)) >= 60
    assert psnr(wanted, paint(pipe, num_inference_steps=4, guidance_schedule=[1.0] * 4)) < 57
    with pytest.raises(api.OpError, match="holds it in itself"):
        paint(pipe, guidance_scale=7.0)
    pipe.enable_model_cpu_offload(device="cpu")
    assert psnr(wanted, paint(pipe)) >= 60


def test_comfyuis_vae_file_paints_the_same(pocket):
    pipe = api.load_pipeline(*BF16, paths.encoder_dir(), pocket.vae_file, device="cpu")
    assert psnr(picture(pocket.pipeline()), picture(pipe)) >= 50


def test_quantized_files_paint_what_their_weights_dequantized_paint(pocket, gguf):
    """The oracle is diffusers' own model with the decoded weights."""
    from ideogram4_quant.pocket.export import from_canonical

    dense = pocket.pipeline()
    kept = {n: getattr(dense, n).state_dict() for n in ("transformer", "unconditional_transformer")}
    kept = {n: {k: v.clone() for k, v in state.items()} for n, state in kept.items()}
    try:
        for name, file in zip(kept, gguf, strict=True):
            ck = api.open_checkpoint(file)
            state = ck.load(ck.copies[0], dtype=torch.float32)
            full = {k: v.dequantize() if hasattr(v, "layout_cls") else v for k, v in state.items()}
            getattr(dense, name).load_state_dict(from_canonical(full), strict=False)
        options = api.LinearOptions(gguf_compute="dense")
        assert psnr(picture(dense), picture(loaded(gguf, options=options))) >= 60
    finally:
        for name, state in kept.items():
            getattr(dense, name).load_state_dict(state)


def test_whole_models_move_and_offload(gguf):
    pipe = loaded(gguf)
    wanted = picture(pipe)
    assert psnr(wanted, picture(pipe.to("cpu"))) >= 100
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    assert psnr(wanted, picture(pipe)) >= 100
    weight = pipe.transformer.to("meta").layers[0].attention.to_qkv.weight
    assert (weight.device.type, weight._qdata.device.type) == ("meta", "meta")


def test_sequential_offload_of_unquantized_files(pocket):
    """By accelerate's hooks, as diffusers sets them: it names the device cpu:0, which accelerate
    cannot take for any model (a copy to it is no Parameter any more)."""
    from accelerate import cpu_offload

    pipe = loaded(BF16)
    pipe._refuse_by_weight("enable_sequential_cpu_offload")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert pipe.transformer.layers[0].attention.to_qkv.weight.device.type == "meta"
    assert psnr(picture(pocket.pipeline()), picture(pipe)) >= 60


def test_what_cannot_work_is_refused(gguf, tmp_path):
    pipe = loaded(gguf)
    for refused in (
        lambda: pipe.enable_sequential_cpu_offload(device="cpu"),
        lambda: pipe.enable_group_offload(torch.device("cpu")),
        lambda: pipe.fuse_lora(),
        lambda: pipe.set_adapters("x"),
        lambda: pipe.save_pretrained(tmp_path),
        lambda: pipe.to(torch.float16),
        lambda: pipe.to("cpu", torch.bfloat16),
    ):
        with pytest.raises(api.OpError):
            refused()
    assert pipe.vae.dtype == torch.float32


def test_the_documents_lines_run(gguf, tmp_path):
    """The lines as printed, in a folder with files of those names; the picture's size is smaller,
    so that a CPU paints it in seconds."""
    part = (ROOT / "docs/library.md").read_text(encoding="utf-8").partition("## In Python")[2]
    lines = re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line]) <= 5
    for file, source in zip(re.findall(r"[\w.]+\.gguf", lines), gguf, strict=True):
        (tmp_path / file).symlink_to(source)
    (tmp_path / "text_encoder").symlink_to(paths.encoder_dir())
    (tmp_path / "vae").symlink_to(paths.vae_dir())
    small = lines.replace("height=1024", "height=64").replace("width=1024", "width=128")
    assert small != lines
    python(f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{small}", tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 1000
