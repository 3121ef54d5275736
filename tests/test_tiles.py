"""Tiles of the int8 product: which ones are measured at load, and which one then runs."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.ops import dispatch
from ideogram4_quant.ops.kernels import configs
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.ops.tuning import choices
from ideogram4_quant.ops.tuning.choices import TILE, Key, Measurement, Table
from ideogram4_quant.ops.tuning.tuning_jobs import Layer, jobs

gemm = pytest.importorskip("ideogram4_quant.ops.kernels.gemm", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("nothing_measured")

CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch):
    """The Triton kernels as on a GPU: the CPU's table is that of sm_86."""
    triton = dispatch.Backend("triton", {"rms_rope": print, "int8_gemm": print})
    probes = {**dispatch._PROBES, "triton": lambda device: (triton, "fake")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    monkeypatch.setattr(dispatch, "_ORDER", {"cpu": ("triton", "int_mm")})


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_class_has_tiles_to_choose_from_and_no_tile_is_dead(arch):
    for kind, m in (("wide", 4608), ("flat", 256), ("thin", 16)):
        listed = configs.GEMM_CONFIGS[arch][kind]
        assert configs.gemm_candidates(arch, m, 4608) == listed
        assert len({str(tile) for tile in listed}) == len(listed) > 1
        assert all(tile.block_m <= max(m, 64) for tile in listed)


def test_without_a_measurement_the_first_of_the_table_runs():
    wide = configs.GEMM_CONFIGS[86]["wide"]
    assert gemm._tile(4608, 13824, 4608, CPU) is wide[0]
    assert gemm._tile(4608, 13824, 64 * 73, CPU).block_k == 64
    assert gemm._tile(4608, 13824, 100, CPU) is None


@pytest.mark.parametrize("best", configs.GEMM_CONFIGS[86]["wide"], ids=str)
def test_the_fastest_measured_tile_runs_for_its_weight_and_class(best):
    tiles = configs.GEMM_CONFIGS[86]["wide"]
    seconds = {str(tile): 1.0 if tile is best else 2.0 for tile in tiles}
    key = Key(TILE, 13824, 4608, 1536, "bfloat16", "wide")
    choices.remember(CPU, Table([Measurement(key, {"a tile of old": 0.1, **seconds})]))
    assert gemm._tile(4608, 13824, 4608, CPU) is best
    assert gemm._tile(4608, 12288, 4608, CPU) is tiles[0]  # another weight
    assert gemm._tile(200, 13824, 4608, CPU) is configs.GEMM_CONFIGS[86]["flat"][0]


def test_loading_measures_the_tiles_before_it_measures_backends(kernels):
    layers = [Layer("int8", 13824, 4608, 256)]
    found = list(jobs(layers, CPU, torch.bfloat16, LinearOptions(), None, 10**9))
    of_tiles = [job.key for job in found if job.key.op == TILE]
    # a CPU is measured at 512 tokens, and there the classes of few rows too
    assert [(key.tokens, key.detail) for key in of_tiles] == [
        (512, "wide"),
        (256, "flat"),
        (16, "thin"),
    ]
    assert [job.key.op for job in found][: len(of_tiles)] == [TILE] * len(of_tiles)
    assert "tiles of the int8 product 4608 -> 13824, 512 tokens, bfloat16, wide" in map(
        str, of_tiles
    )
    for job in found[:3]:
        assert set(job.make(job.key.tokens)) == set(job.candidates)
        assert job.nbytes < 10**9


def test_without_the_kernels_no_tile_is_measured():
    layers = [Layer("int8", 13824, 4608, 256)]
    found = jobs(layers, CPU, torch.float32, LinearOptions(), None, 10**9)
    assert not any(job.key.op == TILE for job in found)
