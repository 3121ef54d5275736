"""The JSON schema of the captions that the model was trained on: keys, their order, what is needed.

Key order matters: the model has only ever seen one. Sources: the caption format in diffusers'
Ideogram 4 pipeline and the host's caption builder.
"""

from __future__ import annotations

from typing import Any

TOP = (
    "aspect_ratio",
    "high_level_description",
    "style_description",
    "compositional_deconstruction",
)
PHOTO_STYLE = ("aesthetics", "lighting", "photo", "medium", "color_palette")
ART_STYLE = ("aesthetics", "lighting", "medium", "art_style", "color_palette")
COMPOSITION = ("background", "elements")
ELEMENT = {
    "obj": ("type", "bbox", "desc", "color_palette"),
    "text": ("type", "bbox", "text", "desc", "color_palette"),
}
REQUIRED = {
    "compositional_deconstruction": ("background", "elements"),
    "obj": ("type", "desc"),
    "text": ("type", "text", "desc"),
}
BBOX_MAX = 1000


def style_order(style: dict) -> tuple[str, ...]:
    """The trained order of a style's keys: drawings have ``medium`` before ``art_style``."""
    return ART_STYLE if "art_style" in style else PHOTO_STYLE


def kind_of(element: dict) -> str | None:
    """The element's type, one of ``ELEMENT``; None for anything else, which may be of any kind."""
    kind = element.get("type")
    return kind if isinstance(kind, str) and kind in ELEMENT else None


def ordered(caption: dict) -> dict:
    """The caption with known keys in the trained order, unknown ones behind them."""
    out = _in_order(caption, TOP)
    style = out.get("style_description")
    if isinstance(style, dict):
        out["style_description"] = _in_order(style, style_order(style))
    composition = out.get("compositional_deconstruction")
    if isinstance(composition, dict):
        composition = _in_order(composition, COMPOSITION)
        if isinstance(composition.get("elements"), list):
            composition["elements"] = [
                _in_order(e, ELEMENT.get(kind_of(e), ())) if isinstance(e, dict) else e
                for e in composition["elements"]
            ]
        out["compositional_deconstruction"] = composition
    return out


def _in_order(found: dict, order: tuple[str, ...]) -> dict:
    known = {key: found[key] for key in order if key in found}
    return known | {key: value for key, value in found.items() if key not in known}


def written_schema() -> dict[str, Any]:
    """JSON Schema of what a language model writes: keys in order, all needed, one element or more.

    The same language as that of diffusers 0.42's `build_caption_logits_processor`: neither boxes
    nor style.
    """
    text = {"type": "string"}
    kinds = [
        _object({"type": {"const": kind}} | dict.fromkeys(REQUIRED[kind][1:], text))
        for kind in ELEMENT
    ]
    elements = {"type": "array", "items": {"anyOf": kinds}, "minItems": 1}
    composition = _object({"background": text, "elements": elements})
    return _object({"high_level_description": text, "compositional_deconstruction": composition})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
