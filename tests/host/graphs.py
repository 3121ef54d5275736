"""Graphs in the server's API format."""

from __future__ import annotations

from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path, encoder_dir, vae_file

CAPTION = HELD_OUT[0].caption
ENCODER, VAE = f"{encoder_dir().name}/model.safetensors", vae_file().name
CONDITIONAL, UNCONDITIONAL = dit_path("cond").name, dit_path("uncond").name


def node(kind: str, **inputs) -> dict:
    """One node; a pair (node id, output) is a link."""
    linked = {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}
    return {"class_type": kind, "inputs": linked}


def parts(
    *,
    level: str = "BF16",
    encoder: str = ENCODER,
    vae: str = VAE,
    caption: str = CAPTION,
    **loader,
) -> dict:
    """Loaders and the encoded caption: model, encoder, vae, positive."""
    return {
        "model": node("Ideogram4QuantLoad", level=level, **loader),
        "encoder": node("Ideogram4QuantLoadEncoder", encoder=encoder),
        "vae": node("Ideogram4QuantLoadVAE", vae=vae),
        "positive": node("CLIPTextEncode", clip=("encoder", 0), text=caption),
    }


def ending(prefix: str, latent: tuple = ("sampled", 0)) -> dict:
    """From a latent to a saved picture."""
    return {
        "decoded": node("VAEDecode", samples=latent, vae=("vae", 0)),
        "saved": node("SaveImage", images=("decoded", 0), filename_prefix=prefix),
    }


def with_guider(
    prefix: str = "guider",
    *,
    seed: int = 1,
    preset: str = "turbo",
    size: tuple[int, int] = (128, 64),
    models: tuple[tuple, tuple | None] = (("model", 0), ("model", 1)),
    guider: dict | None = None,
    **settings,
) -> dict:
    """Text to image through SamplerCustomAdvanced and our guider."""
    width, height = size
    copies = {"conditional": models[0]}
    if models[1] is not None:
        copies["unconditional"] = models[1]
    return {
        **parts(**settings),
        "preset": node("Ideogram4QuantPreset", preset=preset, width=width, height=height),
        "guider": node(
            "Ideogram4QuantGuider",
            **copies,
            positive=("positive", 0),
            preset=preset,
            **(guider or {}),
        ),
        "noise": node("RandomNoise", noise_seed=seed),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "empty": node("EmptyFlux2LatentImage", width=width, height=height, batch_size=1),
        "sampled": node(
            "SamplerCustomAdvanced",
            noise=("noise", 0),
            guider=("guider", 0),
            sampler=("euler", 0),
            sigmas=("preset", 0),
            latent_image=("empty", 0),
        ),
        **ending(prefix),
    }


def with_sampler(
    prefix: str = "sampler",
    *,
    seed: int = 1,
    preset: str = "turbo",
    size: tuple[int, int] = (128, 64),
    models: tuple[tuple, tuple | None] = (("model", 0), ("model", 1)),
    sampler: dict | None = None,
    **settings,
) -> dict:
    """Text to image through our all-in-one sampler."""
    copies = {"conditional": models[0]}
    if models[1] is not None:
        copies["unconditional"] = models[1]
    return {
        **parts(**settings),
        "sampled": node(
            "Ideogram4QuantSampler",
            **copies,
            positive=("positive", 0),
            preset=preset,
            seed=seed,
            width=size[0],
            height=size[1],
            **(sampler or {}),
        ),
        "report": node("PreviewAny", source=("sampled", 1)),
        **ending(prefix),
    }
