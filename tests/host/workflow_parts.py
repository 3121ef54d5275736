"""The parts that workflows share: loaders, the caption, the sampler, the picture."""

from __future__ import annotations

from .workflow_content import ENCODER, INT8, VAE
from .workflow_specs import GREEN, PURPLE, Column, Link, Node, note

_COPIES = ("conditional", "unconditional")


def loader(
    name: str = "model", title: str | None = None, *, models=INT8, height: int = 300, **widgets
) -> Node:
    """The model's loader. models: files that it names, for which the page offers downloads."""
    picked = {f"{copy}_file": m["name"] for copy, m in zip(_COPIES, models, strict=False)}
    return Node(
        name, "Ideogram4QuantLoad", title, widgets | picked, models=list(models), height=height
    )


ENCODER_NODE = Node(
    "encoder", "Ideogram4QuantLoadEncoder", widgets={"encoder": ENCODER["name"]}, models=[ENCODER]
)
VAE_NODE = Node("vae", "VAELoader", widgets={"vae_name": VAE["name"]}, models=[VAE])


def models_column(*nodes: Node) -> Column:
    """The loaders of the encoder and the VAE below what is given."""
    return Column("Models", [*nodes, ENCODER_NODE, VAE_NODE], 440)


def downloads(text: str) -> Node:
    """The note of the files that a workflow wants; as high as its text where that is more."""
    return note(text, "Downloads", 280)


def caption(text: str, height: int = 600, **widgets) -> Node:
    """The one text box."""
    return Node("caption", "Ideogram4QuantCaption", None, {"text": text, **widgets}, height=height)


def caption_column(node: Node) -> Column:
    return Column("Say what to paint", [node], 400, GREEN)


def sampler(name: str = "sampler", title: str | None = None, height: int = 860, **widgets) -> Node:
    """The sampler; its height leaves room for the preview while it runs."""
    return Node(name, "Ideogram4QuantSampler", title, widgets, height=height)


def sampler_column(node: Node) -> Column:
    return Column("Run", [node], 340, PURPLE)


PICTURE = Column(
    "Picture",
    [Node("saved", "SaveImage", widgets={"filename_prefix": "Ideogram4"}, height=560)],
    460,
    PURPLE,
)
SAVED: Link = ("sampler", "image", "saved", "images")


def sampling(
    name: str = "sampler",
    conditional: str = "model",
    unconditional: str | None = "model",
    *,
    size: bool = True,
) -> list[Link]:
    """What goes into a sampler. size: that of the caption; else it is the latent's."""
    links = [
        (conditional, "conditional", name, "conditional"),
        ("caption", "positive", name, "positive"),
        ("vae", "VAE", name, "vae"),
    ]
    if unconditional is not None:
        links.append((unconditional, "unconditional", name, "unconditional"))
    if size:
        links += [("caption", side, name, side) for side in ("width", "height")]
    return links


CAPTION_LINK: Link = ("encoder", "clip", "caption", "clip")
