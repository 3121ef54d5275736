"""What a mixed file takes, known before a weight is read: each storage, and all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .choose import Choice, Linear
from .encodings import Shape, stored_bytes
from .errors import QuantOptionError
from .plan import plan_tensors
from .quantize import SUFFIXES
from .recipes import MIXED, QuantOptions
from .storage import STORAGES, UNQUANTIZED, storage_encoding
from .target_goal import Target
from .target_times import Times


def level_of(container: str) -> str:
    return "mixed GGUF" if container == "gguf" else "mixed"


def sizes(container: str, shape: Shape, int8: Choice | None) -> dict[str, int]:
    """Storage -> bytes, of those that a linear's rows fit."""
    found = {n: storage_encoding(n, container, shape, int8) for n in STORAGES[container]}
    return {n: stored_bytes(e, shape) for n, e in found.items() if e is not None}


def other_bytes(
    container: str,
    options: QuantOptions,
    shapes: Mapping[str, Mapping[str, Shape]],
    targets: Mapping[Linear, Shape],
) -> int:
    """Bytes of the files without the linears that are chosen for: other tensors, headers."""
    everything = {f"{copy}.{module}": UNQUANTIZED for copy, module in targets}
    options = replace(options, storage=everything, calibration=None)
    plans = plan_tensors(MIXED[level_of(container)], options, shapes)
    rest = sum(p.nbytes for p in plans if not p.linear or (p.copy, p.module) not in targets)
    stored = 1 if container == "gguf" else 3  # names a linear has in the header
    entries = len(plans) + (stored - 1) * len(targets)
    return rest + len(shapes) * _HEADER + entries * _HEADER_ENTRY


_HEADER = 1 << 14  # metadata: config, source, choice
_HEADER_ENTRY = 224  # name, type, shape and offsets of a tensor, its name in the choice, padding


def check_target(
    asked: int, said: str, container: str, sizes: Mapping[Linear, Mapping[str, int]], others: int
) -> None:
    """QuantOptionError for a size below the smallest there is."""
    least = others + sum(min(each.values()) for each in sizes.values())
    if asked < least:
        raise QuantOptionError(
            f"the target ({said}) is below the smallest that {SUFFIXES[container]} can be",
            found=f"{asked / 1e9:.4g} GB",
            needed=f"at least {least / 1e9:.4g} GB ({least:,} bytes)",
            hint="Ask for more"
            + ("." if container == "gguf" else ", or for GGUF (--out F.gguf), which goes lower."),
        )


def check_needed(
    target: Target, sizes: Mapping[Linear, Mapping[str, int]], others: int, timed: Times | None
) -> None:
    """QuantOptionError where all linears fit unquantized: the source as it is, rewritten."""
    whole = others + sum(each[UNQUANTIZED] for each in sizes.values())
    slow = timed is not None and timed.of(dict.fromkeys(sizes, UNQUANTIZED)) > target.seconds
    if whole <= target.nbytes and not slow:
        raise QuantOptionError(
            f"everything fits unquantized: nothing is to be chosen for {target.said}",
            found=f"{whole / 1e9:.4g} GB in {UNQUANTIZED}",
            needed=f"less than that, and {target.nbytes / 1e9:.4g} GB is more",
            hint="Use the source as it is; for a smaller file ask for fewer GB or a --level.",
        )
