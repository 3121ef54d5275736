"""What a language model is told when it writes a caption.

Where diffusers is installed its own instruction is used, so that ComfyUI and diffusers write the
same; ours stands in for it, and describes pictures, for which diffusers has none.
"""

from __future__ import annotations

import importlib
import logging

from .compose import as_text
from .schema import ELEMENT, REQUIRED

logger = logging.getLogger(__name__)
_DIFFUSERS = "diffusers.pipelines.ideogram4.prompt_enhancer"
# Qwen3-VL's turns; the template in a tokenizer's folder is a program, so it is not run
TURNS = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_SHAPE = {
    "high_level_description": "...",
    "compositional_deconstruction": {
        "background": "...",
        "elements": [{"type": kind} | dict.fromkeys(REQUIRED[kind][1:], "...") for kind in ELEMENT],
    },
}
SYSTEM = f"""You write captions for a program that paints pictures. You get {{source}} and answer \
with one line of JSON and nothing else. The JSON has these keys in this order:
{as_text(_SHAPE)}

- high_level_description: one sentence. Begin with the subject and name what kind of picture it is \
(photograph, poster, logo, oil painting, ...); take a photograph if nothing is said.
- background: everything behind and below the things in the picture: place, ground, walls, sky, \
weather, light. For a poster, a logo or a cover it is the surface of the design itself, never a \
room where the design hangs.
- elements: what stands before the background, the subject first. Use "obj" for a thing, a person \
or an animal, each whole thing once, and "text" for writing. "text" holds the letters exactly as \
they are to be painted.
- desc: twenty to fifty words on colour, material, shape, size and place in the picture (upper \
left, centre, ...). Say what can be seen; leave out moods and praise.

Everything that is asked for appears among the elements, and all words in quotation marks appear \
as "text" elements, letter for letter. Do not add things that do not belong. Decide: one colour, \
one number, one place for each thing. Double quotes around every key and value; no comma before a \
closing bracket."""
USER = "Width to height of the picture: {aspect_ratio}.\nPaint this: {original_prompt}"
_LOOK = "Width to height of the picture: {aspect_ratio}.\nDescribe this picture.{original_prompt}"


def turns(sentence: str, ratio: tuple[int, int], *, picture: bool = False) -> str:
    """The conversation up to where the model answers: instruction, ratio, the sentence.

    With ``picture`` a place for one is held open before the words.
    """
    system, user = _own(picture) if picture else _reference() or _own(False)
    words = f" Change it so: {sentence}" if picture and sentence else sentence
    asked = user.format(aspect_ratio=f"{ratio[0]}:{ratio[1]}", original_prompt=_plain(words))
    return TURNS.format(system=system, user=(PICTURE if picture else "") + asked)


def _own(picture: bool) -> tuple[str, str]:
    source = "a picture" if picture else "an idea for a picture, and its shape,"
    return SYSTEM.replace("{source}", source), _LOOK if picture else USER


def _plain(words: str) -> str:
    """Without the marks that begin and end turns, which would let a sentence speak as the model."""
    return words.replace("<|", "< |")


def _reference() -> tuple[str, str] | None:
    """diffusers' instruction and the turn that follows it; None where it is not installed."""
    try:
        module = importlib.import_module(_DIFFUSERS)
        return module.CAPTION_SYSTEM_MESSAGE, module.CAPTION_USER_TEMPLATE
    except Exception as error:  # a broken installation of it may raise anything
        logger.info("captions are written by this pack's own instruction: %s", error)
        return None
