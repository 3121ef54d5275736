"""The launchers through Triton's own specialization, compiled for an RTX 3090 that is not there.

A stand-in for the driver answers what the JIT asks, and every launch stops after compiling. It
would leave its cubins in the JIT's caches, so ``test_kernels.py`` runs this file in a process of
its own, with KERNELS_STUB_DRIVER=1.
"""

import os

import pytest
import torch

from ideogram4_quant.ops import kernels
from ideogram4_quant.ops.blocks import FORMATS
from ideogram4_quant.tests.watch import Watch

if os.environ.get("KERNELS_STUB_DRIVER") != "1":
    pytest.skip("run by test_kernels.py, in a process of its own", allow_module_level=True)


class StubDriver:
    """An RTX 3090 without a GPU: enough for ``JITFunction.run`` to specialize and compile."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 86, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The kernels compiled by the launches of a test: (name, constants, metadata)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(StubDriver())
    found = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, options, kernel.metadata))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


BF16 = torch.bfloat16


@pytest.mark.parametrize("m", [1, 77])
def test_row_kernels(compiled, m):
    x, weight = torch.zeros(m, 4608, dtype=BF16), torch.ones(4608, dtype=BF16)
    modulations = (weight, torch.ones(1, 1, 4608), torch.ones(1, m, 4608, dtype=BF16))
    with Watch():  # nothing waits for the device
        kernels.smooth_rotate_quantize_rows(x, torch.ones(4608), 256)
        kernels.swiglu_quantize_rows(x, x)
        for modulation in modulations:
            kernels.rmsnorm_scale_quantize_rows(x[None], weight, modulation, 1e-5, None, 256)
            kernels.gate_residual_rmsnorm(x[None], modulation, x[None], weight, 1e-5)
    assert [name for name, _, _ in compiled[:2]] == ["quantize_rows_kernel"] * 2
    assert len(compiled) == 8
    for _, options, metadata in compiled:
        assert (options["HEAD"], options["TAIL"]) == (4096, 512)
        assert metadata.num_warps == 8


@pytest.mark.parametrize(
    ("m", "k", "tile"),
    [(1, 4608, (16, 128, 128)), (77, 64, (64, 128, 64)), (4097, 4608, (128, 256, 128))],
)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_gemm_takes_the_tiling_of_the_table(compiled, m, k, tile, biased):
    q = torch.zeros(m, k, dtype=torch.int8)
    weight = torch.zeros(24, k, dtype=torch.int8)
    bias = torch.zeros(24, dtype=BF16) if biased else None
    scales = torch.ones(m), torch.ones(24, 1)
    with Watch(torch.int8) as watch:  # the weight is read in place
        out = kernels.int8_gemm(q, scales[0], weight, scales[1], bias, BF16)
    assert watch.largest == 0
    assert out.shape == (m, 24)
    (name, options, metadata) = compiled[0]
    assert name == "int8_gemm_kernel"
    assert (options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]) == tile
    assert metadata.shared <= 101376


def test_q_and_k_are_read_where_they_lie(compiled):
    q, k, _ = torch.zeros(1, 77, 3, 18, 256, dtype=BF16).unbind(2)
    weight, table = torch.ones(256, dtype=BF16), torch.ones(1, 77, 1, 128, 2, 2)
    plain = torch.ones(1, 77, 128), torch.zeros(1, 77, 128)
    matrices = table[:, :, 0, :, 0, 0], table[:, :, 0, :, 1, 0]
    for cos, sin in (plain, matrices):
        with Watch() as watch:
            kernels.rms_rope(q, k, weight, weight, cos, sin, 1e-5)
        assert watch.largest <= 77 * 18 * 256  # the two results alone
    assert [name for name, _, _ in compiled] == ["rms_rope_kernel"] * 2
    assert {options["HALF"] for _, options, _ in compiled} == {128}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_decoding_to_floats(compiled, dtype, monkeypatch):
    from ideogram4_quant.ops.kernels import gguf_floats

    monkeypatch.setattr(gguf_floats, "_as_formula", lambda *_: True)
    blocks = torch.zeros(7, FORMATS["Q6_K"].row_bytes(4608), dtype=torch.uint8)
    with Watch(torch.uint8) as watch:  # blocks are read in place
        found = kernels.dequantize(blocks, "Q6_K", (7, 4608), dtype)
    assert watch.largest == 0
    assert (found.shape, found.dtype) == ((7, 4608), dtype)
    assert compiled[0][0] == "dequantize_kernel"
    assert not compiled[0][2].enable_fp_fusion


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("k", [4608, 53248])
def test_decoding(compiled, qtype, k):
    blocks = torch.zeros(3, FORMATS[qtype].row_bytes(k), dtype=torch.uint8)
    with Watch(torch.uint8) as watch:  # blocks stay packed, and are read in place
        q, scale = kernels.dequantize_rotate_quantize(blocks, qtype, (3, k), 256)
    assert watch.largest == 0
    assert q.shape == (3, k)
    assert scale.shape == (3,)
    assert compiled[0][1]["FORMAT"] == qtype
