"""What the workflows say and start from: downloads, notes, an example of a caption."""

from __future__ import annotations

HF = "https://huggingface.co"
COMFY = f"{HF}/Comfy-Org"


def model(name: str, path: str, directory: str) -> dict:
    """A download of Comfy-Org, as the page's own loaders carry it in their properties."""
    return {"name": name, "url": f"{COMFY}/{path}/{name}", "directory": directory}


ENCODER = model(
    "qwen3vl_8b_fp8_scaled.safetensors", "Qwen3-VL/resolve/main/text_encoders", "text_encoders"
)
VAE = model("flux2-vae.safetensors", "flux2-dev/resolve/main/split_files/vae", "vae")
INT8 = [
    model(name, "Ideogram-4/resolve/main/diffusion_models", "diffusion_models")
    for name in (
        "ideogram4_int8_convrot.safetensors",
        "ideogram4_unconditional_int8_convrot.safetensors",
    )
]


def download_list(models: list[dict]) -> str:
    """Markdown for a note: each file, its link, its folder."""
    return "\n".join(f"- [{m['name']}]({m['url']}) in **models/{m['directory']}**" for m in models)


SHARED = f"""**Text encoder and VAE**

{download_list([ENCODER, VAE])}

*expand* in *Caption* writes with that encoder; another one without a head takes
[this file]({HF}/diffusers/qwen3-vl-8b-instruct-lm-head) in **models/text_encoders**.
"""
FP8 = [
    model(name, "Ideogram-4/resolve/main/diffusion_models", "diffusion_models")
    for name in (
        "ideogram4_fp8_scaled.safetensors",
        "ideogram4_unconditional_fp8_scaled.safetensors",
    )
]
MODEL_NOTES = {
    "auto": f"""**A distilled Ideogram 4: one file, no guidance**, one of:

- [Hippotes]({HF}/Hippotes/Ideogram4-Fal-ComfyUI): **Ideogram4-instant_int8-convrot-simple**, INT8
- [fal Instant]({HF}/fal/ideogram-v4-instant): 8 steps, BF16 (18.6 GB)
- [fal Fast]({HF}/fal/ideogram-v4-fast): 20 steps, BF16; pick the preset *fast*

in **models/diffusion_models**, with *instant* or *fast* in the name of the file or its folder.
*Quantize Ideogram 4* makes INT8 and GGUF files of them. Nothing goes on the sampler's
*unconditional* input. *branches: one* in the loader passes over files of two copies.
""",
    "INT8 W8A8 rotated": f"""**Ideogram 4, INT8 (2 x 9.6 GB)**

{download_list(INT8)}

For 24 GB cards, from the RTX 20 series on.
""",
    "Q8_0": f"""**Ideogram 4, Q8_0 GGUF (19.7 GB)**, one of:

- [Transformer Lab]({HF}/transformerlab/ideogram-4-gguf-q8_0): **ideogram4-q8_0.gguf**, both copies
- [molbal]({HF}/molbal/ideogram-4-gguf): two files, **ideogram4-transformer** and
  **ideogram4-unconditional_transformer**

in **models/diffusion_models**. Closest to the original; for 24 GB cards.
""",
    "Q4_K": f"""**Ideogram 4, Q4_K GGUF (10.4 GB)**

- [Transformer Lab]({HF}/transformerlab/ideogram-4-gguf-q4_k): **ideogram4-q4_k.gguf**, both copies

in **models/diffusion_models**. For 12 and 16 GB cards. The level *Q4_0* takes the files of
[leejet]({HF}/leejet/ideogram-4-GGUF) and [molbal]({HF}/molbal/ideogram-4-gguf).
""",
}
USE = """**How to use**

1. Download the files (left) into those folders and press **R**.
2. Draw boxes and say what is in them; a *text* box needs the exact words. Drawing needs *Nodes 2.0*
   (in ComfyUI's menu).
3. Write the background and the style, then press **Run**.

The level *auto* takes the best of the files that you have. The report of the loader says which, and
how much memory they need.
"""
REGIONS = [
    {
        "x": 112,
        "y": 80,
        "width": 800,
        "height": 200,
        "metadata": {
            "type": "text",
            "text": "FRESH BREAD",
            "desc": "Large hand-painted cream serif letters on a dark green shop sign.",
            "palette": [],
        },
    },
    {
        "x": 200,
        "y": 340,
        "width": 620,
        "height": 560,
        "metadata": {
            "type": "obj",
            "text": "",
            "desc": "A bakery window with round loaves on wooden shelves behind the glass.",
            "palette": [],
        },
    },
]
CAPTION = {
    "high_level_description": "A photograph of a small bakery front with a painted sign that "
    "says FRESH BREAD.",
    "background": "A quiet street with a whitewashed brick wall and wet cobblestones.",
    "style": "photo",
    "style.photo": "35mm, eye level",
    "aesthetics": "calm, detailed, natural colours",
    "lighting": "soft overcast morning light",
    "medium": "photograph",
}
