"""The gates on what we ship, with Triton's compiler, in processes that do not interpret."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ideogram4_quant.cards import block as card_block
from ideogram4_quant.diagnostics import selftest_shapes
from ideogram4_quant.diagnostics.machine_code import building, offline, shipped
from ideogram4_quant.errors import BackendUnavailableError
from ideogram4_quant.ops import blocks
from ideogram4_quant.ops.kernels import configs
from ideogram4_quant.ops.kernels.configs import FEED_FORWARD, HIDDEN

has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="Triton's compiler and its tools are not here",
)


def kernels_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``ideogram4-quant kernels`` in a process that compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    module = "ideogram4_quant.diagnostics.machine_code.cli"
    command = [sys.executable, "-m", module, "kernels", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)


def compiled(*arguments: str, **environment: str) -> dict:
    """The command's JSON; every gate must hold."""
    done = kernels_command("--json", *arguments, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout)


def check_gates(document: dict, archs: set[int]) -> None:
    """The gates, restated on the numbers themselves."""
    reports = [r for r in document["reports"] if r["arch"] in (80, 86, 89)]
    assert {r["arch"] for r in reports} == archs & {80, 86, 89}
    for r in reports:
        name = (r["arch"], r["kernel"], r["label"])
        assert r["stack"] == r["spills"] == 0, name
        assert r["shared"] <= 101376, name
        assert r["blocks_per_sm"] >= 1, name
        if r["kernel"] != "int8_gemm":
            continue
        assert r["loop_imma"] > 0, name
        assert r["loop_ldgsts"] > 0, name
        assert r["loop_ldsm"] > 0, name
        assert r["loop_prmt"] == 0, name
        if r["label"].startswith(("128x256", "256x128")):
            assert r["per_imma"] < 2.2, name


@has_compiler
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_what_the_selftest_runs_at_real_shapes_is_among_what_is_compiled(arch):
    labels = {(v.function, v.label) for v in shipped.variants(arch)}
    assert len(labels) == len(list(shipped.variants(arch)))
    for dtype in ("", " fp16", " fp32"):
        for k in (*selftest_shapes.DEPTHS, selftest_shapes.HALF_DEPTH):
            for m in (16, 200, 1100):
                tile = configs.gemm_candidates(arch, m, k)[0]
                assert ("int8_gemm_kernel", f"{tile}{dtype}") in labels
        for kernel, label in (
            ("quantize_rows", "K 4608 rotation 256"),
            ("quantize_rows", "K 12288 rotation 256"),
            ("quantize_long_rows", "K 53248 rotation 256"),
            ("quantize_rows", "swiglu K 12288 rotation 256"),
            ("rmsnorm_scale_quantize_rows", "K 4608 rotation 256"),
            ("gate_residual_rmsnorm", "K 4608"),
            ("rms_rope", "D 256"),
            ("rms_rope", "D 256 2 x 2"),
        ):
            assert (f"{kernel}_kernel", label + dtype) in labels
    for qtype in ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"):
        long, rows = "dequantize_long_rows_kernel", "dequantize_rotate_quantize_kernel"
        assert (long, f"{qtype} K 53248 rotation 256") in labels
        assert {(rows, f"{qtype} K {k} rotation 256") for k in (4608, 12288)} <= labels
    for qtype in blocks.PACKED:
        found = {("dequantize_kernel", f"{qtype}{dtype}") for dtype in ("", " fp16", " fp32")}
        assert found <= labels


@has_compiler
def test_gates_of_the_gemm_on_a_3090():
    check_gates(compiled("--arch", "86", "--only", "int8_gemm"), {86})


@has_compiler
def test_gates_of_the_row_kernels_on_a_3090():
    document = compiled("--arch", "86", "--only", "rmsnorm")
    check_gates(document, {86})
    assert {r["kernel"] for r in document["reports"]} == {
        "rmsnorm_scale_quantize_rows",
        "gate_residual_rmsnorm",
    }


