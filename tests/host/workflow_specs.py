"""What the workflows hold: nodes in columns, links between them, notes with the downloads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .workflow_content import (
    CAPTION,
    ENCODER,
    FP8,
    HF,
    INT8,
    MODEL_NOTES,
    REGIONS,
    SHARED,
    USE,
    VAE,
    download_list,
)

EXAMPLE = "example.png"  # lies in the input folder of every ComfyUI
_BLUE, _GREEN, _PURPLE, _NOTE = "#6fb1e0", "#8fce8f", "#b79ad9", "#2b3138"


@dataclass(frozen=True)
class Node:
    """One node: a name for links, its type, and the widgets that differ from their defaults."""

    name: str
    type: str
    title: str | None = None
    widgets: dict = field(default_factory=dict)
    models: list = field(default_factory=list)
    height: int = 0
    color: str | None = None


@dataclass(frozen=True)
class Column:
    """Nodes below each other in one group."""

    title: str
    nodes: list[Node]
    width: int = 340
    color: str = _BLUE


@dataclass(frozen=True)
class Workflow:
    """A file in workflows/; the title is the file's name and what the template browser shows."""

    title: str
    id: str
    columns: list[Column]
    links: list[tuple[str, str, str, str]]


def _note(name: str, title: str, text: str, height: int) -> Node:
    return Node(name, "MarkdownNote", title, {"text": text}, height=height, color=_NOTE)


def _loaders(level: str, extra: str = "", height: int = 280) -> Column:
    rotated = level == "INT8 W8A8 rotated"
    return Column(
        "1. Models",
        [
            _note("downloads", "Downloads", f"{MODEL_NOTES[level]}\n{SHARED}{extra}", height),
            Node(
                "model",
                "Ideogram4QuantLoad",
                widgets={"level": level},
                models=INT8 if rotated else [],
            ),
            Node(
                "encoder",
                "Ideogram4QuantLoadEncoder",
                widgets={"encoder": ENCODER["name"]},
                models=[ENCODER],
            ),
            Node("vae", "VAELoader", widgets={"vae_name": VAE["name"]}, models=[VAE]),
        ],
        width=420,
    )


_BOXES = Column(
    "2. Layout",
    [
        _note("use", "How to use", USE, 240),
        Node(
            "boxes",
            "CreateBoundingBoxes",
            "Draw boxes: what is where",
            {"width": 1024, "height": 1024, "editor_state": REGIONS},
            height=870,
        ),
    ],
    width=460,
    color=_GREEN,
)
_CAPTIONS = Column(
    "3. Caption",
    [
        Node("caption", "BuildJsonPromptIdeogram", widgets=CAPTION, height=480),
        Node("checked", "Ideogram4QuantCheckCaption", height=250),
        Node("positive", "CLIPTextEncode", "Encode the caption", height=120),
    ],
    width=420,
    color=_GREEN,
)
_CAPTION_LINKS = [
    ("boxes", "elements", "caption", "element"),
    ("caption", "prompt", "checked", "caption"),
    ("checked", "caption", "positive", "text"),
    ("encoder", "clip", "positive", "clip"),
]


def _sample(title: str, **settings) -> Column:
    return Column(
        title,
        [
            Node("sampler", "Ideogram4QuantSampler", widgets=settings),
            Node("decoded", "VAEDecode"),
        ],
        width=360,
        color=_PURPLE,
    )


_PICTURE = Column(
    "5. Picture",
    [
        Node("saved", "SaveImage", widgets={"filename_prefix": "Ideogram4"}, height=480),
        Node("report", "PreviewAny", "Report of the sampler", height=160),
        Node("loaded", "PreviewAny", "Report of the loader", height=300),
    ],
    width=520,
    color=_PURPLE,
)


def _sample_links(conditional: str = "model", unconditional: str = "model") -> list:
    return [
        (conditional, "conditional", "sampler", "conditional"),
        (unconditional, "unconditional", "sampler", "unconditional"),
        ("positive", "CONDITIONING", "sampler", "positive"),
        ("sampler", "latent", "decoded", "samples"),
        ("vae", "VAE", "decoded", "vae"),
        ("sampler", "report", "report", "source"),
        ("model", "report", "loaded", "source"),
        ("decoded", "IMAGE", "saved", "images"),
    ]


def _text_to_image(title: str, number: int, level: str, **settings) -> Workflow:
    columns = [_loaders(level), _BOXES, _CAPTIONS, _sample("4. Sample", **settings), _PICTURE]
    return Workflow(title, _id(number), columns, _CAPTION_LINKS + _sample_links())


def _id(number: int) -> str:
    return f"1de06a40-0000-4000-8000-{number:012d}"


