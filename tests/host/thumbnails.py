"""Pictures of what comes out of each workflow, painted by the pocket model."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.quant import quantize_checkpoint

from .api_graph import api_graph
from .pocket_variant import pocket_variant
from .server import Server
from .workflows import EXAMPLE

_SIDE, _GAP = 512, 8
_LEVELS = ("Q8_0", "Q4_K")
_WORD = {  # a prompt of its own for each, by a part of the title
    "try it": 0,
    "text to image": 4,
    "8 steps": 6,
    "LoRA": 8,
    "image to image": 10,
    "compare": 12,
    "quantize": 14,
    "half": 16,
}


def prepare(base: Path) -> None:
    """A picture to start from, and the pocket model's files of the compared levels."""
    Image.new("RGB", (128, 64), "gray").save(base / "input" / EXAMPLE)
    folder = base / "models" / "diffusion_models"
    for copy, name in (("cond", "conditional"), ("uncond", "unconditional")):
        for level in _LEVELS:
            out = folder / f"pocket-{level}-{name}.gguf"
            quantize_checkpoint(dit_path(copy), level, out, copy=name)


def thumbnail(server: Server, title: str, workflows: dict[str, dict], path: Path) -> None:
    """Writes the JPEG of the workflow of that title."""
    number = next(number for part, number in _WORD.items() if part in title)
    prompt = HELD_OUT[number]
    if "image to image" in title:
        plain = workflows["Ideogram 4 text to image"]
        before = _run(server, plain, prompt)
        before.save(server.base / "input" / EXAMPLE)
        ink = "yellow" if prompt.ink != "yellow" else "white"
        after = _run(server, workflows[title], replace(prompt, ink=ink), denoise=0.9)
        picture = _beside(before, after)
    elif "compare" in title or "quantize" in title:
        compared = next(w for name, w in workflows.items() if "compare" in name)
        picture = _run(server, compared, prompt)
    else:
        picture = _large(_run(server, workflows[title], prompt))
    picture.convert("RGB").save(path, quality=88)


def _run(server: Server, workflow: dict, prompt, **sampler) -> Image.Image:
    graph = api_graph(pocket_variant(workflow, prompt, seed=prompt.seed, **sampler))
    done = server.run(graph, seconds=600)
    if done.status != "success":
        raise RuntimeError(f"{done.error.get('exception_message')}")
    (image,) = [i for out in done.outputs.values() for i in out.get("images", [])]
    return Image.open(io.BytesIO(server.fetch(image))).convert("RGB")


def _large(picture: Image.Image) -> Image.Image:
    width = _SIDE
    return picture.resize(
        (width, width * picture.height // picture.width), Image.Resampling.LANCZOS
    )


def _beside(*pictures: Image.Image) -> Image.Image:
    """Pictures in a row."""
    large = [_large(picture) for picture in pictures]
    width = sum(p.width for p in large) + _GAP * (len(large) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in large)), "white")
    left = 0
    for picture in large:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet
