"""The names of the levels, and the order in which ``auto`` tries them on a kind of device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

AUTO = "auto"
SAME = "same as the conditional"
MIXED = ("mixed", "mixed GGUF")
"""What the quantizer writes for a size: each linear at a level of its own, as the file says."""
LEVELS = (
    "BF16",
    "FP8",
    "INT8 blockwise",
    "INT8 W8A8 rotated",
    "INT8 W8A8",
    "MXFP8",
    "Q8_0",
    "SDNQ 8-bit",
    "W6A8",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "W4A8",
    "Q4_K",
    "IQ4_NL",
    "IQ4_XS",
    "Q4_1",
    "Q4_0",
    "SDNQ 4-bit",
    "NVFP4",
    "INT4 W4A4",
    "SVDQuant W4A4",
    "AWQ W4A16",
    "NF4",
    "MXFP4",
    "Q3_K",
    "Q2_K",
    *MIXED,
)
# Last everywhere: there are better types of their size, or (Q3_K, Q2_K) their loss shows.
_RARE = ("Q5_1", "Q5_0", "IQ4_NL", "Q4_1", "MXFP4", "Q3_K", "Q2_K")
# What auto tries, by capability. Where there are int8 matrix units, int8 is the fastest; 16-bit
# products come next, and in float32, where bfloat16 is missing, they crawl, so what runs as W8A8
# goes before Q8_0. Without int8 units every level costs a dense product, so the most faithful comes
# first. NVFP4 is less faithful than every other type of its size (see docs/pocket-table.md): before
# them only where the device multiplies it.
_INT8_FIRST = ("INT8 W8A8 rotated", "INT8 W8A8")
_LARGE = ("FP8", "INT8 blockwise", "BF16")
AUTO_ORDER = {
    "fp4, int8 and bfloat16": (  # NVIDIA from Blackwell (RTX 50) on
        *_INT8_FIRST,
        *MIXED,
        "MXFP8",
        *("Q8_0", "SDNQ 8-bit", "Q6_K", "W6A8", "Q5_K", "NVFP4", "W4A8", "Q4_K", "IQ4_XS"),
        *("Q4_0", "SDNQ 4-bit", "AWQ W4A16", "NF4", "INT4 W4A4", "SVDQuant W4A4", *_LARGE, *_RARE),
    ),
    "int8 and bfloat16": (  # NVIDIA from Ampere (RTX 30) on
        *_INT8_FIRST,
        *MIXED,
        *("Q8_0", "SDNQ 8-bit", "Q6_K", "W6A8", "MXFP8", "Q5_K", "W4A8", "Q4_K", "IQ4_XS"),
        *(
            "Q4_0",
            "SDNQ 4-bit",
            "AWQ W4A16",
            "NVFP4",
            "NF4",
            "INT4 W4A4",
            "SVDQuant W4A4",
            *_LARGE,
            *_RARE,
        ),
    ),
    "int8 alone": (  # NVIDIA Turing (RTX 20), CPUs
        *_INT8_FIRST,
        *MIXED,
        *("W6A8", "Q5_K", "W4A8", "Q4_K", "IQ4_XS", "Q4_0", "Q8_0", "SDNQ 8-bit", "Q6_K"),
        *(
            "MXFP8",
            "SDNQ 4-bit",
            "AWQ W4A16",
            "NVFP4",
            "NF4",
            "INT4 W4A4",
            "SVDQuant W4A4",
            *_LARGE,
            *_RARE,
        ),
    ),
    "neither": (  # every other device
        "BF16",
        *(
            "Q8_0",
            "SDNQ 8-bit",
            "FP8",
            "INT8 blockwise",
            "MXFP8",
            *reversed(MIXED),
            "Q6_K",
            "W6A8",
            "Q5_K",
            "Q4_K",
            "IQ4_XS",
            "Q4_0",
            "SDNQ 4-bit",
            "W4A8",
        ),
        *("AWQ W4A16", "NVFP4", "NF4", *_INT8_FIRST, "INT4 W4A4", "SVDQuant W4A4", *_RARE),
    ),
}

# What auto pairs with a lower level, the most faithful first (docs/pairs.md, docs/pocket-table.md).
PAIRED = (
    "BF16",
    "Q8_0",
    "INT8 W8A8 rotated",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "IQ4_XS",
    "NF4",
    "Q3_K",
    "Q2_K",
)


def two_levels(order: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(conditional, unconditional) levels that auto may pair, in the order in which it tries them.

    The conditional copy is the more faithful one, and stands before the other in ``order``, a value
    of `AUTO_ORDER`. Two copies' errors add, and each is about four times that of one bit more, so
    the lower level decides first.
    """
    for second in order:
        for first in order[: order.index(second)]:
            if {first, second} <= set(PAIRED) and PAIRED.index(first) < PAIRED.index(second):
                yield first, second


def capability(int8: bool, bfloat16: bool, fp4: bool = False) -> str:
    """The row of `AUTO_ORDER` for a device. int8: matrix units that an int8 backend here uses;
    fp4: units that multiply NVFP4 and MXFP8.
    """
    if not int8:
        return "neither"
    if fp4 and bfloat16:
        return "fp4, int8 and bfloat16"
    return "int8 and bfloat16" if bfloat16 else "int8 alone"
