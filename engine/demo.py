"""The main job on the pocket model: make every level's files, paint with them, read the words."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OpError
from ..files.new_file import make_folder, replaced
from ..quant import RECIPES, quantize_checkpoint
from ..sampling import preset as preset_of
from ..version import __version__
from .compare.metrics import psnr
from .encoder import load_encoder
from .generate import GenerateRequest, generate
from .loading import load_pair, open_pair
from .sheet import Row, contact_sheet
from .vae import Vae, load_vae

REFERENCE = "BF16"
LEVELS = (REFERENCE, "INT8 W8A8", "INT8 W8A8 rotated", "Q8_0", "Q4_K")


class Prompt(Protocol):
    """What the demo asks of a prompt; `pocket.data.PocketPrompt` is one."""

    word: str
    seed: int
    width: int
    height: int

    @property
    def caption(self) -> str: ...


class Reader(Protocol):
    """What reads a picture; `engine.ocr.WordReader` is one."""

    def read(self, image: Image.Image) -> str: ...


@dataclass(frozen=True)
class Inputs:
    """The bf16 files of both copies, encoder and VAE, and what to paint."""

    conditional: Path
    unconditional: Path
    encoder: Path
    vae: Path
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class LevelReport:
    """One row of the table. ``bytes``: both copies' files; ``seconds``: median of a picture, text
    encoding left out; ``psnr``: mean to the reference in dB, None for the reference itself."""

    level: str
    bytes: int
    seconds: float
    psnr: float | None
    words_right: int
    words: int


@dataclass(frozen=True)
class Painting:
    """One picture and what was read in it."""

    word: str
    read: str
    image: Image.Image
    seconds: float

    @property
    def right(self) -> bool:
        return self.read == self.word


def pocket_inputs(count: int) -> Inputs:
    """The committed pocket model and the first ``count`` of its held-out prompts."""
    from ..pocket.data import HELD_OUT
    from ..pocket.paths import dit_path, encoder_dir, vae_dir

    if not 1 <= count <= len(HELD_OUT):
        raise OpError("number of prompts out of range", found=count, needed=f"1 to {len(HELD_OUT)}")
    inputs = Inputs(
        dit_path("cond"), dit_path("uncond"), encoder_dir(), vae_dir(), HELD_OUT[:count]
    )
    for path in (inputs.conditional, inputs.unconditional, inputs.encoder, inputs.vae):
        if not path.exists():
            raise CheckpointError(
                "a part of the pocket model is missing",
                file=path,
                hint="Install the package whole, or train: python -m ideogram4_quant.pocket.train",
            )
    return inputs


def run(
    out: Path,
    inputs: Inputs | None = None,
    *,
    levels: Sequence[str] = LEVELS,
    preset: str = "default",
    reader: Reader | None = None,
) -> dict:
    """Makes the files of ``levels``, paints every prompt with each, writes all below ``out``.

    ``models/`` holds the files, ``pictures/LEVEL/`` single PNGs, ``contact-sheet.png`` a row a
    level, ``report.json`` what is returned. The first level is the one the others are compared
    with. Progress bars go to stderr, the table to stdout.
    """
    started = time.perf_counter()
    inputs = inputs or pocket_inputs(8)
    if reader is None:
        from .ocr import WordReader

        reader = WordReader()
    out.mkdir(parents=True, exist_ok=True)
    files = _make_files(inputs, levels, out / "models")
    encoder = load_encoder(inputs.encoder, device="cpu")
    features = encoder.encode([p.caption for p in inputs.prompts])
    vae = load_vae(inputs.vae, device="cpu")

    painted: dict[str, list[Painting]] = {}
    steps = preset_of(preset).steps
    with tqdm(total=len(levels) * len(features) * steps, unit="step", dynamic_ncols=True) as bar:
        for level in levels:
            bar.set_description(f"painting {level}")
            pair = open_pair(*files[level])
            painted[level] = _paint(pair, vae, inputs.prompts, features, preset, reader, bar)
            _save(out / "pictures" / slug(level), painted[level])
    reports = [_report(level, files[level], painted[level], painted[levels[0]]) for level in levels]
    with replaced(out / "contact-sheet.png") as part:
        _sheet(reports, painted).save(part)
    result = {
        "levels": [asdict(r) for r in reports],
        "preset": preset,
        "steps": steps,
        "reference": levels[0],
        "pictures": [
            {"level": level, "word": p.word, "read": p.read, "seconds": round(p.seconds, 4)}
            for level in levels
            for p in painted[level]
        ],
        "seconds_in_all": round(time.perf_counter() - started, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "version": __version__,
    }
    with replaced(out / "report.json") as part:
        part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(reports))
    print(f"{out / 'contact-sheet.png'}, {out / 'report.json'}: {result['seconds_in_all']:.0f} s")
    return result


def slug(level: str) -> str:
    """A level's name as a file name."""
    return level.lower().replace(" ", "-")


