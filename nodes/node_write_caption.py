"""Caption: the one text box of a picture."""

from __future__ import annotations

from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ..captions.compose import as_text
from ..captions.instruction import turns
from ..captions.making import Made, Ratio, make_caption
from ..captions.ratio import AUTO, POCKET, RATIOS, SIZES, picture_size
from ..captions.styles import NONE, STYLES
from ..captions.tokens import MAX_TOKENS
from ..errors import OpError
from ..sampling import is_pocket
from . import caption_writing
from .connections import is_read
from .schema import CATEGORY

_LEAST_TOKENS, _MOST_TOKENS = 64, 2000  # a caption is at most 2048 long
_POSITIVE = 0  # the output's place
_NO_ENCODER = (
    "Connect Load Qwen3-VL encoder (quantized) to clip of Caption (Ideogram 4), or take its output "
    "caption to a CLIP Text Encode."
)


_POCKET = (
    "The test model in the pack paints one word of 3 to 6 capitals, from JSON like that of its "
    "workflow, and no sentences: for those take the real model and another size"
)


class Caption(io.ComfyNode):
    """A sentence, JSON or both -> a caption, its size, and with the encoder its conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantCaption",
            display_name="Caption (Ideogram 4)",
            category=CATEGORY,
            description=(
                "Type a sentence: it becomes a caption in the JSON that Ideogram 4 was trained on. "
                'Words in "quotes" are written in the picture. With expand on, the text encoder '
                "writes the caption from it, or from a picture. JSON passes unchanged."
            ),
            search_aliases=["prompt", "ideogram prompt", "enhance prompt", "magic prompt", "text"],
            inputs=_inputs(),
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        text: str | dict,
        aspect_ratio: str = AUTO,
        size: str = "1K",
        style: str = NONE,
        expand: bool = False,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
        clip=None,
        image=None,
    ) -> io.NodeOutput:
        if clip is None and is_read(cls.hidden.prompt, cls.hidden.unique_id, _POSITIVE):
            raise OpError("there is no encoder for the output positive", hint=_NO_ENCODER)
        typed = text if isinstance(text, str) else as_text(text)
        made = make_caption(
            typed,
            ratio=aspect_ratio,
            style=style,
            write=_writer(clip, image, seed, max_tokens) if expand else None,
            picture=image is not None,
        )
        width, height = picture_size(made.ratio, size)
        if clip is None:
            encoded = ExecutionBlocker(_NO_ENCODER)  # for a link that is made later
        else:
            encoded = clip.encode_from_tokens_scheduled(clip.tokenize(made.caption))
        said = [f"{width} x {height} px", *_notes(made, expand, image is not None, clip)]
        tiny = size == POCKET or (clip is not None and is_pocket(encoded[0][0].shape[-1]))
        if tiny and not typed.lstrip().startswith("{"):
            said.append(_POCKET)
        # one paragraph for each: Nodes 2.0 joins lines
        shown = "\n\n".join([". ".join(s.rstrip(".") for s in said) + ".", made.caption])
        return io.NodeOutput(encoded, made.caption, width, height, ui=ui.PreviewText(shown))


def _writer(clip, image, seed: int, max_tokens: int):
    """What asks the encoder for a caption; OpError where there is none, or where the bound is."""
    if clip is None:
        raise OpError(
            "expand asks the encoder to write, and there is none",
            hint="Connect Load Qwen3-VL encoder (quantized) to clip, or switch expand off.",
        )
    if not _LEAST_TOKENS <= max_tokens <= _MOST_TOKENS:
        raise OpError(
            "max_tokens is out of range",
            found=max_tokens,
            needed=f"{_LEAST_TOKENS} to {_MOST_TOKENS}",
        )
    picture = None if image is None else image[:1, ..., :3]

    def write(sentence: str, ratio: Ratio) -> str:
        asked = turns(sentence, ratio, picture=picture is not None)
        return caption_writing.write(clip, asked, seed, max_tokens, picture)

    return write


def _notes(made: Made, expand: bool, picture: bool, clip) -> list[str]:
    """What is said above the caption: how it came about, what was left out."""
    notes = list(made.notes)
    if picture and not expand:
        notes.append("The picture is not looked at: expand is off")
    if made.written:
        notes.append(f"Written with {caption_writing.memory(clip)}")
    return notes


def _inputs() -> list:
    return [
        io.MultiType.Input(
            io.String.Input("text", multiline=True, default="", dynamic_prompts=False),
            types=[io.String, io.Dict],
            tooltip='What to paint, as a sentence; words in "quotes" are written in the picture. '
            "A JSON caption passes unchanged, and one beside a sentence is added to.",
        ),
        io.Combo.Input(
            "aspect_ratio",
            options=list(RATIOS),
            default=AUTO,
            tooltip=f"Width to height. {AUTO}: what a JSON caption says, else square.",
        ),
        io.Combo.Input(
            "size",
            options=list(SIZES),
            default="1K",
            tooltip="1K: the area of 1024 x 1024 px, 2K: up to 2048 px a side; pocket: for the "
            "pocket model. Connect width and height to the sampler.",
        ),
        io.Combo.Input(
            "style",
            options=list(STYLES),
            default=NONE,
            tooltip="A style to add to a sentence. JSON keeps its own.",
        ),
        io.Boolean.Input(
            "expand",
            default=False,
            tooltip="The text encoder writes a full caption of the sentence, as diffusers' prompt "
            "upsampling does. Needs clip, and a file with a head (Comfy-Org's have one).",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of expand: another seed writes another caption.",
        ),
        io.Int.Input(
            "max_tokens",
            default=MAX_TOKENS,
            min=_LEAST_TOKENS,
            max=_MOST_TOKENS,
            optional=True,
            advanced=True,
            tooltip="Of expand: the longest caption. One that ends early is closed there.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The encoder: gives the conditioning, and writes where expand is on.",
        ),
        io.Image.Input(
            "image",
            optional=True,
            tooltip="With expand on: a picture to describe. Needs an encoder file with vision.",
        ),
    ]


def _outputs() -> list:
    return [
        io.Conditioning.Output(
            id="positive",
            display_name="positive",
            tooltip="The encoded caption, for the sampler. Needs clip.",
        ),
        io.String.Output(id="caption", display_name="caption", tooltip="The caption as JSON."),
        io.Int.Output(id="width", display_name="width", tooltip="For the sampler."),
        io.Int.Output(id="height", display_name="height", tooltip="For the sampler."),
    ]
