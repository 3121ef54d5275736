"""A file that is there already: whether it is what a run would write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from ..checkpoint import open_checkpoint
from .errors import QuantOptionError
from .quantize import metadata_of, plan_quantization
from .recipes import QuantOptions
from .target_files import CopyFile

Progress = Callable[[str, int, int], None]
_LONGEST = 400  # characters of two records that an error shows side by side


def check_finished(file: CopyFile, level: str, options: QuantOptions, progress: Progress) -> None:
    """Raise QuantOptionError unless the output is what this choice writes of this source."""
    plan = plan_quantization(
        file.checkpoint, level, file.out, copy=file.copy, options=options, overwrite=True
    )
    wanted = metadata_of(plan, lambda done, total: progress(file.copy, done, total))
    found = open_checkpoint(file.out, copy=file.copy).tensor_files[0].metadata
    key = next((key for key, value in wanted.items() if found.get(key) != value), None)
    if key is None:
        return
    there, needed = found.get(key), wanted[key]
    key = key.removeprefix("ideogram4.")
    if key == "quantization":
        key, there, needed = _first_difference(there, json.loads(needed))
    raise QuantOptionError(
        f"is there already, and not of this choice: its {key} is another",
        file=file.out,
        found=there,
        needed=needed,
        hint="Replace it (--overwrite), or choose another name.",
    )


def _first_difference(text: object, wanted: Mapping[str, object]) -> tuple[str, object, object]:
    """(key, found, wanted) of two records of a quantization that differ; no long lists."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        return "record", None, None
    keys = sorted({*wanted, *found}, key=lambda key: (key != "prediction", key))
    key = next((key for key in keys if found.get(key) != wanted.get(key)), "record")
    both = found.get(key), wanted.get(key)
    return (key, None, None) if len(str(both)) > _LONGEST else (key, *both)
