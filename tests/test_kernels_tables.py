"""Without a compiler: reading of machine code, the tables of tiles and rows, what breaks a gate."""

import dataclasses

import pytest

from ideogram4_quant.diagnostics.machine_code import cli, offline, sass
from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.kernels import configs

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


def test_a_name_that_no_kernel_has_is_no_proof_that_all_pass():
    """A gate over no kernels would hold."""
    pytest.importorskip("triton")
    assert {arch for _, arch in cli._work([86, 120], "int8_gemm")} == {86, 120}
    assert len(cli._work([86], "swiglu")) > 1  # a configuration of quantize_rows
    assert cli._work([], "int8_gemm") == []  # every architecture was skipped, and that is said
    with pytest.raises(OpError, match=r"no such kernel.*--only nothing.*int8_gemm"):
        cli._work([86], "nothing")


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