def _low_vram() -> Workflow:
    """Q4_K in turns, few steps, the encoder perhaps as GGUF: for cards of 8 GB."""
    extra = f"""
**Or the encoder as GGUF (5 GB)**, in **models/text_encoders**:
**Qwen3-VL-8B-Instruct-Q4_K_M.gguf** of [unsloth]({HF}/unsloth/Qwen3-VL-8B-Instruct-GGUF)

The two copies take turns on the card (*residency: alternating*); turbo has the fewest steps.
"""
    column = _loaders("Q4_K", extra, 400)
    settings = {"preset": "turbo", "residency": "alternating", "width": 768, "height": 768}
    columns = [column, _BOXES, _CAPTIONS, _sample("4. Sample", **settings), _PICTURE]
    links = _CAPTION_LINKS + _sample_links()
    return Workflow("Ideogram 4 low VRAM", _id(4), columns, links)


def _one_branch() -> Workflow:
    """Eight steps of one file, without guidance and without an unconditional copy."""
    column = _loaders("auto", height=360)
    loader = replace(column.nodes[1], widgets={"level": "auto", "branches": "one"})
    column = replace(column, nodes=[column.nodes[0], loader, *column.nodes[2:]])
    columns = [column, _BOXES, _CAPTIONS, _sample("4. Sample", preset="instant"), _PICTURE]
    links = [link for link in _sample_links() if link[1] != "unconditional"]
    return Workflow("Ideogram 4 one branch", _id(9), columns, _CAPTION_LINKS + links)


def _one_copy() -> Workflow:
    """Guidance from the conditional copy alone: half the memory of two copies."""
    extra = """
**The first file is enough here**: the conditional copy runs both passes, the second one on image
tokens alone (*unconditional_from* in the sampler). Pictures differ from those of two copies.

**Nearer to two copies**: pick an unconditional LoRA in *unconditional_lora* of the loader, and
connect its **unconditional** output. `ideogram4-quant delta` makes one of your two files.
"""
    settings = {"unconditional_from": "conditional copy"}
    column = _loaders("INT8 W8A8 rotated", extra, 460)
    loader = replace(column.nodes[1], models=INT8[:1])
    column = replace(column, nodes=[column.nodes[0], loader, *column.nodes[2:]])
    columns = [column, _BOXES, _CAPTIONS, _sample("4. Sample", **settings), _PICTURE]
    links = [link for link in _sample_links() if link[1] != "unconditional"]
    return Workflow("Ideogram 4 one copy", _id(10), columns, _CAPTION_LINKS + links)


def _lora() -> Workflow:
    text = """Put LoRAs for Ideogram 4 into **models/loras**. Any trainer's names will do, and any
quantization level: the weights stay as they are.

Press **R** and pick yours below; with *none* the workflow runs without one. Chain another
*Load LoRA for Ideogram 4* for a second one. The stock LoRA nodes work too.
"""
    lora = Column(
        "2. LoRA",
        [
            _note("about", "LoRA", text, 200),
            Node("lora", "Ideogram4QuantLoadLora"),
            Node("found", "PreviewAny", "What the file holds", height=140),
        ],
        width=340,
    )
    columns = [_loaders("INT8 W8A8 rotated"), lora, _BOXES, _CAPTIONS, _sample("5. Sample")]
    links = [
        ("model", "conditional", "lora", "conditional"),
        ("model", "unconditional", "lora", "unconditional"),
        ("lora", "report", "found", "source"),
        *_CAPTION_LINKS,
        *_sample_links("lora", "lora"),
    ]
    return Workflow("Ideogram 4 LoRA", _id(5), _renumbered([*columns, _PICTURE]), links)


def _image_to_image() -> Workflow:
    text = """Load a picture whose sides are multiples of 16. *denoise* says how much of it is made
anew: 0.6 keeps the layout, 0.9 little more than the colours.

For inpainting, paint a mask (right click on the picture, *Open in Mask Editor*), add *Set Latent
Noise Mask* behind *VAE Encode*, and connect the mask there.
"""
    start = Column(
        "2. Picture to start from",
        [
            _note("about", "Image to image", text, 240),
            Node("image", "LoadImage", widgets={"image": EXAMPLE}, height=420),
            Node("encoded", "VAEEncode"),
        ],
        width=360,
    )
    sample = _sample("5. Sample", denoise=0.7)
    columns = [_loaders("INT8 W8A8 rotated"), start, _BOXES, _CAPTIONS, sample, _PICTURE]
    links = [
        ("image", "IMAGE", "encoded", "pixels"),
        ("vae", "VAE", "encoded", "vae"),
        ("encoded", "LATENT", "sampler", "latent"),
        *_CAPTION_LINKS,
        *_sample_links(),
    ]
    return Workflow("Ideogram 4 image to image", _id(6), _renumbered(columns), links)


