"""The model's tables: seconds a picture by card and level, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.pairs import ALTERNATING, STREAMED, WORKING_MEMORY
from .block import FUSED, GAP, LAUNCH, LAYERS, LINEARS, How, block_seconds, launches
from .known import ASSUMED, CARDS, FLASH_MEASURED, Card, Efficiency, card, flash_share
from .picture import (
    DESKTOP,
    DISK,
    PNG_SECONDS,
    QUALITY,
    STEP_HOST,
    Job,
    Picture,
    picture_seconds,
)

LEVELS = ("INT8 W8A8 rotated", "Q4_K", "W4A8", "Q8_0")
AS_INT8 = ", as int8"
"""Ends the name of a GGUF level that is computed as ``w8a8`` although ``auto`` would not."""
INSTANT = Job(preset="instant")
INT8_ATTENTION = How(attention="int8")

_HELD = {ALTERNATING: "take turns", STREAMED: "streamed"}


@dataclass(frozen=True)
class Target:
    """Seconds asked of a picture at 1024 px, all told."""

    text: str
    seconds: float
    level: str = "INT8 W8A8 rotated"
    job: Job = QUALITY
    how: How = FUSED
    card: str = "RTX 3090"

    def modelled(self, efficiency: Efficiency = ASSUMED) -> float:
        """Seconds by the model."""
        how = replace(self.how, efficiency=efficiency)
        return picture_seconds(card(self.card), self.level, self.job, how).total

    def efficiency_needed(self, name: str) -> float | None:
        """The share of one bound, alone, that reaches it; None where all of the bound does not."""

        def at(share: float) -> float:
            return self.modelled(replace(ASSUMED, **{name: share}))

        low, high = getattr(ASSUMED, name), 1.0
        if at(high) > self.seconds:
            return None
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle) <= self.seconds else (middle, high)
        return high


TARGETS = (
    Target("INT8 rotated, 48 steps of both copies", 66.0),
    Target("the same with INT8 attention", 50.0, how=INT8_ATTENTION),
    Target("Instant: 8 steps of one branch, INT8 rotated", 6.5, job=INSTANT),
)
NEAR = 0.05
"""By how much Q4_K and W4A8 may take longer than INT8 rotated."""


def pictures(
    cards: Sequence[Card] = CARDS, levels: Sequence[str] = (*LEVELS, f"Q8_0{AS_INT8}")
) -> Iterator[str]:
    """Lines of the Markdown table of whole pictures."""
    yield (
        "| card | level | copies | products | attention | q, k | rows | decoding | moves | "
        "encoder, VAE, PNG, else | **48 steps** | INT8 attention | q, k eager | Instant, 8 steps |"
    )
    yield "| --- | --- | --- |" + " ---: |" * 12
    for one in cards:
        for level in levels:
            yield _row(one, level)


def _row(one: Card, name: str) -> str:
    level = name.removesuffix(AS_INT8)
    how = FUSED if level == name else How(gguf_compute="w8a8")
    picture = picture_seconds(one, level, how=how)
    b = picture.blocks
    rest = picture.total - picture.moves - b.total + b.gaps + b.host
    others = (
        picture_seconds(one, level, how=replace(how, attention="int8")).total,
        picture_seconds(one, level, how=replace(how, heads_fused=False)).total,
        picture_seconds(one, level, INSTANT, how).total,
    )
    parts = (b.gemm, b.attention, b.heads, b.rows, b.decode)
    cells = [one.name, name, _HELD.get(picture.residency, "both there")]
    cells += [f"{seconds:.1f}" for seconds in parts]
    cells += [_moves(one, level, picture, how), f"{rest:.1f}"]
    cells += [f"**{picture.total:.1f}**", *(f"{seconds:.1f}" for seconds in others)]
    return "| " + " | ".join(cells) + " |"


def _moves(one: Card, level: str, picture: Picture, how: How) -> str:
    """What is waited for; in brackets without look-ahead, where that is more."""
    blind = picture_seconds(one, level, Job(looks_ahead=False), how).moves
    more = f" ({blind:.1f})" if blind > picture.moves + 0.05 else ""
    return f"{picture.moves:.1f}{more}"


def targets() -> Iterator[str]:
    """Lines: what was asked, what the model says, and what would reach it."""
    yield "| asked, RTX 3090, 1024 px | seconds | modelled | |"
    yield "| --- | ---: | ---: | --- |"
    for target in TARGETS:
        found = target.modelled()
        yield f"| {target.text} | {target.seconds:g} | {found:.1f} | {_verdict(target, found)} |"
    base = TARGETS[0].modelled()
    for level in ("Q4_K", "W4A8"):
        found = replace(TARGETS[0], level=level).modelled()
        more = found / base - 1
        said = "reached" if more <= NEAR else "not reached"
        figures = f"{base * (1 + NEAR):.1f} | {found:.1f} | {said}: {more:+.1%}"
        yield f"| {level} within {NEAR:.0%} of INT8 rotated | {figures} |"


def partly_filled() -> str:
    """A line: what other tiles could gain at most, on the card that most is asked of."""
    one, how = card(TARGETS[0].card), FUSED
    whole, full = picture_seconds(one, LEVELS[0]).blocks.gemm, 0.0
    for tokens in QUALITY.copies:
        work = sum(2 * tokens * n * k for n, k in LINEARS.values())
        full += QUALITY.steps * LAYERS * work / (one.int8 * how.efficiency.gemm)
    return (
        f"Of the {whole:.1f} s of products {whole - full:.1f} s are waves of tiles that do not "
        "fill the card, and what stands around the loops: other tiles gain that at most. Without "
        f"it the first line were {TARGETS[0].modelled() - whole + full:.1f} s."
    )


def _verdict(target: Target, found: float) -> str:
    if found <= target.seconds:
        return "reached"
    attention = "attention_int8" if target.how.attention == "int8" else "attention"
    needed = {
        "of the GEMM peak": (target.efficiency_needed("gemm"), ASSUMED.gemm),
        "of the attention peak": (
            target.efficiency_needed(attention),
            getattr(ASSUMED, attention),
        ),
    }
    ways = [
        f"{share:.0%} {name} (assumed {assumed:.0%})"
        for name, (share, assumed) in needed.items()
        if share is not None
    ]
    over = f"not reached, {found / target.seconds - 1:.0%} over"
    return f"{over}; it takes {' or '.join(ways)}" if ways else over


def launch_lines(cards: Sequence[Card] = CARDS) -> Iterator[str]:
    """Lines: a block's time on the card beside the host's to launch it, fused and not."""
    yield "| INT8 rotated | fused: card | host | not fused: card | host |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for one in cards:
        figures = []
        for fused in (True, False):
            how = How(fused=fused, heads_fused=fused, graphs=True)
            figures.append(block_seconds(one, LEVELS[0], 1024, how).total)
            figures.append(LAUNCH * launches(LEVELS[0], how))
        yield f"| {one.name} | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in figures) + " |"


def assumptions() -> Iterator[str]:
    """What the figures rest on, as list items."""
    e = ASSUMED
    hopper = e.attention * card("H200").attention
    yield (
        "- Shares of the published peaks, the same for every card, none of them measured by us: "
        f"products {e.gemm:.0%}, attention {e.attention:.0%} (H200: {hopper:.0%}), INT8 attention "
        f"{e.attention_int8:.0%} (H200: half), memory {e.bandwidth:.0%}, PCIe {e.bus:.0%} from "
        f"pinned memory, the VAE's convolutions {e.convolution:.0%}."
    )
    measured = ", ".join(f"{flash_share(card(name)):.0%} on an {name}" for name in FLASH_MEASURED)
    yield (
        f"- Attention at {e.attention:.0%}: others measured {measured} with the kernel that runs "
        "here (torch 2.13, 16 heads of 256, 4096 tokens; cloudrift-ai/emmy, pull request 423). A "
        "3090's multiprocessor has the 4090's rates for each clock. INT8 attention: assumed, as "
        "nobody published a figure at this head size; no measured product of the 3090's INT8 "
        "units at these sizes was found either."
    )
    for one in CARDS:
        yield (
            f"- {one.name}: {one.int8 / 1e12:g} TOPS int8 and {one.bf16 / 1e12:g} TFLOPS bf16, "
            f"dense, {one.bandwidth / 1e9:g} GB/s, PCIe {one.bus / 1e9:g} GB/s. {one.source}."
        )
    yield (
        f"- {LAUNCH * 1e6:g} us of the host a launch, {GAP * 1e6:g} us between two kernels, "
        f"{STEP_HOST * 1e3:g} ms of the host a step, {PNG_SECONDS:g} s a megapixel of PNG, "
        f"{DESKTOP / 2**30:g} GiB of the card for its screens: assumed. Memory for activations: "
        f"the pack's own {WORKING_MEMORY / 1e9:g} GB."
    )
    read = picture_seconds(CARDS[0], LEVELS[0]).disk
    yield (
        f"- {QUALITY.text_tokens} tokens of text, a new prompt, models in RAM; the encoder at "
        f"{QUALITY.encoder}, multiplied in 16 bits. The first picture after a start reads the "
        f"files besides: {read:.0f} s for INT8 at {DISK / 1e9:g} GB/s."
    )
