"""The offline proof: reading of machine code, the tables, and the gates on what we ship."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from ideogram4_quant.cards import block as card_block
from ideogram4_quant.diagnostics.machine_code import cli, offline, sass, shipped
from ideogram4_quant.errors import BackendUnavailableError
from ideogram4_quant.ops.kernels import configs
from ideogram4_quant.ops.kernels.configs import FEED_FORWARD, HIDDEN

PROGRAM = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R3] ;
.L_x_0:
        /*0030*/                   IMMA.16832.S8.S8 R12, R8.ROW, R4.COL, R12 ;
        /*0040*/                   IMMA.16832.S8.S8 R16, R8.ROW, R6.COL, R16 ;
        /*0050*/               @P1 PRMT R4, R4, 0x7610, R5 ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/                   STL [R1], R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_parse_reads_opcodes_predicates_and_labels():
    program = sass.parse(PROGRAM)
    counts = program.counts()
    assert counts["IMMA"] == 2
    assert counts["PRMT"] == counts["STL"] == counts["LDSM"] == 1
    assert counts["NOP"] == 0
    assert program.labels == {".L_x_1": 0x20, ".L_x_0": 0x30, ".L_x_2": 0xB0}
    assert program.instructions[1].opcode == "LDG.E.128"
    assert program.instructions[1].name == "LDG"


def test_the_main_loop_is_the_one_with_the_matrix_instructions_and_all_around_them():
    body = sass.parse(PROGRAM).main_loop()
    # Both loops hold both IMMAs; the outer one is what runs for them.
    assert [i.address for i in body] == list(range(0x20, 0x90, 0x10))
    assert sass.mma_count(sass.count(body)) == 2


def test_a_program_without_loops_has_no_main_loop():
    assert sass.parse(PROGRAM.split(".L_x_1")[0]).main_loop() == ()
    assert sass.parse("").counts().total() == 0


def test_resources_come_from_cuobjdump():
    usage = "Function kernel:\n REG:231 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:412 TEXTURE:0"
    assert sass.resources(usage) == {"REG": 231, "STACK": 16, "SHARED": 0, "LOCAL": 0}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (86, 255, 98304, 8, 1),  # shared memory: 96 KiB of 100
        (86, 255, 49152, 4, 2),
        (86, 168, 0, 4, 3),  # registers: 168 * 128 threads three times
        (86, 32, 0, 4, 12),  # warps: 48
        (86, 16, 0, 1, 16),  # blocks
        (86, 32, 101377, 4, 0),  # more than a block may have
        (80, 32, 101377, 4, 1),
        (90, 255, 147456, 8, 1),
    ],
)
def test_blocks_per_multiprocessor(arch, registers, shared, warps, blocks):
    assert sass.blocks_per_sm(arch, registers, shared, warps) == blocks


@pytest.mark.parametrize("k", [1, 7, 16, 100, 256, 512, 1000, 4096, 4608, 12288, 13824, 16384])
def test_a_row_is_covered_by_two_powers_of_two(k):
    cover = configs.row_config(k)
    assert cover.head + cover.tail >= k
    assert cover.head + cover.tail < 2 * k or k < 16
    for block in (cover.head, cover.tail):
        assert block & (block - 1) == 0
        # A rotation group never crosses from the head to the tail.
        assert k % 256 or block % 256 == 0
    assert cover.num_warps & (cover.num_warps - 1) == 0
    assert 1 <= cover.num_warps <= 16


def test_the_model_s_rows_are_covered_without_padding():
    for k in (4608, 12288, 4096):
        cover = configs.row_config(k)
        assert cover.head + cover.tail == k


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 16, 17, 256, 257, 4608])
def test_every_depth_that_is_a_multiple_of_64_has_a_tiling(arch, m):
    for k in (64, 128, 192, 4608, 12288, 53248):
        candidates = configs.gemm_candidates(arch, m, k)
        assert candidates
        assert all(k % config.block_k == 0 for config in candidates)
    for k in (0, 32, 100, 4640):
        assert configs.gemm_candidates(arch, m, k) == ()


@pytest.mark.parametrize(
    ("capability", "table"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (121, 120)]
)
def test_a_gpu_uses_the_table_of_its_family(capability, table):
    assert configs.table_architecture(capability) == table


@pytest.mark.parametrize("capability", [75, 70, 61, 100, 103])
def test_a_gpu_of_no_checked_family_is_refused(capability):
    with pytest.raises(ValueError, match=f"sm_{capability}"):
        configs.table_architecture(capability)


def test_a_triton_that_does_not_know_a_gpu_is_not_asked_to_compile_for_it():
    assert configs.unsupported_by("3.2.0", 90) is None
    assert configs.unsupported_by("3.3.0", 120) is None
    assert configs.unsupported_by("3.10.0+git", 120) is None
    assert "3.2.0 does not know sm_120" in configs.unsupported_by("3.2.0", 120)


GOOD = offline.Report(
    kernel="int8_gemm",
    label="128x256x128 8 warps 3 stages",
    arch=86,
    triton="3.7.1",
    registers=215,
    stack=0,
    spills=0,
    shared=98304,
    blocks_per_sm=1,
    num_warps=8,
    instructions=1424,
    ffma=0,
    imma=384,
    hmma=0,
    ldgsts=24,
    ldsm=80,
    loop_instructions=229,
    loop_imma=128,
    loop_prmt=0,
    loop_ldgsts=12,
    loop_ldsm=40,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "local memory"),
        ({"spills": 2}, "local memory"),
        ({"shared": 101380}, "shared memory"),
        ({"blocks_per_sm": 0}, "no block fits"),
        ({"loop_prmt": 1}, "PRMT"),
        ({"loop_instructions": 282}, "2.20 instructions an IMMA"),
        ({"loop_instructions": 282, "label": "256x128x64 8 warps"}, "instructions an IMMA"),
    ],
)
def test_each_gate_can_break(change, message):
    assert cli.broken_gates(GOOD) == []
    broken = cli.broken_gates(dataclasses.replace(GOOD, **change))
    assert len(broken) == 1
    assert message in broken[0]
    assert broken[0].startswith("sm_86 int8_gemm")
    elsewhere = cli.broken_gates(dataclasses.replace(GOOD, arch=90, **change))
    assert len(elsewhere) == (message == "local memory")


def test_small_tiles_are_not_held_to_the_instruction_count():
    small = dataclasses.replace(GOOD, label="16x128x128 4 warps", loop_instructions=600)
    assert cli.broken_gates(small) == []


# ---- with Triton's compiler, in processes that do not interpret

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
    """The issue's gates, restated on the numbers themselves."""
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
    from ideogram4_quant.diagnostics import selftest_shapes
    from ideogram4_quant.diagnostics.machine_code import shipped
    from ideogram4_quant.ops import blocks

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
    from ideogram4_quant.diagnostics.machine_code import shipped

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variant = shipped.floats_variant(qtype)
    assert offline.build(variant, 86).report.ffma == 0
    fused = dataclasses.replace(variant, fp_fusion=True)
    assert offline.build(fused, 86).report.ffma > 0


@has_compiler
def test_what_was_compiled_is_read_again_until_its_source_changes(tmp_path, monkeypatch):
    from ideogram4_quant.diagnostics.machine_code import building, shipped

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    work = [(shipped.residual_variant(4608, dtype), 86) for dtype in ("bf16", "fp32")]
    first = list(building.reports(work, folder=tmp_path))
    asked, own = [], building.built
    monkeypatch.setattr(building, "built", lambda work, jobs: asked.append(work) or own(work, jobs))
    assert list(building.reports(work, folder=tmp_path)) == first
    assert asked == [[]]
    assert list(building.reports([(work[0][0], 80), *work], folder=tmp_path))[1:] == first
    assert asked[1:] == [[(work[0][0], 80)]]
    # another source of the kernel, and a file that was cut off
    kernel = offline.kernel_of(work[0][0])
    monkeypatch.setattr(building, "_reader", lambda: "another reader")
    assert list(building.reports(work, folder=tmp_path)) == first
    assert asked[2:] == [work]
    assert kernel.cache_key != offline.kernel_of(shipped.rope_variant(interleaved=True)).cache_key
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
