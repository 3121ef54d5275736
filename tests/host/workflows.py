"""The workflows that come with the pack."""

from __future__ import annotations

from dataclasses import replace

from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path, encoder_dir, vae_dir

from .workflow_content import (
    COMPARE_NOTE,
    ENCODER,
    FP8,
    IMAGE_NOTE,
    LORA_NOTE,
    ONE_BRANCH_NOTE,
    ONE_COPY_NOTE,
    POCKET_NOTE,
    QUANTIZE_NOTE,
    SENTENCE,
    TEXT_TO_IMAGE_NOTE,
    VAE,
)
from .workflow_parts import (
    CAPTION_LINK,
    ENCODER_NODE,
    PICTURE,
    SAVED,
    caption,
    caption_column,
    downloads,
    loader,
    models_column,
    sampler,
    sampler_column,
    sampling,
)
from .workflow_specs import GREEN, PURPLE, Column, Node, Workflow, note, numbered

EXAMPLE = "example.png"  # lies in the input folder of every ComfyUI
_COMPARED = ("Q8_0", "Q4_K")


def _pocket() -> Workflow:
    """The pocket model, from inside the pack."""
    files = {
        "conditional_file": f"pocket/{dit_path('cond').name}",
        "unconditional_file": f"pocket/{dit_path('uncond').name}",
    }
    encoder, vae = encoder_dir().name, vae_dir().name
    nodes = [
        loader(models=[], height=380, **files),
        replace(
            ENCODER_NODE, widgets={"encoder": f"pocket/{encoder}/model.safetensors"}, models=[]
        ),
        Node(
            "vae",
            "Ideogram4QuantLoadVAE",
            widgets={"vae": f"pocket/{vae}/diffusion_pytorch_model.safetensors"},
        ),
    ]
    prompt = HELD_OUT[0]
    text = caption(prompt.caption, aspect_ratio="2:1", size="pocket")
    words = replace(caption_column(text), nodes=[note(POCKET_NOTE, "Try it", 190), text])
    columns = [
        Column("Models", nodes, 400),
        words,
        sampler_column(sampler(seed=prompt.seed)),
        PICTURE,
    ]
    links = [CAPTION_LINK, *_of_our_vae(sampling()), SAVED]
    return numbered("Ideogram 4 try it now (no download)", 1, columns, links)


def _of_our_vae(links: list) -> list:
    return [(a, "vae" if b == "VAE" else b, c, d) for a, b, c, d in links]


def _painting(title: str, number: int, text: str, **settings) -> Workflow:
    """Text to image, or a variant of it in the sampler."""
    columns = [
        models_column(downloads(text), loader()),
        caption_column(caption(SENTENCE)),
        sampler_column(sampler(**settings)),
        PICTURE,
    ]
    return numbered(title, number, columns, [CAPTION_LINK, *sampling(), SAVED])


def _with_one(title: str, number: int, text: str, model: Node, **settings) -> Workflow:
    """One copy or one branch: nothing on the sampler's input unconditional."""
    columns = [
        models_column(downloads(text), model),
        caption_column(caption(SENTENCE)),
        sampler_column(sampler(**settings)),
        PICTURE,
    ]
    return numbered(title, number, columns, [CAPTION_LINK, *sampling(unconditional=None), SAVED])


def _lora() -> Workflow:
    text = caption(SENTENCE)
    columns = [
        models_column(downloads(LORA_NOTE), loader()),
        Column(
            "LoRA, and what to paint", [Node("lora", "Ideogram4QuantLoadLora"), text], 400, GREEN
        ),
        sampler_column(sampler()),
        PICTURE,
    ]
    links = [
        ("model", "conditional", "lora", "conditional"),
        ("model", "unconditional", "lora", "unconditional"),
        CAPTION_LINK,
        *sampling(conditional="lora", unconditional="lora"),
        SAVED,
    ]
    return numbered("Ideogram 4 with a LoRA", 4, columns, links)


def _image_to_image() -> Workflow:
    start = [
        Node("image", "LoadImage", "Picture to start from", {"image": EXAMPLE}, height=300),
        Node("encoded", "VAEEncode"),
        caption(SENTENCE, 440),
    ]
    columns = [
        models_column(downloads(IMAGE_NOTE), loader()),
        Column("Start and goal", start, 400, GREEN),
        sampler_column(sampler(denoise=0.7)),
        PICTURE,
    ]
    links = [
        ("image", "IMAGE", "encoded", "pixels"),
        ("vae", "VAE", "encoded", "vae"),
        ("encoded", "LATENT", "sampler", "latent"),
        CAPTION_LINK,
        *sampling(size=False),
        SAVED,
    ]
    return numbered("Ideogram 4 image to image", 5, columns, links)


def _compare() -> Workflow:
    """The same caption and seed at two levels, side by side."""
    models = [
        loader(f"model{i}", f"{what}: {level}", models=[], level=level)
        for i, (what, level) in enumerate(zip(("Reference", "To compare"), _COMPARED, strict=True))
    ]
    runs = [
        Column(f"Run {level}", [sampler(f"sampler{i}", f"Sample {level}")], 300, PURPLE)
        for i, level in enumerate(_COMPARED)
    ]
    sheet = Node(
        "compare", "Ideogram4QuantCompare", None, {"names": "\n".join(_COMPARED)}, height=930
    )
    links = [
        CAPTION_LINK,
        ("caption", "caption", "compare", "captions"),
        ("sampler0", "seed", "sampler1", "seed"),
    ]
    for i in range(len(_COMPARED)):
        links += [
            *sampling(f"sampler{i}", f"model{i}", f"model{i}"),
            (f"sampler{i}", "image", "compare", f"pictures.level{i}"),
        ]
    columns = [
        replace(models_column(*models), width=370),
        Column("Say what to paint", [downloads(COMPARE_NOTE), caption(SENTENCE)], 370, GREEN),
        *runs,
        Column("Side by side", [sheet], 380, PURPLE),
    ]
    return numbered("Ideogram 4 compare two levels", 6, columns, links)


def _quantize() -> Workflow:
    """Both copies to a level in one run."""
    sources = {"source": FP8[0]["name"], "pair": FP8[1]["name"]}
    node = Node(
        "quantize",
        "Ideogram4QuantQuantize",
        None,
        {**sources, "level": "INT8 W8A8 rotated", "copy": "conditional"},
        models=FP8,
        height=620,
    )
    columns = [
        Column("Your files", [note(QUANTIZE_NOTE, "Quantize your own", 300)], 420),
        Column("Quantize both copies", [node], 520, GREEN),
    ]
    return numbered("Ideogram 4 quantize your own", 7, columns, [])


PLACEHOLDERS = [
    ("text_encoders", ENCODER["name"]),
    ("vae", VAE["name"]),
    *(("diffusion_models", m["name"]) for m in (*FP8, *loader().models)),
]
"""Files that the workflows name; empty ones keep the interface from marking them as missing."""

WORKFLOWS = (
    _pocket(),
    _painting("Ideogram 4 text to image", 2, TEXT_TO_IMAGE_NOTE),
    _with_one(
        "Ideogram 4 in 8 steps (one branch)",
        3,
        ONE_BRANCH_NOTE,
        loader(models=[], branches="one"),
        preset="instant",
    ),
    _lora(),
    _image_to_image(),
    _compare(),
    _quantize(),
    _with_one(
        "Ideogram 4 in half the memory",
        8,
        ONE_COPY_NOTE,
        loader(models=loader().models[:1]),
        unconditional_from="conditional copy",
    ),
)
