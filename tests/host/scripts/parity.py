"""The small model of FILES (JSON) in the host against what diffusers computed, in REFERENCE.

Reports errors of the encoder's features, of one pass of each copy, of the sampled latents and of
the picture.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import inside


def main() -> None:
    pack, (listing, reference, caption) = inside.start()
    import torch
    from safetensors.torch import load_file

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    wanted = load_file(reference)
    with torch.inference_mode():
        copies = {copy: load_copy(pack, files, copy) for copy in ("conditional", "unconditional")}
        encoder = inside.load(pack, "nodes.encoder_loading")
        clip = encoder.load_encoder(files["encoder"])
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        errors = {"features": max_error(positive[0][0][0], wanted["features"])}
        for copy, patcher in copies.items():
            errors[copy] = max_error(one_pass(patcher, copy, wanted), wanted[f"v_{copy}"])
        latents = sample(pack, copies, positive, wanted["noise"])
        errors["latents"] = inside.relative(to_tokens(latents), wanted["latents"])
        vae = inside.load(pack, "nodes.vae_loading").load_vae(files["vae"])
        decoded = vae.decode(from_tokens(wanted["latents"], latents.shape))
        errors["decoded"] = max_error(decoded[0], wanted["image"])
        errors["psnr"] = psnr(vae.decode(latents)[0], wanted["image"])
    inside.report(errors)


def load_copy(pack: str, files: dict, copy: str):
    loading = inside.load(pack, "nodes.model_loading")
    source = loading.ModelSource(files[copy], copy)
    return loading.load_model(source)


def one_pass(patcher, copy: str, wanted: dict):
    """The velocity towards clean [N, C] of one pass, in the reference's token order."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    x = from_tokens(wanted["x"], (1, 128, 4, 8))
    context = wanted["features"][None] if copy == "conditional" else None
    # the host's model takes sigma and predicts noise - clean
    return -to_tokens(model(x, 1 - wanted["t"], context=context))


def sample(pack: str, copies: dict, positive, noise):
    import comfy.samplers
    import torch

    nodes = inside.load(pack, "nodes.sampling_inputs")
    guider = inside.load(pack, "nodes.guider").DualCopyGuider(
        copies["conditional"],
        copies["unconditional"],
        positive,
        nodes.make_guidance("default"),
    )
    sigmas, _ = nodes.schedule("default", 128, 64, 0, 1.0)
    start = from_tokens(noise, (1, 128, 4, 8))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(start, torch.zeros_like(start), euler, sigmas, seed=0)


def to_tokens(image):
    """[1, (c pi pj), h, w] -> [h w, (pi pj c)]."""
    _, channels, rows, columns = image.shape
    tokens = image.reshape(channels // 4, 2, 2, rows, columns).permute(3, 4, 1, 2, 0)
    return tokens.reshape(rows * columns, channels)


def from_tokens(tokens, shape):
    """The inverse of `to_tokens`."""
    _, channels, rows, columns = shape
    image = tokens.reshape(rows, columns, 2, 2, channels // 4).permute(4, 2, 3, 0, 1)
    return image.reshape(1, channels, rows, columns)


def max_error(found, wanted) -> float:
    """Largest difference over the largest value wanted."""
    return ((found.float() - wanted).abs().max() / wanted.abs().max()).item()


def psnr(found, wanted) -> float:
    """Of pictures in [0, 1], dB; 200 for equal ones."""
    error = ((found.double() - wanted.double()) ** 2).mean().item()
    return 200.0 if error == 0 else -10 * math.log10(error)


if __name__ == "__main__":
    main()
