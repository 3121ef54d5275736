"""How many held-out words come out readable: `python -m ideogram4_quant.pocket.evaluate`.

The reference sampler in torch, OCR by rapidocr. `--truth` reads the true renderings instead.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.ocr import WordReader
from .data import HELD_OUT, PocketPrompt, tiled_picture
from .encoder import CaptionEncoder
from .transformer import DEFAULT_GUIDANCE, sample, sigmas

PRESETS = {
    "quality": ((7.0,) * 45 + (3.0,) * 3, 0.0, 1.5),
    "default": (DEFAULT_GUIDANCE, 0.0, 1.75),
    "turbo": ((7.0,) * 11 + (3.0,), 0.5, 1.75),
    "instant": ((1.0,) * 8, 0.0, 1.75),  # by the one branch, as those below
    "fast": ((1.0,) * 20, 0.0, 1.75),
}
_ONE_BRANCH = ("instant", "fast")


def to_pictures(x: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> pictures."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]


def contact_sheet(pictures: Sequence[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """The pictures side by side, `scale` times as large, on gray."""
    w, h = (side * scale for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + 4), rows * (h + 4)), (128, 128, 128))
    for i, picture in enumerate(pictures):
        place = (i % columns * (w + 4) + 2, i // columns * (h + 4) + 2)
        sheet.paste(picture.resize((w, h), Image.Resampling.NEAREST), place)
    return sheet


def noise_for(prompts: Sequence[PocketPrompt]) -> Tensor:
    """[B, 32, 128]: each prompt's own noise, as diffusers draws it from the seed."""
    rows = [torch.Generator().manual_seed(p.seed) for p in prompts]
    return torch.cat([torch.randn(1, 32, 128, generator=g) for g in rows])


@dataclass
class Pocket:
    """Everything that makes pictures: encoder, both copies or the one branch, VAE."""

    encoder: CaptionEncoder
    cond: torch.nn.Module
    uncond: torch.nn.Module | None
    vae: torch.nn.Module

    def decode(self, tokens: Tensor, rows: int = 4, columns: int = 8) -> Tensor:
        """Tokens [B, N, 128] -> pictures [B, 3, H, W], as diffusers' pipeline decodes."""
        from .latents import BN_EPS, unpack

        std = (self.vae.bn.running_var + BN_EPS).sqrt()
        z = unpack(tokens * std + self.vae.bn.running_mean, rows, columns)
        with torch.no_grad():
            return self.vae.decode(z, return_dict=False)[0]

    def paint(
        self,
        prompts: Sequence[PocketPrompt],
        guidance: Sequence[float] = DEFAULT_GUIDANCE,
        mu: float = 0.0,
        std: float = 1.75,
        batch: int = 16,
    ) -> list[Image.Image]:
        """One 128 x 64 picture a prompt."""
        pictures, schedule = [], sigmas(len(guidance), mu, std)
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            features, lengths = self.encoder([p.caption for p in some])
            noise = noise_for(some)
            x = sample(self.cond, self.uncond, features, lengths, noise, guidance, schedule)
            pictures += to_pictures(self.decode(x))
        return pictures


def load_pocket(root: Path | None = None) -> Pocket:
    """The committed weights in fp32."""
    from .export import load_encoder, load_transformer, load_vae
    from .paths import WEIGHTS

    root = root or WEIGHTS
    return Pocket(
        load_encoder(root),
        load_transformer("cond", root),
        load_transformer("uncond", root),
        load_vae(root),
    )


def load_one_branch(root: Path | None = None) -> Pocket:
    """The same with the distilled one branch, which needs no guidance."""
    from .export import load_encoder, load_transformer, load_vae
    from .paths import WEIGHTS

    root = root or WEIGHTS
    return Pocket(load_encoder(root), load_transformer("one_branch", root), None, load_vae(root))


def words_right(pictures: Sequence[Image.Image], prompts: Sequence[PocketPrompt]) -> list[str]:
    """Reads every picture; the list holds "" for a word read exactly, else what was read."""
    reader = WordReader()
    read = [reader.read(p) for p in pictures]
    return ["" if r == p.word else r or "?" for r, p in zip(read, prompts, strict=True)]


def truth_is_readable() -> list[str]:
    """The held-out words of which OCR misreads one of three true renderings: must be empty."""
    reader, rng = WordReader(), random.Random(0)
    pictures = [[tiled_picture(p, rng) for _ in range(3)] for p in HELD_OUT]
    read = [reader.read_all(to_pictures(torch.tensor(np.stack(some)))) for some in pictures]
    return [p.word for p, texts in zip(HELD_OUT, read, strict=True) if set(texts) != {p.word}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", action="store_true", help="read the true renderings")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--guidance", type=float, help="one factor for all steps")
    parser.add_argument("--sheet", type=Path, help="write the pictures to this PNG")
    parser.add_argument("--weights", type=Path, help="another weights folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.truth:
        wrong = truth_is_readable()
        print(json.dumps({"held_out": len(HELD_OUT), "misread": wrong}))
        return
    guidance, mu, std = PRESETS[args.preset]
    if args.guidance is not None:
        guidance = (args.guidance,) * len(guidance)
    load = load_one_branch if args.preset in _ONE_BRANCH else load_pocket
    pictures = load(args.weights).paint(HELD_OUT, guidance, mu, std)
    wrong = words_right(pictures, HELD_OUT)
    if args.sheet:
        contact_sheet(pictures, 8).save(args.sheet)
    misread = {p.word: w for p, w in zip(HELD_OUT, wrong, strict=True) if w}
    print(json.dumps({"words": len(wrong), "right": wrong.count(""), "misread": misread}))


if __name__ == "__main__":
    main()
