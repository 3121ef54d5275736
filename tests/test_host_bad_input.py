"""Bad input in a real ComfyUI: a message that says what to do, and the next prompt runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ideogram4_quant.quant import QuantOptions, quantize_checkpoint
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.runs import fails_with, picture, rejected_with

pytestmark = pytest.mark.host


def test_missing_level_says_what_there_is(server):
    fails_with(server, graphs.with_sampler(level="NF4"), "NF4", "BF16", "diffusion_models")


def test_linears_only_need_a_base_and_run_with_one(server, models):
    """Transformer Lab's INT8: both copies in one file, norms and embeddings elsewhere."""
    folder = models / "diffusion_models"
    path = folder / "ideogram4-int8-w8a8.safetensors"
    quantize_checkpoint(
        folder / graphs.CONDITIONAL,
        "INT8 W8A8",
        path,
        pair=folder / graphs.UNCONDITIONAL,
        options=QuantOptions(container="transformer-lab"),
    )
    try:
        fails_with(server, graphs.with_sampler(conditional_file=path.name), path.name, "base")
        based = graphs.with_sampler(
            "based", conditional_file=path.name, base_file=graphs.CONDITIONAL
        )
        found = picture(server, server.run(based)).astype(int)
        bf16 = picture(server, server.run(graphs.with_sampler())).astype(int)
        assert 0 < np.abs(found - bf16).mean() < 10
    finally:
        path.unlink()


def test_swapped_copies_are_refused(server):
    swapped = {
        "conditional_file": graphs.UNCONDITIONAL,
        "unconditional_file": graphs.CONDITIONAL,
    }
    fails_with(server, graphs.with_sampler(**swapped), graphs.UNCONDITIONAL, "trust_files")
    swapped |= {"trust_files": True}  # the files' metadata says which copy they are
    fails_with(server, graphs.with_sampler(**swapped), graphs.UNCONDITIONAL, "other copy")


def test_swapped_and_doubled_connections_are_refused(server):
    swapped = graphs.with_sampler(models=(("model", 1), ("model", 0)))
    fails_with(server, swapped, "unconditional copy", "Swap")
    doubled = graphs.with_sampler(models=(("model", 0), ("model", 0)))
    fails_with(server, doubled, "one model is connected as both copies", "unconditional_from")


def test_copies_of_two_models_are_refused(server, models):
    """A pair whose halves are of different depth, as of another release."""
    folder = models / "diffusion_models"
    with safe_open(folder / graphs.UNCONDITIONAL, "pt") as opened:
        metadata = opened.metadata()
        kept = [name for name in opened.keys() if not name.startswith("layers.3.")]  # noqa: SIM118
        tensors = {name: opened.get_tensor(name) for name in kept}
    config = json.loads(metadata["config"]) | {"num_layers": 3}
    shallow = folder / "shallow.safetensors"
    save_file(tensors, shallow, metadata | {"config": json.dumps(config)})
    try:
        graph = graphs.with_sampler(
            conditional_file=graphs.CONDITIONAL, unconditional_file=shallow.name
        )
        fails_with(server, graph, shallow.name, "num_layers", "same release")
    finally:
        shallow.unlink()


def test_truncated_file_is_named(server, models):
    whole = (models / "diffusion_models" / graphs.CONDITIONAL).read_bytes()
    cut = models / "diffusion_models" / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    try:
        fails_with(
            server, graphs.with_sampler(conditional_file=cut.name), "cut.safetensors", "ownload"
        )
    finally:
        cut.unlink()


def test_other_models_are_refused_by_name(server, models):
    graph = graphs.with_sampler()
    graph["model"]["inputs"]["conditional_file"] = "other.safetensors"
    other = models / "diffusion_models" / "other.safetensors"
    other.write_bytes((models / "vae" / graphs.VAE).read_bytes())
    try:
        fails_with(server, graph, "other.safetensors")
    finally:
        other.unlink()


def test_long_captions_are_refused(server):
    fails_with(server, graphs.with_sampler(caption="word " * 3000), "2048")


def test_missing_encoder_is_said_with_what_to_download(server):
    graph = graphs.with_sampler(encoder="qwen3vl_8b_fp8_scaled.safetensors")
    rejected_with(server, graph, "text_encoders", "press R", "huggingface.co/Comfy-Org/Qwen3-VL")


def test_unconnected_encoder_is_said(server):
    graph = graphs.with_sampler()
    del graph["positive"]["inputs"]["clip"]
    rejected_with(server, graph, "Required input is missing")


@pytest.mark.parametrize(
    ("folder", "inputs", "source", "words"),
    [
        ("text_encoders", "encoder", f"vae/{graphs.VAE}", "no Qwen3-VL text encoder"),
        ("vae", "vae", f"diffusion_models/{graphs.CONDITIONAL}", "not a FLUX.2 VAE"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(server, models, folder, inputs, source, words):
    name = "of-another-kind.safetensors"
    path = models / folder / name
    path.write_bytes((models / source).read_bytes())
    try:
        fails_with(server, graphs.with_sampler(**{inputs: name}), name, words)
    finally:
        path.unlink()


def test_truncated_encoder_is_named(server, models):
    whole = (models / "text_encoders" / graphs.ENCODER).read_bytes()
    path = models / "text_encoders" / "cut-encoder.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    try:
        fails_with(server, graphs.with_sampler(encoder=path.name), path.name, "ownload")
    finally:
        path.unlink()


def test_a_latent_of_another_vae_is_refused_unless_it_is_empty(server):
    graph = graphs.with_sampler()
    graph["latent"] = graphs.node("EmptySD3LatentImage", width=128, height=64, batch_size=1)
    graph["sampled"]["inputs"]["latent"] = ["latent", 0]
    assert picture(server, server.run(graph)).shape == (64, 128, 3)
    saved = {"latent_tensor": torch.ones(1, 16, 8, 16), "latent_format_version_0": torch.ones(())}
    save_file(saved, server.base / "input" / "of-another.latent")
    graph["latent"] = graphs.node("LoadLatent", latent="of-another.latent")
    fails_with(server, graph, "another VAE", "[1, 16, 8, 16]", "flux2-vae")


@pytest.mark.parametrize("name", ["../../server.log", "/etc/passwd", "missing.safetensors"])
def test_names_outside_the_folders_are_rejected_before_running(server, name):
    rejected_with(server, graphs.with_sampler(conditional_file=name), name)
