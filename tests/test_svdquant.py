"""SVDQuant in ComfyUI's container, against comfy-kitchen's layout of it."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as kitchen
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.tensors import randn, relative

RANK, SAID = 4, {"format": "svdquant_w4a4"}
MODULE = "layers.0.feed_forward.w2"
WIDE = {**files.WIDE, "intermediate_size": 512}


def make(rows: int, columns: int, tiled: bool) -> dict[str, torch.Tensor]:
    """By suffix: random codes, and factors that no two are alike of."""
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(4))
    scale = 0.002 + 0.01 * randn(columns // 64, rows).abs()
    up = 0.1 * randn(rows, RANK, seed=3)
    weight = kitchen._pack_int4_row_major(codes)
    if tiled:  # rows four by four, columns by 64: the inverse of comfy-kitchen's reading
        weight = weight.view(rows // 128, 32, 4, columns // 64, 32).permute(0, 3, 1, 2, 4)
        weight = weight.reshape(rows // 128, columns // 64, 32, 128)
        scale = scale.view(-1, rows // 128, 128).transpose(0, 1)
        up = up.view(rows // 128, 128, RANK).transpose(1, 2)
    return {
        "weight": weight.contiguous(),
        "weight_scale": scale.contiguous(),
        "weight_proj_down": 0.1 * randn(columns, RANK, seed=2),
        "weight_proj_up": up.contiguous(),
        "weight_smooth_factor": 0.5 + randn(columns, seed=5).abs(),
    }


def wanted(parts: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    params = TensorCoreSVDQuantW4A4Layout.Params(
        parts["weight_scale"],
        torch.float32,
        shape,
        parts["weight_proj_down"],
        parts["weight_proj_up"],
        parts["weight_smooth_factor"],
    )
    return TensorCoreSVDQuantW4A4Layout.dequantize(parts["weight"], params)


def write(tmp_path, parts, said=SAID, rename=lambda name: name):
    state = files.fuse(files.split_model(**WIDE))
    del state[f"{MODULE}.weight"]
    stored = state | {f"{MODULE}.{rename(k)}": v for k, v in parts.items()}
    stored[f"{MODULE}.comfy_quant"] = storage.as_json(said)
    return files.save(tmp_path / "ideogram4_cond.safetensors", stored)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
def test_values_are_comfy_kitchens(tmp_path, tiled, prefixed):
    parts = make(256, 512, tiled)
    said = {**SAID, "layout": "kitchen_tile_packed_w4a4"} if tiled else SAID

    def rename(name):
        bare = name.removeprefix("weight_")
        return name if prefixed or bare in ("weight", "scale") else bare

    entry = open_checkpoint(write(tmp_path, parts, said, rename)).entries["conditional"]
    entry = entry[f"{MODULE}.weight"]
    assert entry.level == "SVDQuant W4A4"
    true = wanted(parts, (256, 512))
    found = entry.codecs[0].read(entry.pieces[0]).dense(torch.float32)
    # it multiplies a unit matrix, quantized to 7 steps of 1 / (7 smooth): three roundings more
    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)
    held = entry.read(torch.float32)
    assert isinstance(held, QuantizedTensor)
    assert relative(held.dequantize(), true) < 0.006


@pytest.mark.parametrize(
    ("change", "said", "words"),
    [
        ({}, {"act_unsigned": True}, "act_unsigned True"),
        ({}, {"layout": "rows"}, "layout rows"),
        ({}, {"lowrank_branch_input_basis": "smoothed"}, "lowrank_branch_input_basis smoothed"),
        ({"weight_proj_up": None}, {}, "without its proj_up"),
        ({"weight_proj_up": torch.ones(255, RANK)}, {}, "no proj_up of this weight"),
        ({"weight_scale": torch.ones(7, 256)}, {}, "no scale of this weight"),
        ({"weight": torch.ones(256, 250, dtype=torch.int8)}, {}, "are a matrix"),
    ],
)
def test_what_does_not_fit_is_said_by_the_headers(tmp_path, change, said, words):
    parts = {k: v for k, v in (make(256, 512, False) | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(write(tmp_path, parts, {**SAID, **said}))
    assert MODULE in str(caught.value)


def test_factors_that_are_no_numbers(tmp_path):
    parts = make(256, 512, False) | {"weight_smooth_factor": torch.full((512,), torch.nan)}
    found = open_checkpoint(write(tmp_path, parts))
    with pytest.raises(CheckpointError, match=rf"{MODULE}.*NaN"):
        found.load("conditional")
