"""Modelled time of one 1024 px image in 48 steps on an RTX 3090: nothing here was measured.

    python benchmarks/model_3090.py [--text-tokens 512] [--json]

The kernels are compiled for sm_86 and their machine code is counted. A GEMM takes what its busiest
unit takes (tensor cores, instruction issue or shared memory), in whole waves of tiles; a row kernel
takes the longer of its bytes and its instructions; attention its floating point operations. Every
bound is divided by a stated efficiency. Denoising alone: the text encoder and the VAE, once an
image, come on top; launches are taken to hide behind the work before them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from ideogram4_quant.diagnostics.machine_code import offline, shipped
from ideogram4_quant.ops.kernels import configs

ARCH = 86

# GeForce RTX 3090 (GA102): 82 multiprocessors of 4 partitions at the boost clock; 284 TOPS of
# dense INT8 and 71 TFLOPS of bf16 with fp32 sums follow from the clock. GDDR6X: 936 GB/s.
MULTIPROCESSORS, PARTITIONS, CLOCK = 82, 4, 1.695e9
IMMA_CYCLES = 16  # a partition multiplies 16 x 8 x 32 in so many
SHARED_BYTES_PER_CYCLE = 128
BF16_FLOPS = 71e12
BANDWIDTH = 936e9


@dataclass(frozen=True)
class Efficiency:
    """Share of each bound that a real kernel is taken to reach."""

    gemm: float = 0.70
    attention: float = 0.60
    bandwidth: float = 0.80


@dataclass(frozen=True)
class Model:
    """Ideogram 4: one copy's layers, and the steps of the preset."""

    layers: int = 34
    hidden: int = shipped.HIDDEN
    feed_forward: int = shipped.FEED_FORWARD
    steps: int = 48

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linears of a block."""
        h, f = self.hidden, self.feed_forward
        return {"qkv": (3 * h, h), "o": (h, h), "w1": (f, h), "w3": (f, h), "w2": (h, f)}


@dataclass
class Seconds:
    """Time of an image by what it goes into."""

    gemm: float = 0.0
    attention: float = 0.0
    rows: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.gemm + self.attention + self.rows + self.decode


@dataclass(frozen=True)
class Level:
    """How the weights lie: the format that is decoded at every use, and the protected layers."""

    name: str
    blocks: str | None = None  # GGUF format, decoded to rotated int8 before each GEMM
    rotation: int = 256
    smooth: bool = False
    protected_w2: int = 0  # of the layers of a copy, in bf16


LEVELS = (
    Level("INT8 W8A8 rotated"),
    Level("INT8 W8A8, 17 of 34 w2 in bf16", rotation=0, smooth=True, protected_w2=17),
    Level("Q8_0, decoded to rotated INT8", blocks="Q8_0"),
    Level("Q4_K, decoded to rotated INT8", blocks="Q4_K"),
)


@cache
def report(make: Callable[..., offline.Variant], *args: object, **options: object):
    """The machine code of a shipped variant."""
    return offline.build(make(*args, **options), ARCH).report


# ---- bounds, in seconds


def gemm_seconds(m: int, n: int, k: int, config: configs.GemmConfig) -> float:
    """Whole waves of tiles, each as long as its busiest unit."""
    code = report(shipped.gemm_variant, config)
    warps = config.num_warps
    tensor = code.loop_imma * warps / PARTITIONS * IMMA_CYCLES
    issue = code.loop_instructions * warps / PARTITIONS
    # ldmatrix.x4 reads 512 B a warp; cp.async writes 16 B a thread.
    shared = (code.loop_ldsm + code.loop_ldgsts) * 512 * warps / SHARED_BYTES_PER_CYCLE
    loop = max(tensor, issue, shared) * (k // config.block_k)
    around = (code.instructions - code.loop_instructions) * warps / PARTITIONS
    tiles = math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
    waves = math.ceil(tiles / (MULTIPROCESSORS * code.blocks_per_sm))
    return waves * code.blocks_per_sm * (loop + around) / CLOCK


def bf16_gemm_seconds(m: int, n: int, k: int) -> float:
    """At the peak of the tensor cores: cuBLAS, whose code is not ours to count."""
    return 2 * m * n * k / BF16_FLOPS


def row_seconds(rows: int, values: int, bytes_per_value: float, code: offline.Report) -> float:
    """The longer of the memory traffic and the instructions of one program a row."""
    issue = rows * code.instructions * code.num_warps / (MULTIPROCESSORS * PARTITIONS * CLOCK)
    return max(traffic_seconds(rows * values * bytes_per_value), issue)


def traffic_seconds(nbytes: float) -> float:
    """At the peak of the memory."""
    return nbytes / BANDWIDTH


def attention_seconds(tokens: int, hidden: int) -> float:
    """Two products of tokens x tokens x hidden in bf16."""
    return 4 * tokens**2 * hidden / BF16_FLOPS


# ---- one forward of one copy


@dataclass
class Forward:
    """Adds up the layers of one forward of ``tokens`` tokens."""

    tokens: int
    level: Level
    model: Model
    efficiency: Efficiency
    seconds: Seconds = field(default_factory=Seconds)

    def run(self) -> Seconds:
        """All layers; ``protected_w2`` of them with w2 in bf16."""
        for layer in range(self.model.layers):
            self._attention()
            self._feed_forward(protected=layer < self.level.protected_w2)
        return self.seconds

    def _attention(self) -> None:
        h, level = self.model.hidden, self.level
        self._norm_to_int8()
        self._linear("qkv")
        self._traffic(2 * 2 * 2 * h)  # norm and rotary embedding of q and k, read and written
        seconds = attention_seconds(self.tokens, h)
        self.seconds.attention += seconds / self.efficiency.attention
        self._rows(
            h,
            2 + 1,
            report(
                shipped.quantize_variant,
                h,
                swiglu=False,
                rotation=level.rotation,
                smooth=level.smooth,
            ),
        )
        self._linear("o")
        self._gated_residual()

    def _feed_forward(self, protected: bool) -> None:
        f, level = self.model.feed_forward, self.level
        self._norm_to_int8()
        self._linear("w1")
        self._linear("w3")
        if protected:
            self._traffic((2 + 2 + 2) * f)
            n, k = self.model.linears()["w2"]
            self.seconds.gemm += bf16_gemm_seconds(self.tokens, n, k) / self.efficiency.gemm
        else:
            code = report(
                shipped.quantize_variant,
                f,
                swiglu=True,
                rotation=level.rotation,
                smooth=level.smooth,
            )
            self._rows(f, 2 + 2 + 1, code)
            self._linear("w2")
        self._gated_residual()

    def _linear(self, name: str) -> None:
        n, k = self.model.linears()[name]
        config = configs.gemm_candidates(ARCH, self.tokens, k)[0]
        seconds = gemm_seconds(self.tokens, n, k, config)
        self.seconds.gemm += seconds / self.efficiency.gemm
        if self.level.blocks:
            from ideogram4_quant.ops.blocks import FORMATS

            packed = FORMATS[self.level.blocks].row_bytes(k) / k
            code = report(
                shipped.dequantize_variant, k, self.level.blocks, rotation=self.level.rotation
            )
            seconds = row_seconds(n, k, packed + 1, code)
            self.seconds.decode += seconds / self.efficiency.bandwidth

    def _norm_to_int8(self) -> None:
        h, level = self.model.hidden, self.level
        code = report(shipped.rmsnorm_variant, h, rotation=level.rotation, smooth=level.smooth)
        self._rows(h, 2 + 1, code)

    def _gated_residual(self) -> None:
        h = self.model.hidden
        self._rows(h, 2 + 2 + 2, report(shipped.residual_variant, h))

    def _rows(self, values: int, bytes_per_value: float, code: offline.Report) -> None:
        seconds = row_seconds(self.tokens, values, bytes_per_value, code)
        self.seconds.rows += seconds / self.efficiency.bandwidth

    def _traffic(self, bytes_per_token: float) -> None:
        seconds = traffic_seconds(self.tokens * bytes_per_token)
        self.seconds.rows += seconds / self.efficiency.bandwidth


def image_seconds(
    level: Level,
    *,
    text_tokens: int = 512,
    image_tokens: int = 4096,
    model: Model = Model(),
    efficiency: Efficiency = Efficiency(),
) -> Seconds:
    """Every step runs both copies: text and image tokens, image tokens alone."""
    total = Seconds()
    for tokens in (image_tokens + text_tokens, image_tokens):
        once = Forward(tokens, level, model, efficiency).run()
        for name, value in vars(once).items():
            setattr(total, name, getattr(total, name) + model.steps * value)
    return total


def table(results: Mapping[str, Seconds], efficiency: Efficiency, text_tokens: int) -> str:
    """Markdown, marked as modelled."""
    head = (
        f"MODELLED, not measured: RTX 3090, 1024 px (4096 image tokens, {text_tokens} of text), "
        f"48 steps of both copies, at {efficiency.gemm:.0%} of the GEMM bound, "
        f"{efficiency.attention:.0%} of bf16 attention, {efficiency.bandwidth:.0%} of bandwidth "
        "and issue. Seconds an image, denoising alone."
    )
    lines = [head, "", "| level | GEMM | attention | row kernels | decoding | total |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, s in results.items():
        parts = (s.gemm, s.attention, s.rows, s.decode, s.total)
        lines.append(f"| {name} | " + " | ".join(f"{part:.1f}" for part in parts) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    results = {level.name: image_seconds(level, text_tokens=args.text_tokens) for level in LEVELS}
    if args.json:
        rows = {name: vars(s) | {"total": s.total} for name, s in results.items()}
        print(json.dumps({"modelled": True, "seconds": rows}, indent=1))
    else:
        print(table(results, Efficiency(), args.text_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
