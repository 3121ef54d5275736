"""A file of one kind in the place of another: the error says which kind it is."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from ideogram4_quant import Ideogram4QuantError
from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.encoders import open_encoder
from ideogram4_quant.checkpoint.loras import parse_lora, read_lora
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.checkpoint.vae_files import check_vae
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.pocket.paths import dit_path, encoder_dir, vae_dir
from ideogram4_quant.tests.test_host_lora import fused, update

MODEL, ENCODER, VAE, LORA = "an Ideogram 4 transformer", "a text encoder", "a VAE", "a LoRA"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    lora = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(fused(update(1)), lora)
    vae = vae_dir() / "diffusion_pytorch_model.safetensors"
    return {MODEL: dit_path("cond"), ENCODER: encoder_dir(), VAE: vae, LORA: lora}


def check_vae_file(path):
    check_vae({k: t.shape for k, t in open_tensor_files(path).tensors.items()}, path)


SLOTS = {
    MODEL: open_checkpoint,
    ENCODER: open_encoder,
    VAE: check_vae_file,
    "the engine's VAE": load_vae,
    LORA: lambda path: parse_lora(read_lora(path), {}, str(path)),
}


@pytest.mark.parametrize("there", [MODEL, ENCODER, VAE, LORA])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_file_in_the_place_of_another_kind_is_called_what_it_is(slot, there, files):
    if slot == there or {slot, there} == {"the engine's VAE", VAE}:
        return
    with pytest.raises(Ideogram4QuantError) as refused:
        SLOTS[slot](files[there])
    assert f"found {there}" in str(refused.value)
