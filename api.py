"""The library: names that the package keeps, each imported when it is first asked for.

``from ideogram4_quant import open_checkpoint`` and ``ideogram4_quant.api.open_checkpoint`` are one
thing. A function here is that of the module named below, and checks first that each argument is of
the type in its signature: ArgumentTypeError names the one that is not. All errors are
Ideogram4QuantErrors, the same that the commands print.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

# name -> the module that has it
NAMES: dict[str, str] = {
    # files
    "open_checkpoint": "checkpoint",
    "open_encoder": "checkpoint",
    "check_pair": "checkpoint",
    "inspect_file": "quant",
    # making files
    "quantize_checkpoint": "quant",
    "verify_file": "quant",
    "QuantOptions": "quant",
    "Calibration": "quant",
    # running them
    "load_transformer": "engine.transformer",
    "load_encoder": "engine.encoder",
    "load_vae": "engine.vae",
    "load_pipeline": "engine.pipeline",
    "linear": "ops.linear",
    "LinearOptions": "ops.linear",
    # errors
    "Ideogram4QuantError": "errors",
    "ArgumentTypeError": "errors",
    "OpError": "errors",
    "BackendUnavailableError": "errors",
    "CheckpointError": "errors",
    "NotIdeogram4Error": "errors",
    "CorruptFileError": "errors",
    "TruncatedFileError": "errors",
    "MissingBaseError": "errors",
    "PairMismatchError": "errors",
    "QuantOptionError": "quant",
    "AlreadyQuantizedError": "quant",
    "NonFiniteWeightError": "quant",
    "CalibrationError": "quant",
}

__all__ = list(NAMES)


def __getattr__(name: str) -> object:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{NAMES[name]}", __package__)
    found = getattr(module, name)
    value = _checked(found) if inspect.isfunction(found) else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` behind a check of its arguments' types."""
    from .argument_types import check_arguments, types_of

    signature, types = inspect.signature(function), types_of(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function.__name__, signature, types, args, kwargs)
        return function(*args, **kwargs)

    return call
