"""Fidelity and text metrics of one picture, from well-kept libraries.

A metric that cannot be computed has no value, and :func:`missing_packages` says what it lacks; it
is never a silent zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ...errors import OpError
from ...ops.wide import wide

#: PSNR of two equal pictures: a finite stand-in for infinity, so that means stay finite.
PSNR_CAP = 100.0

_MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MS_SSIM_KERNEL = 11
_MS_SSIM_SIDE = _MS_SSIM_KERNEL * (5 - 1) ** 2  # torchmetrics' condition for five scales


@dataclass(frozen=True)
class Metric:
    """What a column of the table is: ``name`` in files, ``label`` for people."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    digits: int = 3


PAIR_METRICS = {
    m.name: m
    for m in (
        Metric("psnr", "PSNR (dB)", "higher", 2),
        Metric("ssim", "SSIM", "higher", 4),
        Metric("ms_ssim", "MS-SSIM", "higher", 4),
        Metric("lpips", "LPIPS", "lower", 4),
        Metric("latent_sqnr", "latent SQNR (dB)", "higher", 2),
    )
}
TEXT_METRICS = {
    m.name: m
    for m in (
        Metric("ocr_exact", "words read", "higher", 3),
        Metric("ocr_distance", "OCR edit distance", "lower", 3),
    )
}
SCORE_METRICS = {
    m.name: m
    for m in (
        Metric("clip", "CLIP", "higher", 2),
        Metric("pickscore", "PickScore", "higher", 2),
        Metric("hpsv2", "HPSv2", "higher", 2),
    )
}
METRICS: Mapping[str, Metric] = {**PAIR_METRICS, **TEXT_METRICS, **SCORE_METRICS}


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 ``[1, 3, H, W]`` in [0, 1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0)


def _same_size(reference: Image.Image, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    if reference.size != picture.size:
        raise OpError(
            "the two pictures differ in size",
            found=f"{picture.width}x{picture.height}",
            needed=f"{reference.width}x{reference.height}",
            hint="Compare pictures of the same prompt list and the same width and height.",
        )
    return to_tensor(reference), to_tensor(picture)


def psnr(reference: Image.Image, picture: Image.Image) -> float:
    """10 log10(1 / mean squared error) over RGB in [0, 1], in dB; at most :data:`PSNR_CAP`."""
    a, b = _same_size(reference, picture)
    error = float(wide(a - b).square().mean())
    return PSNR_CAP if error == 0 else min(PSNR_CAP, -10.0 * math.log10(error))


def ssim(reference: Image.Image, picture: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004), gaussian window of 11 px, by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _same_size(reference, picture)
    return float(structural_similarity_index_measure(b, a, data_range=1.0))


def ms_ssim_scales(width: int, height: int) -> int:
    """How many of MS-SSIM's five scales fit: the window must fit the smallest one.

    torchmetrics asks for more: the side over the square of the number of halvings. So five scales
    need 176 px, though its message says "larger than 160".
    """
    side = min(width, height)
    scales = 1
    while scales < 5 and min(side // 2**scales, side // scales**2) >= _MS_SSIM_KERNEL:
        scales += 1
    return scales


def ms_ssim_note(sizes: Iterable[tuple[int, int]]) -> str | None:
    """Which pictures, as (width, height), have fewer than five scales; None where all have them."""
    few = {size: ms_ssim_scales(*size) for size in sizes}
    said = [f"{n} of 5 scales at {w}x{h}" for (w, h), n in sorted(few.items()) if n < 5]
    if not said:
        return None
    return f"{', '.join(said)} (all five from {_MS_SSIM_SIDE} px a side on)"


def ms_ssim(reference: Image.Image, picture: Image.Image) -> float:
    """Multi-scale SSIM (Wang et al. 2003) with as many of its five scales as the size allows.

    The exponents of the scales in use are normalised to a sum of one.
    """
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as measure,
    )

    a, b = _same_size(reference, picture)
    betas = _MS_SSIM_BETAS[: ms_ssim_scales(*reference.size)]
    total = sum(betas)
    value = measure(b, a, data_range=1.0, betas=tuple(x / total for x in betas), normalize="relu")
    return float(value)


def latent_sqnr(reference: torch.Tensor, latents: torch.Tensor) -> list[float]:
    """10 log10(|reference|^2 / |reference - latents|^2) a step, in dB.

    Both ``[steps, ...]``: the latents after each step, from the same noise.
    """
    if reference.shape != latents.shape:
        raise OpError(
            "the two trajectories differ in shape",
            found=tuple(latents.shape),
            needed=tuple(reference.shape),
        )
    a, b = wide(reference).flatten(1), wide(latents).flatten(1)
    noise = (a - b).square().sum(1)
    ratio = a.square().sum(1) / noise.clamp_min(torch.finfo(torch.float64).tiny)
    return (10.0 * ratio.log10()).clamp(max=PSNR_CAP).tolist()


def normalize_text(text: str) -> str:
    """Case and white space folded: OCR cannot tell a line break from a space."""
    return " ".join(text.upper().split())


def ocr_scores(asked: str, read: str) -> dict[str, float]:
    """Exact match (0 or 1) and Levenshtein distance over the longer length, after folding."""
    from rapidfuzz.distance import Levenshtein

    wanted, found = normalize_text(asked), normalize_text(read)
    return {
        "ocr_exact": float(wanted == found),
        "ocr_distance": Levenshtein.normalized_distance(wanted, found),
    }


def text_asked(prompt: str) -> str | None:
    """The text a JSON caption asks for: its text elements, joined by spaces; ``None`` if none.

    A plain prompt counts as asking for what stands in double quotes.
    """
    try:
        caption = json.loads(prompt)
    except (ValueError, RecursionError):
        quoted = prompt.split('"')[1::2]
        return " ".join(quoted) or None
    if not isinstance(caption, dict):
        return None
    composition = caption.get("compositional_deconstruction")
    elements = composition.get("elements") if isinstance(composition, dict) else None
    texts = [
        e["text"]
        for e in (elements if isinstance(elements, list) else ())
        if isinstance(e, dict) and e.get("type") == "text" and isinstance(e.get("text"), str)
    ]
    return " ".join(texts) or None


PAIR_FUNCTIONS: Mapping[str, Callable[[Image.Image, Image.Image], float]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
}

_PACKAGES = {"ssim": "torchmetrics", "ms_ssim": "torchmetrics", "ocr_exact": "rapidfuzz"}


def missing_packages() -> dict[str, str]:
    """Metric -> the package that it lacks here."""
    return {name: package for name, package in _PACKAGES.items() if find_spec(package) is None}
