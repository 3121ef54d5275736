"""Styles that a list offers, each as the ``style_description`` of a caption."""

from __future__ import annotations

NONE = "as the text says"


def _photo(aesthetics: str, lighting: str, photo: str) -> dict[str, str]:
    return {
        "aesthetics": aesthetics,
        "lighting": lighting,
        "photo": photo,
        "medium": "photograph",
    }


def _art(aesthetics: str, lighting: str, medium: str, art_style: str) -> dict[str, str]:
    return {
        "aesthetics": aesthetics,
        "lighting": lighting,
        "medium": medium,
        "art_style": art_style,
    }


STYLES: dict[str, dict[str, str] | None] = {
    NONE: None,
    "photograph": _photo("natural colours, fine detail", "soft daylight", "35mm, eye level"),
    "portrait photograph": _photo(
        "calm, natural skin", "soft window light from one side", "85mm, f/2, head and shoulders"
    ),
    "product photograph": _photo(
        "clean, sharp edges, one colour behind", "even studio light", "100mm macro, f/8"
    ),
    "film still": _photo("composed, muted colours", "one strong side light", "35mm film, wide"),
    "poster": _art(
        "bold shapes, few colours, much contrast",
        "flat, without shadows",
        "graphic_design",
        "printed poster, large type, clear hierarchy",
    ),
    "logo": _art(
        "simple, centred, two colours", "flat, without shadows", "graphic_design", "vector logo"
    ),
    "flat illustration": _art(
        "simple forms, limited palette", "flat", "illustration", "flat vector illustration"
    ),
    "book illustration": _art(
        "detailed, gentle colours", "soft", "illustration", "ink lines with watercolour"
    ),
    "anime": _art("clean lines, clear colours", "cel shading", "illustration", "anime key visual"),
    "oil painting": _art(
        "visible brush strokes", "light from one side", "painting", "oil on canvas"
    ),
    "watercolour": _art("transparent washes, paper grain", "soft", "painting", "watercolour"),
    "3D render": _art(
        "smooth materials, clean geometry", "three-point studio light", "3d_render", "3D render"
    ),
    "pixel art": _art("hard edges, few colours", "flat", "illustration", "16-bit pixel art"),
}
