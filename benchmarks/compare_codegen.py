"""Our int8 GEMM beside comfy-kitchen's Triton kernel: the same offline compilation of both.

    python benchmarks/compare_codegen.py [--arch 86]

Prints the rows of a Markdown table for the Triton that is installed. Needs comfy-kitchen.
"""

from __future__ import annotations

import argparse
import sys

from ideogram4_quant.diagnostics.machine_code import offline, shipped
from ideogram4_quant.ops.kernels import configs


def comfy_kitchen_reports(arch: int) -> list[offline.Report]:
    """Its kernel with a scale per channel, in every configuration that it tunes over."""
    from comfy_kitchen.backends.triton import quantization

    tuned = quantization._int8_matmul_dequant_per_row_kernel
    pointers = {"a_ptr": "*i8", "b_ptr": "*i8", "c_ptr": "*bf16"}
    pointers |= {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    sizes = ("m", "n", "k", "stride_am", "stride_bn", "stride_cm")
    signature = pointers | dict.fromkeys(sizes, "i32")
    # What its launcher makes the JIT specialize: unit strides, and all but m a multiple of 16.
    unit = dict.fromkeys(("stride_ak", "stride_bk", "stride_cn"), 1)
    reports = []
    for config in tuned.configs:
        tile = config.kwargs
        label = f"{tile['block_m']}x{tile['block_n']}x{tile['block_k']} "
        label += f"{config.num_warps} warps {config.num_stages} stages"
        variant = offline.Variant(
            module="",
            function="comfy-kitchen",
            label=label,
            signature=signature,
            constants=unit | tile | {"has_bias": True},
            divisible=tuple(name for name in signature if name != "m"),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        reports.append(offline.build(variant, arch, kernel=tuned.fn).report)
    return reports


def our_reports(arch: int) -> list[offline.Report]:
    """``int8_gemm`` in every tiling for many rows."""
    tilings = configs.GEMM_CONFIGS[arch]["wide"]
    return [offline.build(shipped.gemm_variant(c), arch).report for c in tilings]


def main(argv: list[str] | None = None) -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=86, choices=configs.ARCHITECTURES)
    arch = parser.parse_args(argv).arch
    print(
        "| Triton | kernel | tile | registers | stack, B | spills | smem, B | PRMT | instr/IMMA |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for owner, reports in (("ours", our_reports), ("comfy-kitchen", comfy_kitchen_reports)):
        try:
            found = reports(arch)
        except RuntimeError as error:  # up to 3.2, @autotune asks for a driver at import
            print(f"{owner} cannot be imported here: {error}", file=sys.stderr)
            return 1
        for r in found:
            cells = (r.triton, owner, r.label, r.registers, r.stack, r.spills, r.shared)
            cells += (r.loop_prmt, f"{r.per_imma:.2f}")
            print("| " + " | ".join(map(str, cells)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
