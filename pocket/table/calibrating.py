"""A calibration of each model of the table, on captions without held-out words."""

from __future__ import annotations

from pathlib import Path

from ...engine.calibrate import Prompt, calibrate
from ...engine.encoder import load_encoder
from ...engine.generate import GenerateRequest
from ...engine.loading import load_pair, open_pair
from ...quant.calibration import Calibration
from ...quant.profiler import ProfilerOptions
from ...quant.provenance import combined_hash, hash_files
from ..data import HEIGHT, WIDTH, prompt_batch
from ..paths import encoder_dir
from .models import Variant, write_model
from .painting import PRESET

PROMPTS = 8


def calibration_of(variant: Variant, work: Path) -> Calibration:
    """The variant's calibration: read from ``work``, or made there (about a core-minute)."""
    files = write_model(variant, work / "models")
    digests = {copy: combined_hash(hash_files([file])) for copy, file in files.items()}
    path = work / "calibrations" / f"{variant.slug}.safetensors"
    if path.is_file():
        known = Calibration.load(path)
        if all(run.models == digests for run in known.provenance):
            return known
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = [prompt.caption for prompt in prompt_batch("calibration", PROMPTS)]
    features = load_encoder(encoder_dir(), device="cpu").encode(captions)
    models = load_pair(open_pair(*files.values()), None, None, device="cpu")
    found = calibrate(
        models,
        [Prompt(text, some) for text, some in zip(captions, features, strict=True)],
        GenerateRequest("", WIDTH, HEIGHT, preset=PRESET),
        digests=digests,
        options=ProfilerOptions(),
    )
    found.save(path, overwrite=True)
    return found
