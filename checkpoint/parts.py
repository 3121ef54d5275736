"""The stored tensors of one weight, by role, with the checks that all formats share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CheckpointError, CorruptFileError
from ..ops.rotation import is_group
from .files import RawTensor
from .suffixes import SDNQ_CONFIG, whose

_MAX_JSON = 1 << 12  # bytes; ComfyUI's and bitsandbytes' descriptions take 300
DENSE_PRODUCT = "full_precision_matrix_mult"
"""Key of a description: the host is to multiply in 16 bits."""

# Keys of a description that change nothing of the weight: how a host should multiply, where the
# weight came from, what its scales' shape tells too.
_HARMLESS = (DENSE_PRODUCT, "orig_dtype", "per_row", "format_version")
_ROTATION = ("convrot", "convrot_groupsize")
NOT_SUPPORTED = "this storage format is not supported"
WRITTEN_BY = "as ComfyUI 0.33 and comfy-kitchen 0.2.40 write it"
"""Of what the descriptions in ``comfy_quant`` are known."""
# Role -> the format that has such a tensor beside its codes; the first tells
_MARKS = {
    "s_rel": "asym_w4a8_int8",
    "s_channel": "asym_w4a8_int8",
    "scale_2": "nvfp4",
    "scalar": "hybrid_mxfp8",
    "proj_down": "svdquant_w4a4",
    "zeros": "awq_w4a16",
}
USE_INSTEAD = "Use a file in FP8 (fp8_scaled), INT8 (int8_convrot), GGUF or BF16."


@dataclass(frozen=True)
class Parts:
    """Role -> stored tensor of one weight; ``stated`` is what the file's metadata says of it.

    ``others``: tensors beside it that are not understood.
    """

    key: str
    roles: Mapping[str, RawTensor]
    stated: Mapping[str, Any] | None = None
    others: tuple[RawTensor, ...] = ()

    @property
    def weight(self) -> RawTensor:
        return self.roles["weight"]

    @property
    def nbytes(self) -> int:
        return sum(raw.nbytes for raw in self.roles.values())

    def mapped(self, over: Callable[[RawTensor], RawTensor]) -> Parts:
        """The same tensors, each where ``over`` says that it lies."""
        return replace(self, roles={role: over(raw) for role, raw in self.roles.items()})

    def corrupt(self, message: str, found: object, needed: object) -> CorruptFileError:
        return CorruptFileError(
            message,
            file=self.weight.file.path,
            tensor=self.key,
            found=found,
            needed=needed,
            hint=CHECK_DOWNLOAD,
        )

    def unsupported(
        self, what: object, hint: str = USE_INSTEAD, *, needed: str | None = None
    ) -> CheckpointError:
        return CheckpointError(
            NOT_SUPPORTED,
            file=self.weight.file.path,
            tensor=self.key,
            found=what,
            needed=needed,
            hint=hint,
        )

    def variant(self, what: str) -> CheckpointError:
        """The error for a description that is not known: it says of which version others are."""
        version = self.quantization().get("format_version")
        told = "" if version is None else f", format_version {str(version)[:20]}"
        return self.unsupported(f"{what}{told}", needed=WRITTEN_BY)

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

    def check_understood(self, roles: Collection[str]) -> None:
        """CheckpointError for a stored tensor that this weight's format does not use."""
        what = None
        if self.others:
            raw = self.others[0]
            what = told(raw, raw.key.removeprefix(self.key.rpartition(".")[0] + "."))
        for role, raw in self.roles.items():
            if role not in ("weight", "conf", *roles):
                what = what or f"{raw.key} beside {self.weight.dtype} values"
        if what is not None:
            stated = self.quantization().get("format")
            if stated is not None:
                raise self.variant(f"{stated} with {what}")
            known = next((_MARKS[role] for role in _MARKS if role in self.roles), None)
            if known is not None and not self.others:
                raise self.undescribed(known, what)
            raise self.unsupported(what, instead_of(what))

    def undescribed(self, known: str, mark: str) -> CheckpointError:
        """The error for a weight of the format ``known``, by its ``mark``, that nothing describes:
        other tools' NVFP4 has its block scales in another order."""
        return self.unsupported(
            f"{known} without its description: {mark}",
            "The tool that saved it dropped the description: use the file as it was published, or "
            "one in FP8, INT8, GGUF or BF16.",
            needed="comfy_quant beside the weight, or metadata _quantization_metadata",
        )

    def setting(self, name: str, default: Any) -> Any:
        """What the description says of ``name``, at its top or under ``params``."""
        conf = self.quantization()
        params = conf.get("params")
        params = params if isinstance(params, dict) else {}
        return conf.get(name, params.get(name, default))

    def quantization(self) -> Mapping[str, Any]:
        """ComfyUI's description of the weight: ``comfy_quant``, or the file's metadata.

        Raises CorruptFileError where both are there and differ.
        """
        return self._described

    @cached_property
    def _described(self) -> Mapping[str, Any]:
        own, stated = self.json("conf"), self.stated or {}
        if own and stated and _essence(own) != _essence(stated):
            raise self.corrupt(
                "comfy_quant and the metadata say two things of one weight", stated, dict(own)
            )
        return own or stated

    def check_format(self, *known: str, keys: Collection[str] = ()) -> None:
        """CheckpointError if ComfyUI's description names another format than ``known``, or says
        more than ``keys`` and what changes nothing: a value that is off is as good as none."""
        conf = self.quantization()
        if not conf:
            return
        name = conf.get("format", known[0] if known else None)
        if name not in known:
            raise self.variant(f"{name}" if known else f"{name} of {self.weight.dtype} values")
        params = conf.get("params")
        nested = params if isinstance(params, dict) else {}
        if params and not nested:
            raise self.variant(f"{name} with params {str(params)[:40]}")
        for key, value in (*conf.items(), *nested.items()):
            told = key == "orig_shape" and value == list(self.weight.shape)
            if value and not told and key not in ("format", "params", *keys, *_HARMLESS):
                raise self.variant(f"{name} with {key} {str(value)[:40]}")

    def rotation(self) -> int | None:
        """Group of the Hadamard rotation of the weight's rows (ConvRot); None without one."""
        turned, group = _essence(self.quantization())[1:]
        if not turned:
            return None
        columns = self.weight.shape[-1]
        if turned not in (True, 1) or type(group) is not int or group < 1 or columns % group:
            raise self.corrupt(
                "unusable rotation group",
                f"convrot {str(turned)[:40]}, group {str(group)[:40]}",
                f"a divisor of {columns}",
            )
        if not is_group(group):
            raise self.unsupported(f"rotation groups of {group}, which is no power of 4")
        return group

    def scale_blocks(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that have a scale each; None where it is one for all, one
        a row, or none.
        """
        raw, weight = self.roles.get("scale"), self.weight
        if raw is None or len(raw.shape) != 2 or len(weight.shape) != 2 or 0 in raw.shape:
            return None
        (a, b), (n, k) = raw.shape, weight.shape
        if n % a or k % b or (a, b) in ((1, 1), (n, 1), (1, n), (1, k)):
            return None
        return n // a, k // b

    def check_scale(self) -> None:
        """CheckpointError unless the scale, if there is one, is one for all or one a row."""
        raw = self.roles.get("scale")
        if raw is None:
            return
        shape = list(raw.shape)
        while shape and shape[-1] == 1:
            shape.pop()
        rows, columns = self.weight.shape[0], self.weight.shape[-1]
        if shape in ([], [rows]) or (shape == [1, rows] and rows != columns):
            return
        size = math.prod(shape)
        if size in (rows, columns) or (size > 1 and math.prod(self.weight.shape) % size == 0):
            what = "each input channel" if size == columns else "blocks of the weight"
            raise self.unsupported(f"{raw.key} {list(raw.shape)}: scales of {what}")

    def scale(self, rows: int) -> Tensor | None:
        """fp32 [] (one for all) or [rows], whatever its stored dtype and trailing ones."""
        self.check_scale()
        raw = self.roles.get("scale")
        if raw is None:
            return None
        scale = self.vector("scale", (1, rows))
        return scale if scale.numel() == rows else scale.reshape(())

    def matrix(self, role: str) -> Tensor:
        """The tensor of ``role`` as fp32, in its shape, every value finite."""
        shape = self.roles[role].shape
        return self.vector(role, (math.prod(shape),)).reshape(shape)

    def smooth(self) -> Tensor | None:
        """fp32 [K], meaning ``x / smooth``: stored so, or as its inverse ``pre_quant_scale``."""
        columns = self.weight.shape[-1]
        if "smooth" in self.roles:
            return self.vector("smooth", (columns,))
        if "pre_quant_scale" in self.roles:
            return 1 / self.vector("pre_quant_scale", (columns,))
        return None

    def check_vector(self, role: str, sizes: tuple[int, ...]) -> RawTensor:
        """The stored tensor of ``role``; CorruptFileError unless it is floats [n], n in sizes."""
        raw = self.roles[role]
        if raw.dtype not in ("F32", "BF16", "F16") or math.prod(raw.shape) not in sizes:
            raise self.corrupt(
                f"{raw.key} is no {role} of this weight",
                f"{raw.dtype} {list(raw.shape)}",
                f"{' or '.join(map(str, sizes))} floats",
            )
        return raw

    def vector(self, role: str, sizes: tuple[int, ...]) -> Tensor:
        """The tensor of ``role`` as fp32 [n], n in ``sizes`` and every value finite."""
        raw = self.check_vector(role, sizes)
        values = raw.read().float().reshape(-1)
        if not values.isfinite().all():
            raise self.corrupt(f"{raw.key} holds NaN or infinity", "no numbers", "numbers")
        return values


def told(raw: RawTensor, suffix: str) -> str:
    """A tensor that is not understood, and whose it is."""
    return f"{raw.key}, {whose(suffix) or 'which is not understood'}"


def _essence(conf: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(format, whether rotated, in which groups): what a description says of the arithmetic."""
    params = conf.get("params")
    params = params if isinstance(params, dict) else {}
    turned, group = (conf.get(key, params.get(key)) for key in _ROTATION)
    return (
        conf.get("format"),
        turned or False,
        (256 if group is None else group) if turned else None,
    )


def same_vector(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether both are absent, or equal in every value."""
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def instead_of(what: str) -> str:
    """What the user can do about a tensor that :func:`told` describes."""
    if SDNQ_CONFIG in what:
        return f"Copy {SDNQ_CONFIG} of the model's page into this folder."
    return USE_INSTEAD
