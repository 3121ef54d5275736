"""INT4 as ComfyUI's container ``convrot_w4a4`` has it: one scale a row of signed 4-bit codes.

The host multiplies it with activations of 4 bits, where the card has such units; so the codes have
no more than a row's scale to tell a loud column from a quiet one, and it is the scale that decides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.feedback import Feedback
from ..ops.gptq import ExactFeedback
from ..ops.grouped import INT4_LIMIT, int4_scales, nearest_int4, pack_codes, unpack_int4
from ..ops.rotation import rotate
from .encodings import Encoding, Shape, follow
from .input_moments import InputMoments

MULTIPLE = 64
"""What a row's length is a multiple of: comfy-kitchen's kernel reads so many codes at a time."""

# Scales that are tried, as shares of the one under which no weight is clipped. A row of 256 to
# 12288 Gaussian weights loses least at 0.75 to 0.55.
_SHARES = tuple(step / 32 for step in range(12, 33))


@dataclass(frozen=True, eq=False)
class ConvrotInt4(Encoding):
    """``W = R(code * scale)``, codes of -7 to 7, R ConvRot's rotation in groups of ``rotation``.

    ``weight`` int8 [N, K / 2], ``weight_scale`` fp32 [N], ``comfy_quant`` the JSON of the host.
    """

    rotation: int = 256
    feedback: Feedback | ExactFeedback | None = None

    @property
    def label(self) -> str:
        return "W4A4"

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = shape
        return {
            "weight": (torch.int8, (rows, columns // 2)),
            "weight_scale": (torch.float32, (rows,)),
        }

    def constants(self) -> dict[str, Tensor]:
        said = {"format": "convrot_w4a4", "convrot_groupsize": self.rotation}
        return {"comfy_quant": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> ConvrotInt4:
        return replace(self, feedback=follow(inputs, None, self.rotation, feedback))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        values = rotate(rows, self.rotation)
        scale = int4_scales(values, _SHARES)
        codes = nearest_int4(values, scale).to(torch.int8)
        if self.feedback is not None:
            found, better = self.feedback.round(
                values, scale[:, None], None, (-INT4_LIMIT, INT4_LIMIT)
            )
            codes = torch.where(better[:, None], found, codes)
        return {"weight": pack_codes(codes & 15, 4), "weight_scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        codes = unpack_int4(parts["weight"]).float()
        return rotate(codes * parts["weight_scale"][:, None], self.rotation)
