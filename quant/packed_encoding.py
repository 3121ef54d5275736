"""W4A8 and W6A8 as ComfyUI's container ``asym_w4a8_int8`` has them; see ``ops.grouped``.

Weights are rotated; a group of columns gets the scale that loses least of it, by alternating least
squares, and codes are rounded to the levels of that scale, with a calibration so that errors of
correlated inputs cancel. Levels of 4-bit codes are those of the best 16 for a Gaussian.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.codes import GRID_LIMIT, Levels
from ..ops.feedback import Feedback
from ..ops.gptq import ExactFeedback
from ..ops.grouped import SCALE_FLOOR, SIX_BIT_LIMIT, int8_grid, pack_codes
from ..ops.rotation import rotate
from .encodings import Encoding, Shape, follow
from .input_moments import InputMoments

# The host's kernel for few tokens has these levels built in, so a table of another tensor's own
# would run slower there. They are the best for a Gaussian, which rotated weights are.
CODEBOOK = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
_PASSES = 4  # of alternating least squares: four more move a scale by 0.003 % on average
_E4M3 = torch.float8_e4m3fn
_E4M3_LARGEST = 0x7E  # bits of the largest e4m3 number
_NEIGHBOURS = (0, -1, 1, -2, 2)  # steps of the stored scale, an eighth to a sixteenth each


@dataclass(frozen=True, eq=False)
class PackedInt8(Encoding):
    """``bits`` 4 or 6, ``group`` columns a scale, rotated in groups of ``rotation``.

    ``weight`` int8 [N, K * bits / 8], ``weight_s_rel`` e4m3 [N, K / group], ``weight_s_channel``
    fp32 [N], ``weight_codebook`` fp32 [16] for 4 bits, ``comfy_quant`` the JSON of the host.
    """

    bits: int = 4
    group: int = 16
    rotation: int = 256
    feedback: Feedback | ExactFeedback | None = None

    @property
    def label(self) -> str:
        return f"W{self.bits}A8 g{self.group}"

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = shape
        return {
            "weight": (torch.int8, (rows, columns * self.bits // 8)),
            "weight_s_rel": (_E4M3, (rows, columns // self.group)),
            "weight_s_channel": (torch.float32, (rows,)),
        }

    def constants(self) -> dict[str, Tensor]:
        said = {
            "format": "asym_w4a8_int8",
            "group_size": self.group,
            "convrot_groupsize": self.rotation,
        }
        text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        table = {"weight_codebook": torch.tensor(CODEBOOK)} if self.bits == 4 else {}
        return {"comfy_quant": text, **table}

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> PackedInt8:
        return replace(self, feedback=follow(inputs, None, self.rotation, feedback, self.group))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        values = rotate(rows, self.rotation)
        scale = self._scales(values)
        channel = (scale.amax(1) * self._largest / GRID_LIMIT).clamp_min(SCALE_FLOOR)
        relative = self._stored_scales(values, (scale / channel[:, None]).to(_E4M3), channel)
        codes, relative = self._codes(values, relative, channel)
        offset = 0 if self.bits == 4 else SIX_BIT_LIMIT + 1
        return {
            "weight": pack_codes(codes.short() + offset, self.bits),
            "weight_s_rel": relative,
            "weight_s_channel": channel,
        }

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        table = torch.tensor(CODEBOOK).to(parts["weight"].device) if self.bits == 4 else None
        grid = int8_grid(parts["weight"], parts["weight_s_rel"], table, self.group)
        return rotate(grid.float() * parts["weight_s_channel"][:, None], self.rotation)

    @property
    def _largest(self) -> float:
        """The largest level in magnitude."""
        return max(map(abs, CODEBOOK)) if self.bits == 4 else SIX_BIT_LIMIT

    def _levels(self, relative: Tensor) -> Levels:
        grid = relative.float()
        if self.bits == 6:
            return Levels((-SIX_BIT_LIMIT, SIX_BIT_LIMIT), grid=grid)
        table = torch.tensor(CODEBOOK).to(grid.device)
        return Levels((0, len(CODEBOOK) - 1), table, grid)

    def _scales(self, values: Tensor) -> Tensor:
        """fp32 [N, K / group]: of a group, the factor of the levels that loses least of it."""
        grouped = values.unflatten(1, (-1, self.group))
        scale = (grouped.abs().amax(2) / self._largest).clamp_min(SCALE_FLOOR)
        for _ in range(_PASSES):
            level = self._nearest(grouped / scale[..., None])
            share = (grouped * level).sum(2) / level.square().sum(2).clamp_min(SCALE_FLOOR)
            scale = share.clamp_min(SCALE_FLOOR)
        return scale

    def _stored_scales(self, values: Tensor, relative: Tensor, channel: Tensor) -> Tensor:
        """e4m3 [N, K / group]: of each scale and its neighbours, the one whose levels, rounded to
        the int8 grid, lose least of the group.
        """
        wanted = (values / channel[:, None]).unflatten(1, (-1, self.group))
        bits = relative.view(torch.uint8).int()
        best, least = relative, torch.full_like(channel[:, None], torch.inf)
        for move in _NEIGHBOURS:
            tried = (bits + move).clamp(0, _E4M3_LARGEST).to(torch.uint8).view(_E4M3)
            options = self._options(tried.float())
            place = _nearest_of(options, wanted.reshape(-1, self.group))
            level = options.gather(1, place).view(wanted.shape)
            lost = (level - wanted).square().sum(2)
            better = lost < least
            least = torch.where(better, lost, least)
            kept = torch.where(better, tried.view(torch.uint8), best.view(torch.uint8))
            best = kept.view(_E4M3)
        return best

    def _options(self, grid: Tensor) -> Tensor:
        """fp32 [groups, levels] ascending: the int8 values that a group's codes stand for."""
        if self.bits == 4:
            table = torch.tensor(CODEBOOK).to(grid.device)
        else:
            table = torch.arange(-SIX_BIT_LIMIT, SIX_BIT_LIMIT + 1.0, device=grid.device)
        return (table * grid.reshape(-1, 1)).round_().clamp_(-GRID_LIMIT, GRID_LIMIT)

    def _nearest(self, values: Tensor) -> Tensor:
        if self.bits == 6:
            return values.round().clamp(-SIX_BIT_LIMIT, SIX_BIT_LIMIT)
        table = torch.tensor(CODEBOOK).to(values)
        return table[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]

    def _codes(self, values: Tensor, relative: Tensor, channel: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8 [N, K], their scales as ``relative``): those of the feedback where it expects
        less error of a row. It refits the scales to what it rounds.
        """
        levels = self._levels(relative)
        step = levels.grid * channel[:, None]
        nearest = self._to_grid(values, levels, channel)
        if self.feedback is None:
            return nearest, relative
        if not isinstance(self.feedback, ExactFeedback):
            codes, better = self.feedback.round(values, step, None, levels)
            return torch.where(better[:, None], codes, nearest), relative
        fitted = relative.view(torch.uint8).clone()

        def refit(group: int, target: Tensor) -> Tensor:
            target = target.to(values.device)
            scale = (self._scales(target) / channel[:, None]).to(_E4M3)
            stored = self._stored_scales(target, scale, channel)
            fitted[:, group] = stored.view(torch.uint8)[:, 0]
            return stored.float()[:, 0]

        codes, better = self.feedback.round(values, step, None, levels, refit)
        better = better[:, None]
        fitted = torch.where(better, fitted, relative.view(torch.uint8)).view(_E4M3)
        return torch.where(better, codes, nearest), fitted

    def _to_grid(self, values: Tensor, levels: Levels, channel: Tensor) -> Tensor:
        """The codes whose decoded values, on the int8 grid, are nearest."""
        wanted = (values / channel[:, None]).view(-1, self.group)
        place = _nearest_of(self._options(levels.grid), wanted).view(values.shape)
        return (place + levels.limits[0]).to(torch.int8)


def _nearest_of(options: Tensor, wanted: Tensor) -> Tensor:
    """Places nearest to ``wanted`` [groups, columns] in ``options`` [groups, levels], ascending."""
    middles = (options[:, 1:] + options[:, :-1]) / 2
    return torch.searchsorted(middles, wanted.contiguous())
