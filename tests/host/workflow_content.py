"""What the workflows say and start from: downloads, notes, a sentence."""

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


FP8 = [
    model(name, "Ideogram-4/resolve/main/diffusion_models", "diffusion_models")
    for name in (
        "ideogram4_fp8_scaled.safetensors",
        "ideogram4_unconditional_fp8_scaled.safetensors",
    )
]
_ENDS = download_list([ENCODER, VAE])
_INT8_LIST = download_list(INT8)
_GGUF = f"""- [Q4_K, 10.4 GB]({HF}/transformerlab/ideogram-4-gguf-q4_k), for 12 and 16 GB cards
- [Q8_0, 19.7 GB]({HF}/transformerlab/ideogram-4-gguf-q8_0), closest to the original, for 24 GB
- [Q4_0]({HF}/leejet/ideogram-4-GGUF), and [other files]({HF}/molbal/ideogram-4-gguf)"""
_AND = f"""**And** the text encoder and the VAE:

{_ENDS}"""
TEXT_TO_IMAGE_NOTE = f"""**A GGUF**, into **models/diffusion_models**:

{_GGUF}

**or INT8 (2 x 9.6 GB)**, from the RTX 20 series on, for 24 GB:

{_INT8_LIST}

{_AND}

Then press **R** and **Run**. The level *auto* takes the best of the files that you have; the loader
says which. On 8 GB: Q4_K and the preset *turbo*.
"""
POCKET_NOTE = """**Nothing to download**: a model of 5 million parameters is in the pack. *Run*.

It paints one word on a plain ground, to try the nodes with. In the caption change *text*, the word
(3 to 6 capitals), and the colours in *desc* and *background*.

The real model: *Ideogram 4 text to image*, among the templates of this pack.
"""
ONE_BRANCH_NOTE = f"""**A distilled Ideogram 4: one file, no guidance**, one of:

- [Hippotes]({HF}/Hippotes/Ideogram4-Fal-ComfyUI): **Ideogram4-instant_int8-convrot-simple**, INT8
- [fal Instant]({HF}/fal/ideogram-v4-instant): 8 steps, BF16 (18.6 GB)
- [fal Fast]({HF}/fal/ideogram-v4-fast): 20 steps, BF16; pick the preset *fast*

into **models/diffusion_models**, with *instant* or *fast* in the name of the file or its folder.
*Quantize Ideogram 4* makes INT8 and GGUF files of them.

{_AND}
"""
ONE_COPY_NOTE = f"""**The conditional copy is enough**, also of a file that holds
both: a GGUF, into **models/diffusion_models**:

{_GGUF}

or INT8 (9.6 GB):

{download_list(INT8[:1])}

It runs both passes, the second one on image tokens alone (*unconditional_from* in the sampler).
Pictures differ from those of two copies. Nearer: pick an unconditional LoRA in *unconditional_lora*
of the loader and connect its output **unconditional**.

{_AND}
"""
LORA_NOTE = f"""Put LoRAs for Ideogram 4 into **models/loras**, press **R** and pick one. Any
trainer's names will do, at any level. With *none* the workflow runs without one; chain a second
node for a second one.

**The model, a GGUF**, into **models/diffusion_models**:

{_GGUF}

or INT8:

{_INT8_LIST}

{_AND}
"""
IMAGE_NOTE = f"""Pick a picture of up to 2048 px a side (a larger one through *Scale Image to
Total Pixels*; sides are cut to multiples of 16), and write in **Caption** what it shall become.
*denoise* in the sampler is how much of it is made anew.

**The model, a GGUF**, into **models/diffusion_models**:

{_GGUF}

or INT8:

{_INT8_LIST}

{_AND}
"""
COMPARE_NOTE = f"""The same caption and seed, painted from the files of two levels. Put both into
**models/diffusion_models**, press **R**, and pick other levels in the loaders if you like; name
them so in *names* of the last node.

{_GGUF}

{_AND}

Levels without a file here are marked in the list. In *Side by side* the second picture carries its
distance from the first.
"""
QUANTIZE_NOTE = f"""Makes INT8 or GGUF files of your own fine-tune, or of the FP8 release:

{download_list(FP8)}

Put your files into **models/diffusion_models**, press **R**, pick the conditional copy in *source*,
the unconditional one in *pair*, a level or a preset, and press **Run**. It takes minutes to an
hour; an interrupted run goes on where it was.

Then press **R**, and pick the level in *Load Ideogram 4 (quantized)*. INT8 files load in ComfyUI's
own nodes too. Less error at the same size: connect **calibration** of *Calibrate Ideogram 4*.
"""
SENTENCE = (
    "A photograph of a small bakery front on a quiet morning, round loaves in the window. "
    'The green shop sign says "FRESH BREAD".'
)
