"""SVDQuant in ComfyUI's container (``svdquant_w4a4``): int4 codes beside a low-rank part.

``W = code * scale / smooth_factor + (proj_down @ proj_up.T).T``, natural (codes int8 [N, K / 2],
the even column in the low bits; scale [K / 64, N]) or in tiles of 128 rows. comfy-kitchen 0.2.40
has the layout and its kernels for NVIDIA GPUs, which multiply int4 activations; it cannot quantize,
so that no patch could be written back. Here such a weight is held as Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .anew import encoded_anew
from .codecs import Stored
from .parts import Parts

FORMAT = "svdquant_w4a4"
_GROUP, _TILE = 64, 128  # columns that share a scale; rows of a tile
_TILED = "kitchen_tile_packed_w4a4"
# What a description may say, and the one value of it that the formula above is for
_SETTINGS = {"layout": (_TILED,), "lowrank_branch_input_basis": ("raw",)}
_HARMLESS = ("proj_down_smooth_folded",)  # into what is stored as proj_down


@dataclass(frozen=True)
class SvdQuant(Stored):
    """``values``: W, fp32 [N, K]."""

    ROLES = ("scale", "proj_down", "proj_up", "smooth_factor")
    values: Tensor

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.quantization().get("format") == FORMAT

    @classmethod
    def level(cls, parts: Parts) -> str:
        for key, known in _SETTINGS.items():
            if parts.setting(key, known[0]) not in known:
                raise parts.variant(f"{FORMAT} with {key} {str(parts.setting(key, ''))[:40]}")
        parts.check_format(FORMAT, keys=(*_SETTINGS, *_HARMLESS))
        for role in cls.ROLES:
            if role not in parts.roles:
                raise parts.corrupt(f"{FORMAT} without its {role}", "none", f"weight_{role}")
        rows, columns = cls.shape(parts)
        rank = math.prod(parts.roles["proj_down"].shape) // columns
        sizes = (rows * columns // _GROUP, rank * columns, rank * rows, columns)
        for role, size in zip(cls.ROLES, sizes, strict=True):
            parts.check_vector(role, (size,))
        return "SVDQuant W4A4"

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        stored = parts.weight.shape
        fits = parts.weight.dtype in ("I8", "U8") and math.prod(stored) > 0
        if len(stored) == 4 and stored[2:] == (_TILE // 4, 4 * _GROUP // 2) and fits:
            return stored[0] * _TILE, stored[1] * _GROUP
        if len(stored) != 2 or stored[1] * 2 % _GROUP or not fits:
            found = f"{parts.weight.dtype} {list(stored)}"
            raise parts.corrupt(f"codes of {FORMAT} are a matrix", found, "I8 [N, K / 2]")
        return stored[0], stored[1] * 2

    @classmethod
    def read(cls, parts: Parts) -> SvdQuant:
        (rows, columns), packed = cls.shape(parts), parts.weight.read().view(torch.uint8)
        groups = columns // _GROUP
        scale, up = parts.matrix("scale"), parts.matrix("proj_up")
        if packed.dim() == 4:  # [N / 128, K / 64, 32, 4 rows of 32 bytes]
            packed = packed.view(-1, groups, _TILE // 4, 4, _GROUP // 2).permute(0, 2, 3, 1, 4)
            scale = scale.view(-1, groups, _TILE).transpose(0, 1)
            up = up.view(rows // _TILE, -1, _TILE).transpose(1, 2)
        packed = packed.reshape(rows, columns // 2)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=2)
        codes = ((nibbles ^ 8).to(torch.int8) - 8).view(rows, groups, _GROUP)
        values = (codes * scale.reshape(groups, rows).t()[..., None]).view(rows, columns)
        down = parts.matrix("proj_down").reshape(columns, -1)
        values = values / parts.vector("smooth_factor", (columns,))
        return cls(values.addmm_(up.reshape(rows, -1), down.t()))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return encoded_anew(self.values, dtype, FORMAT)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    @classmethod
    def stack(cls, items: Sequence[SvdQuant]) -> SvdQuant:
        return cls(torch.cat([item.values for item in items]))