def _make_files(
    inputs: Inputs, levels: Sequence[str], folder: Path
) -> dict[str, tuple[Path, Path]]:
    """The two files of every level; the reference's are the inputs themselves."""
    folder.mkdir(exist_ok=True)
    files = {}
    sources = {"conditional": inputs.conditional, "unconditional": inputs.unconditional}
    with tqdm(total=2 * len(levels), unit="file", dynamic_ncols=True) as bar:
        for level in levels:
            bar.set_description(f"making {level}")
            if level == REFERENCE:
                files[level] = tuple(sources.values())
                bar.update(2)
                continue
            suffix = RECIPES[level].file_format
            made = []
            for copy, source in sources.items():
                path = folder / f"pocket-{slug(level)}-{copy}.{suffix}"
                quantize_checkpoint(source, level, path, overwrite=True)
                made.append(path)
                bar.update(1)
            files[level] = tuple(made)
    return files


def _paint(
    pair: tuple[Checkpoint, Checkpoint | None],
    vae: Vae,
    prompts: Sequence[Prompt],
    features: Sequence[Tensor],
    preset: str,
    reader: Reader,
    bar: tqdm,
) -> list[Painting]:
    models = load_pair(pair, None, vae, device="cpu")
    paintings = []
    for prompt, text in zip(prompts, features, strict=True):
        request = GenerateRequest(prompt.caption, prompt.width, prompt.height, prompt.seed, preset)
        result = generate(request, models, lambda done, total: bar.update(1), features=text)
        seconds = sum(result.seconds.values())
        read = reader.read(result.image)
        paintings.append(Painting(prompt.word, read, result.image, seconds))
    return paintings


def _save(folder: Path, paintings: Sequence[Painting]) -> None:
    make_folder(folder)
    for number, painting in enumerate(paintings, 1):
        with replaced(folder / f"{number:02d}-{painting.word.lower()}.png") as part:
            painting.image.save(part)


def _report(
    level: str,
    files: Sequence[Path],
    paintings: Sequence[Painting],
    reference: Sequence[Painting],
) -> LevelReport:
    distance = None
    if paintings is not reference:
        pairs = zip(reference, paintings, strict=True)
        distance = round(statistics.fmean(psnr(a.image, b.image) for a, b in pairs), 2)
    return LevelReport(
        level=level,
        bytes=sum(path.stat().st_size for path in files),
        seconds=round(statistics.median(p.seconds for p in paintings), 4),
        psnr=distance,
        words_right=sum(p.right for p in paintings),
        words=len(paintings),
    )


def _sheet(reports: Sequence[LevelReport], painted: dict[str, list[Painting]]) -> Image.Image:
    rows = []
    for report in reports:
        distance = "the reference" if report.psnr is None else f"PSNR {report.psnr:.1f} dB"
        words = f"{report.words_right} of {report.words} words read"
        lines = [f"{report.bytes / 1e6:.1f} MB, {report.seconds:.2f} s", distance, words]
        paintings = painted[report.level]
        remarks = ["" if p.right else f"read: {p.read or 'nothing'}" for p in paintings]
        rows.append(Row(report.level, lines, [p.image for p in paintings], remarks))
    return contact_sheet(rows, [p.word for p in painted[reports[0].level]])


def table(reports: Sequence[LevelReport]) -> str:
    """The levels as lines of text."""
    lines = [f"{'level':<20}{'MB':>8}{'s/picture':>12}{'PSNR dB':>10}{'words':>9}"]
    for r in reports:
        distance = "-" if r.psnr is None else f"{r.psnr:.1f}"
        words = f"{r.words_right}/{r.words}"
        lines.append(
            f"{r.level:<20}{r.bytes / 1e6:>8.1f}{r.seconds:>12.2f}{distance:>10}{words:>9}"
        )
    return "\n".join(lines)
