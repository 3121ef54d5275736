"""The model in a real ComfyUI, loaded by our nodes, equals diffusers' own in fp32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

CAPTION = (
    '{"high_level_description":"A red word","compositional_deconstruction":{"background":"blue",'
    '"elements":[{"type":"text","bbox":[100,100,900,900],"text":"QUARTZ","desc":"large"}]}}'
)
WIDTH, HEIGHT = 128, 64
ROWS, COLUMNS = HEIGHT // 16, WIDTH // 16
GUIDANCE = (7.0,) * 18 + (3.0,) * 2

pytestmark = pytest.mark.host


@pytest.fixture(scope="module", params=["tiny", "pocket"])
def errors(request, in_host, tmp_path_factory) -> dict[str, float]:
    model = request.getfixturevalue(request.param)
    reference = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    save_file(_reference(model), reference)
    files = {
        "conditional": str(model.conditional_file),
        "unconditional": str(model.unconditional_file),
        "encoder": str(model.encoder_dir),
        "vae": str(model.vae_file),
    }
    return in_host("parity.py", json.dumps(files), reference, CAPTION)


@torch.no_grad()
def _reference(model) -> dict[str, torch.Tensor]:
    pipeline = model.pipeline()
    prompt = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": CAPTION}]}],
        add_generation_prompt=True,
    )
    length = len(prompt["input_ids"])
    packed = pipeline.encode_prompt([CAPTION], ROWS, COLUMNS, length, torch.device("cpu"))
    features, *ids = packed
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(1, ROWS * COLUMNS, 128, generator=generator) for _ in range(2))
    t = torch.tensor([0.37])
    hidden = torch.cat([torch.zeros(1, length, 128), x], 1)
    conditional = model.conditional(hidden, t, features, *ids, return_dict=False)[0][:, length:]
    image_ids = [part[:, length:] for part in ids]
    unconditional = model.unconditional(
        x, t, torch.zeros(1, ROWS * COLUMNS, 832), *image_ids, return_dict=False
    )[0]
    settings = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": len(GUIDANCE),
        "guidance_schedule": GUIDANCE,
        "mu": 0.0,
        "std": 1.75,
        "max_sequence_length": length,
    }
    latents = pipeline(CAPTION, latents=noise, output_type="latent", **settings).images
    image = pipeline(CAPTION, latents=noise, output_type="np", **settings).images
    found = {
        "features": features[0, :length],
        "x": x[0],
        "t": t,
        "noise": noise[0],
        "v_conditional": conditional[0],
        "v_unconditional": unconditional[0],
        "latents": latents[0],
        "image": torch.from_numpy(image[0]),
    }
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("part", ["features", "conditional", "unconditional"])
def test_each_part_equals_diffusers(errors, part):
    assert errors[part] < 1e-5


def test_decoder_equals_diffusers(errors):
    assert errors["decoded"] < 1e-4


def test_sampled_latents_and_picture_equal_diffusers(errors):
    assert errors["latents"] < 1e-3
    assert errors["psnr"] > 60
