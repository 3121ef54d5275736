"""Rules behind inputs: fused blocks, residency, and which outputs are connected."""

from __future__ import annotations

import pytest

from ideogram4_quant.errors import OpError
from ideogram4_quant.nodes import residency
from ideogram4_quant.nodes.connections import leads_anywhere
from ideogram4_quant.nodes.fused_choice import decide
from ideogram4_quant.ops.dispatch import BackendReport

RUNS = (BackendReport("triton", True, "Triton 3.7, sm_86", fuses=True),)
LACKS = (BackendReport("triton", False, "no Triton"),)
KITCHEN = (*LACKS, BackendReport("comfy_kitchen", True, "CUDA", fuses=True))
OLD_KITCHEN = (*LACKS, BackendReport("comfy_kitchen", True, "CUDA"))


@pytest.mark.parametrize(
    ("asked", "backend", "found", "on", "why"),
    [
        ("auto", "auto", RUNS, True, "on: the Triton kernels run here (Triton 3.7, sm_86)"),
        ("auto", "triton", RUNS, True, "on: "),
        ("auto", "auto", LACKS, False, "off: the Triton kernels do not run here (no Triton)"),
        ("auto", "auto", (), False, "off: the Triton kernels do not run here"),
        ("auto", "int_mm", RUNS, False, "off: they gain on the Triton kernels and comfy-kitchen"),
        ("auto", "comfy_kitchen", RUNS, False, "off: "),
        ("auto", "auto", (*RUNS, *KITCHEN), True, "on: the Triton kernels run here"),
        ("auto", "auto", KITCHEN, True, "on: comfy-kitchen's norms run here (CUDA)"),
        ("auto", "comfy_kitchen", KITCHEN, True, "on: comfy-kitchen's norms run here (CUDA)"),
        ("on", "comfy_kitchen", KITCHEN, True, "on, as asked"),
        ("auto", "auto", OLD_KITCHEN, False, "off: the Triton kernels do not run here (no Triton)"),
        ("auto", "comfy_kitchen", OLD_KITCHEN, False, "off: comfy-kitchen's norms do not run here"),
        ("on", "auto", LACKS, True, "on, as asked"),
        ("off", "auto", RUNS, False, "off, as asked"),
        ("off", "comfy_kitchen", RUNS, False, "off, as asked"),
    ],
)
def test_blocks_are_fused_where_the_kernels_run_or_where_asked(asked, backend, found, on, why):
    decision = decide(asked, backend, found)
    assert decision.on is on
    assert decision.why.startswith(why)


def test_fusing_over_a_backend_of_whole_layers_is_refused():
    with pytest.raises(OpError, match=r"multiplies whole layers.*Set fused_blocks to auto or off"):
        decide("on", "comfy_kitchen", RUNS)


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [(30, "both"), (22, "both"), (21, "alternating"), (12, "alternating"), (11, "streamed")],
)
def test_copies_take_turns_where_one_fits_and_are_streamed_where_none_does(memory, chosen):
    assert residency.choose("auto", (10, 10), 2, memory) == chosen


def test_residency_can_be_overridden():
    assert residency.choose("alternating", (1, 1), 0, 100) == "alternating"
    assert residency.choose("both", (10, 10), 2, 12) == "both"


def test_connected_outputs_are_seen():
    graph = {"1": {"inputs": {}}, "2": {"inputs": {"a": ["1", 1], "b": [1, 2, 3], "c": 5}}}
    assert leads_anywhere(graph, "1", 1)
    assert not leads_anywhere(graph, "1", 0)
    assert leads_anywhere(graph, "7", 0)
    assert leads_anywhere(None, "1", 0)
