"""The stored tensors of one weight, by role, with the checks that all formats share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, CorruptFileError
from .files import DOWNLOAD_AGAIN, RawTensor

_MAX_JSON = 1 << 12  # bytes; ComfyUI's and bitsandbytes' descriptions take 300
_USE_INSTEAD = "Use a file in FP8 (fp8_scaled), INT8 (int8_convrot), GGUF or BF16."


@dataclass(frozen=True)
class Parts:
    """Role -> stored tensor of one weight; ``stated`` is what the file's metadata says of it."""

    key: str
    roles: Mapping[str, RawTensor]
    stated: Mapping[str, Any] | None = None

    @property
    def weight(self) -> RawTensor:
        return self.roles["weight"]

    @property
    def nbytes(self) -> int:
        return sum(raw.nbytes for raw in self.roles.values())

    def corrupt(self, message: str, found: object, needed: object) -> CorruptFileError:
        return CorruptFileError(
            message,
            file=self.weight.file.path,
            tensor=self.key,
            found=found,
            needed=needed,
            hint=DOWNLOAD_AGAIN,
        )

    def unsupported(self, what: object, hint: str = _USE_INSTEAD) -> CheckpointError:
        return CheckpointError(
            "this storage format is not supported",
            file=self.weight.file.path,
            tensor=self.key,
            found=what,
            hint=hint,
        )

    def json(self, role: str) -> dict[str, Any]:
        """A JSON object stored as a uint8 tensor, empty if there is none."""
        raw = self.roles.get(role)
        if raw is None:
            return {}
        if raw.dtype != "U8" or raw.nbytes > _MAX_JSON:
            raise self.corrupt(f"{raw.key} is no text", f"{raw.nbytes} bytes of {raw.dtype}", "U8")
        try:
            value = json.loads(raw.read().numpy().tobytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self.corrupt(f"{raw.key} is no usable JSON", error, "JSON") from error
        if not isinstance(value, dict):
            raise self.corrupt(f"{raw.key} is no JSON object", type(value).__name__, "an object")
        return value

    def quantization(self) -> Mapping[str, Any]:
        """ComfyUI's description of the weight: ``comfy_quant``, or the file's metadata."""
        return self.json("conf") or self.stated or {}

    def check_format(self, *known: str) -> None:
        """CheckpointError if ComfyUI's description names another format than ``known``."""
        name = self.quantization().get("format", known[0])
        if name not in known:
            raise self.unsupported(name)

    def rotation(self) -> int | None:
        """Group of the Hadamard rotation of the weight's rows (ConvRot); None without one."""
        conf = self.quantization()
        params = conf.get("params")
        params = params if isinstance(params, dict) else {}
        if not conf.get("convrot", params.get("convrot", False)):
            return None
        group = conf.get("convrot_groupsize", params.get("convrot_groupsize", 256))
        columns = self.weight.shape[-1]
        if type(group) is not int or group < 1 or columns % group:
            raise self.corrupt(
                "unusable rotation group", repr(group)[:40], f"a divisor of {columns}"
            )
        return group

    def scale(self, rows: int) -> Tensor | None:
        """fp32 [] (one for all) or [rows], whatever its stored dtype and trailing ones."""
        raw = self.roles.get("scale")
        if raw is None:
            return None
        scale = self.vector("scale", (1, rows))
        return scale if scale.numel() == rows else scale.reshape(())

    def smooth(self) -> Tensor | None:
        """fp32 [K], meaning ``x / smooth``: stored so, or as its inverse ``pre_quant_scale``."""
        columns = self.weight.shape[-1]
        if "smooth" in self.roles:
            return self.vector("smooth", (columns,))
        if "pre_quant_scale" in self.roles:
            return 1 / self.vector("pre_quant_scale", (columns,))
        return None

    def vector(self, role: str, sizes: tuple[int, ...]) -> Tensor:
        """The tensor of ``role`` as fp32 [n], n in ``sizes`` and every value finite."""
        raw = self.roles[role]
        if raw.dtype not in ("F32", "BF16", "F16") or math.prod(raw.shape) not in sizes:
            raise self.corrupt(
                f"{raw.key} is no {role} of this weight",
                f"{raw.dtype} {list(raw.shape)}",
                f"{' or '.join(map(str, sizes))} floats",
            )
        values = raw.read().float().reshape(-1)
        if not values.isfinite().all():
            raise self.corrupt(f"{raw.key} holds NaN or infinity", "no numbers", "numbers")
        return values


def same_vector(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether both are absent, or equal in every value."""
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
