"""What goes through files: a calibration of each model, and what the quantizer writes with it.

Calibrated on training captions: no held-out word is among them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ...checkpoint import open_checkpoint
from ...engine.calibrate import Prompt, calibrate
from ...engine.encoder import load_encoder
from ...engine.generate import GenerateRequest
from ...engine.loading import load_pair, open_pair
from ...quant import CalibrationError, QuantOptions, quantize_checkpoint
from ...quant.calibration import Calibration
from ...quant.profiler import ProfilerOptions
from ...quant.provenance import combined_hash, hash_files
from ..data import HEIGHT, WIDTH, prompt_batch
from ..paths import encoder_dir
from .models import Variant, write_model
from .painting import PRESET

PROMPTS = 32
#: A ranking needs no more; the maxima and moments see every token.
MEASURED = ProfilerOptions(tokens=16, channels=64, blocks=())


def calibration_of(variant: Variant, work: Path) -> Calibration:
    """The variant's calibration: read from ``work``, or made there."""
    files = write_model(variant, work / "models")
    digests = {copy: combined_hash(hash_files([file])) for copy, file in files.items()}
    path = work / "calibrations" / f"{variant.slug}-{PROMPTS}.safetensors"
    if path.is_file():
        with suppress(CalibrationError):  # one of an earlier format is made again
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
        options=MEASURED,
    )
    found.save(path, overwrite=True)
    return found


def written(
    variant: Variant, level: str, treatment: str | None, calibration: Calibration, work: Path
) -> dict[str, dict[str, Tensor]]:
    """Copy -> canonical names -> tensors of the safetensors files that the quantizer writes."""
    options = QuantOptions(calibration=calibration, treatment=treatment)
    found = {}
    for copy, source in write_model(variant, work / "models").items():
        out = source.with_name(f"{source.stem}-{level}-{treatment}.safetensors")
        quantize_checkpoint(source, level, out, copy=copy, options=options, overwrite=True)
        found[copy] = open_checkpoint(out, copy=copy).load(copy)
    return found