def _compare() -> Workflow:
    """The same caption and seed at two levels, side by side."""
    text = """Both samplers get the same seed and caption, so every difference is the level's. The
pictures are saved in **output/compare/Q8_0** and **output/compare/Q4_K**.

For intervals, queue several runs with other captions; then disconnect the pictures and write into
**folders**:

    Q8_0 = compare/Q8_0
    Q4_K = compare/Q4_K
"""
    shared = _loaders("Q8_0")
    downloads = f"{MODEL_NOTES['Q8_0']}\n{MODEL_NOTES['Q4_K']}\n{SHARED}"
    models = [
        _note("downloads", "Downloads", downloads, 400),
        Node("first", "Ideogram4QuantLoad", "Reference: Q8_0", {"level": "Q8_0"}),
        Node("second", "Ideogram4QuantLoad", "To compare: Q4_K", {"level": "Q4_K"}),
        *(node for node in shared.nodes if node.name in ("encoder", "vae")),
    ]
    sample = [_note("about", "Compare levels", text, 260), Node("seed", "PrimitiveInt", "Seed")]
    compare = Node("compare", "Ideogram4QuantCompare", widgets={"names": "Q8_0\nQ4_K"}, height=560)
    links = [
        ("compare", "table", "table", "source"),
        ("checked", "caption", "compare", "captions"),
        *_CAPTION_LINKS,
    ]
    for i, (model, level) in enumerate((("first", "Q8_0"), ("second", "Q4_K"))):
        sampler, decoded, saved = f"sampler{i}", f"decoded{i}", f"saved{i}"
        sample += [
            Node(sampler, "Ideogram4QuantSampler", f"Sample {level}"),
            Node(decoded, "VAEDecode"),
        ]
        links += [
            (model, "conditional", sampler, "conditional"),
            (model, "unconditional", sampler, "unconditional"),
            ("positive", "CONDITIONING", sampler, "positive"),
            ("seed", "INT", sampler, "seed"),
            (sampler, "latent", decoded, "samples"),
            ("vae", "VAE", decoded, "vae"),
            (decoded, "IMAGE", saved, "images"),
            (decoded, "IMAGE", "compare", f"pictures.level{i}"),
        ]
    pictures = [
        Node(
            f"saved{i}",
            "SaveImage",
            f"Picture of {level}",
            {"filename_prefix": f"compare/{level}/picture"},
            height=420,
        )
        for i, level in enumerate(("Q8_0", "Q4_K"))
    ]
    columns = [
        Column("1. Models", models, 420),
        _BOXES,
        _CAPTIONS,
        Column("4. Sample both", sample, 360, _PURPLE),
        Column("5. Pictures", pictures, 360, _PURPLE),
        Column(
            "6. Side by side",
            [compare, Node("table", "PreviewAny", "Table", height=260)],
            520,
            _PURPLE,
        ),
    ]
    return Workflow("Ideogram 4 compare levels", _id(7), columns, links)


def _renumbered(columns: list[Column]) -> list[Column]:
    """The same columns, their titles counted from 1."""
    return [
        replace(column, title=f"{number}. {column.title.partition('. ')[2]}")
        for number, column in enumerate(columns, 1)
    ]


def _quantize() -> Workflow:
    """Both copies to a level, each by a node of its own."""
    text = f"""Makes INT8 or GGUF files of your own fine-tune, or of the FP8 release:

{download_list(FP8)}

Put your files into **models/diffusion_models**, press **R**, pick one copy in each node, a level,
and press **Run**. It takes minutes to an hour; an interrupted run goes on where it was.
"""
    after = """Press **R**, and pick the level in *Load Ideogram 4 (quantized)* of any workflow of
this pack. INT8 files load in ComfyUI's own nodes too.

The reports name the layers that lost most. For GGUF, connect **calibration** of *Calibrate
Ideogram 4*, run on these very files: the same size, less error. *target_gb* (advanced) gives the
layers that need it a higher type.
"""
    nodes = [
        Node(
            copy,
            "Ideogram4QuantQuantize",
            f"Quantize the {copy} copy",
            {"source": model["name"], "level": "INT8 W8A8 rotated", "copy": copy},
            models=[model],
        )
        for copy, model in zip(("conditional", "unconditional"), FP8, strict=True)
    ]
    reports = [
        Node(f"{copy}_report", "PreviewAny", f"Report: {copy}", height=260)
        for copy in ("conditional", "unconditional")
    ]
    columns = [
        Column(
            "1. Your files",
            [
                _note("files", "Quantize your own", text, 230),
                _note("after", "And then", after, 230),
            ],
            width=420,
        ),
        Column("2. Quantize", nodes, width=420, color=_GREEN),
        Column("3. Reports", reports, width=640, color=_PURPLE),
    ]
    links = [
        (copy, "report", f"{copy}_report", "source") for copy in ("conditional", "unconditional")
    ]
    return Workflow("Ideogram 4 quantize your own", _id(8), columns, links)


PLACEHOLDERS = [
    ("text_encoders", ENCODER["name"]),
    ("vae", VAE["name"]),
    *(("diffusion_models", model["name"]) for model in FP8),
]
"""Files that the workflows name; empty ones keep the interface from marking them as missing."""

WORKFLOWS = (
    _text_to_image("Ideogram 4 text to image INT8", 1, "INT8 W8A8 rotated"),
    _text_to_image("Ideogram 4 text to image Q8_0", 2, "Q8_0"),
    _text_to_image("Ideogram 4 text to image Q4_K", 3, "Q4_K"),
    _low_vram(),
    _lora(),
    _image_to_image(),
    _compare(),
    _quantize(),
    _one_branch(),
    _one_copy(),
)
