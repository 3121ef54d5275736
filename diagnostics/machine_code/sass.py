"""Reading machine code: instructions, the main loop, occupancy. Text in, counts out; no Triton.

The text is what ``nvdisasm -c`` prints: one instruction a line behind its address in a comment,
labels on lines of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_[\w$]+):")
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)(?P<args>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L_[\w$]+)\)")
_RESOURCE = re.compile(r"(REG|STACK|LOCAL|SHARED):(\d+)")

INTEGER_MMA = ("IMMA", "IGMMA")
FLOAT_MMA = ("HMMA", "HGMMA", "QMMA", "QGMMA", "OMMA")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its opcode with modifiers, its operands."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: ``LDG`` of ``LDG.E.128``."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Program:
    """The instructions of one kernel and the addresses of its labels."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def counts(self) -> Counter[str]:
        """How often each opcode (without modifiers) stands in the program, padding left out."""
        return count(self.instructions)

    def main_loop(self) -> tuple[Instruction, ...]:
        """The loop body with most matrix instructions, or with most instructions; () if none."""
        bodies = [self._between(*span) for span in self._loops()]
        if not bodies:
            return ()
        return max(bodies, key=lambda body: (mma_count(count(body)), len(body)))

    def _loops(self) -> list[tuple[int, int]]:
        """Address ranges that end in a branch back to their beginning."""
        spans = []
        for instruction in self.instructions:
            match = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
            target = self.labels.get(match.group(1)) if match else None
            # A kernel ends in a branch to itself, which is padding, not a loop.
            if target is not None and target < instruction.address:
                spans.append((target, instruction.address))
        return spans

    def _between(self, first: int, last: int) -> tuple[Instruction, ...]:
        return tuple(i for i in self.instructions if first <= i.address <= last)


def parse(disassembly: str) -> Program:
    """Read the output of ``nvdisasm -c`` for one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
            continue
        if match := _INSTRUCTION.search(line):
            address = int(match["address"], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            instructions.append(Instruction(address, match["op"], match["args"]))
    return Program(tuple(instructions), labels)


def count(instructions: Sequence[Instruction]) -> Counter[str]:
    """Opcodes without modifiers; NOPs, which only pad, are left out."""
    return Counter(i.name for i in instructions if i.name != "NOP")


def mma_count(counts: Counter[str]) -> int:
    """Integer and floating point matrix instructions together."""
    return sum(counts[name] for name in INTEGER_MMA + FLOAT_MMA)


def resources(usage: str) -> dict[str, int]:
    """``REG``, ``STACK``, ``LOCAL``, ``SHARED`` from ``cuobjdump -res-usage``, in bytes."""
    return {name: int(value) for name, value in _RESOURCE.findall(usage)}


@dataclass(frozen=True)
class Limits:
    """What a streaming multiprocessor holds: shared memory in bytes, warps, blocks."""

    shared: int
    shared_per_block: int
    warps: int
    blocks: int
    registers: int = 65536


# CUDA C++ Programming Guide, table of technical specifications per compute capability.
LIMITS = {
    80: Limits(shared=167936, shared_per_block=166912, warps=64, blocks=32),
    86: Limits(shared=102400, shared_per_block=101376, warps=48, blocks=16),
    89: Limits(shared=102400, shared_per_block=101376, warps=48, blocks=24),
    90: Limits(shared=233472, shared_per_block=232448, warps=64, blocks=32),
    120: Limits(shared=102400, shared_per_block=101376, warps=48, blocks=24),
}


def blocks_per_sm(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """How many blocks of a kernel a multiprocessor of ``sm_arch`` holds; 0 if not even one.

    Registers are given out to warps in units of 256, shared memory in units of 128 B, of which the
    system takes 1 KiB a block.
    """
    limits = LIMITS[arch]
    if shared > limits.shared_per_block:
        return 0
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // per_warp // num_warps
    by_shared = limits.shared // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, limits.warps // num_warps, limits.blocks)