@has_compiler
@pytest.mark.parametrize("qtype", ["Q4_K", "Q5_1", "Q2_K"])
def test_decoding_to_floats_rounds_products_and_sums_apart_as_the_formula_does(qtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variant = shipped.floats_variant(qtype)
    assert offline.build(variant, 86).report.ffma == 0
    fused = dataclasses.replace(variant, fp_fusion=True)
    assert offline.build(fused, 86).report.ffma > 0


@has_compiler
def test_what_was_compiled_is_read_again_until_its_source_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    work = [(shipped.residual_variant(4608, dtype), 86) for dtype in ("bf16", "fp32")]
    first = list(building.reports(work, folder=tmp_path))
    asked, own = [], building.built
    monkeypatch.setattr(building, "built", lambda work, jobs: asked.append(work) or own(work, jobs))
    assert list(building.reports(work, folder=tmp_path)) == first
    assert asked == [[]]
    assert list(building.reports([(work[0][0], 80), *work], folder=tmp_path))[1:] == first
    assert asked[1:] == [[(work[0][0], 80)]]
    # another source of the kernel, another reader, and a file that was cut off
    key = building._key(*work[0])
    with monkeypatch.context() as patch:
        patch.setattr(offline, "kernel_of", lambda variant: SimpleNamespace(cache_key="edited"))
        assert building._key(*work[0]) != key
    assert building._key(*work[0]) == key
    monkeypatch.setattr(building, "_reader", lambda: "another reader")
    assert list(building.reports(work, folder=tmp_path)) == first
    assert asked[2:] == [work]
    (tmp_path / "machine_code.json").write_bytes(b'{"cut": ')
    assert list(building.reports(work, folder=tmp_path)) == first
    assert asked[3:] == [work]


@has_compiler
def test_dump_leaves_the_cubins(tmp_path):
    done = kernels_command(
        "--arch", "86", "--only", "gate_residual", "--dump", str(tmp_path / "new" / "folder")
    )
    assert done.returncode == 0, done.stderr
    assert "3 kernels compiled, 0 gates broken" in done.stdout
    cubin, listing = sorted((tmp_path / "new" / "folder").iterdir())[:2]
    assert cubin.suffix == ".cubin"
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    assert "EXIT" in listing.read_text()


def test_without_triton_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from ideogram4_quant.diagnostics.machine_code.cli import main\n"
        "sys.exit(main(['kernels', '--arch', '86']))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Triton is not installed" in done.stderr
    assert "triton-windows" in done.stderr


@has_compiler
def test_the_interpreter_and_missing_tools_are_told_apart(monkeypatch, tmp_path):
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailableError, match="Unset TRITON_INTERPRET"):
        offline.require_tools()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BackendUnavailableError, match="without cuobjdump"):
        offline.require_tools()


@has_compiler
@pytest.mark.slow
def test_gates_of_everything_on_every_architecture():
    document = compiled()
    check_gates(document, {80, 86, 89})
    assert {r["arch"] for r in document["reports"]} == set(configs.ARCHITECTURES)
    assert {r["ffma"] for r in document["reports"] if r["kernel"] == "dequantize"} == {0}
    assert document["skipped"] == []


@has_compiler
@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.2.0", "3.6.0", "3.9.0"])
def test_gates_on_other_versions_of_triton(version, tmp_path):
    # Ahead on the path, it hides the pinned one.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*pip, str(tmp_path / "triton"), f"triton=={version}"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"triton {version} cannot be installed here: {done.stderr[-300:]}")
    paths = os.pathsep.join(filter(None, [str(tmp_path / "triton"), os.environ.get("PYTHONPATH")]))
    document = compiled("--arch", "80", "86", "89", PYTHONPATH=paths)
    assert {r["triton"] for r in document["reports"]} == {version}
    check_gates(document, {80, 86, 89})


@has_compiler
@pytest.mark.slow
def test_the_model_of_cards_counts_the_instructions_that_there_are():
    """``cards.block`` states them as constants: those of sm_86, whatever Triton compiles it."""
    rows = (
        (
            card_block._NORM_TO_INT8,
            shipped.rmsnorm_variant(HIDDEN, rotation=256, smooth=False),
            HIDDEN,
        ),
        (card_block._RESIDUAL, shipped.residual_variant(HIDDEN), HIDDEN),
        *(
            (cost, shipped.quantize_variant(k, swiglu=swiglu, rotation=256, smooth=False), k)
            for cost, k, swiglu in (
                (card_block._ROTATE_TO_INT8, HIDDEN, False),
                (card_block._SWIGLU_TO_INT8, FEED_FORWARD, True),
            )
        ),
    )
    for (_, stated), variant, k in rows:
        report = offline.build(variant, 86).report
        counted = report.instructions * report.num_warps * 32 / k
        assert counted == pytest.approx(stated, rel=0.1), variant.function
    tile = configs.gemm_candidates(86, 4608, HIDDEN)[0]
    report = offline.build(shipped.gemm_variant(tile), 86).report
    assert report.instructions - report.loop_instructions <= card_block._EPILOGUE
    # the tensor cores are what the loop waits for: 16 cycles of a partition a product
    assert report.loop_instructions < 16 * report.loop_imma
