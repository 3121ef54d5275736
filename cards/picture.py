"""Seconds from the queue to the PNG on a card: everything in between, modelled.

Counted: the text encoder's move to the card and its forward, the text projection, every block of
both copies, the stem, guidance and Euler, the host's time a step, moves of weights that do not fit,
the VAE's decoder, the PNG. The models lie in the host's memory and the prompt is new; the first
picture after a start reads the files besides (``disk``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checkpoint.pairs import ALTERNATING, BOTH, STREAMED, WORKING_MEMORY, residency
from ..sampling.presets import PRESETS
from . import sizes
from .block import FUSED, HIDDEN, LAYERS, How, Parts, block_seconds
from .known import Card

DESKTOP = 1 << 30
"""Bytes of a card that its screens take: assumed, as the table of levels in the README does."""

LATENT, TEXT_FEATURES, ADALN = 128, 53248, 512
_STEM_LAUNCHES = 45  # embeddings, rotary table, projections, final layer, sampler: counted
STEP_HOST = 4e-3  # seconds of the host a step that nothing hides: progress, preview, callbacks
# The decoder of the FLUX.2 VAE: 4.94 T multiplications at 1024 px in convolutions (128, 256, 512,
# 512 channels, 3 blocks a level) and one attention over 128 x 128 places of 512 values.
_DECODER_FLOPS_A_PIXEL = 2 * 4.942e12 / 1024**2
_DECODER_ATTENTION = 4 * 512 / 64**2  # times pixels squared
_VAE_BYTES = 170_000_000
PNG_SECONDS = 0.12  # a megapixel; zlib at the host's level 4, one core: assumed
DISK = 3e9  # bytes a second of an NVMe drive: assumed


@dataclass(frozen=True)
class Job:
    """A picture: its size, text, preset, and whether a second copy guides it.

    ``looks_ahead``: streamed weights move while the block before computes.
    """

    width: int = 1024
    height: int = 1024
    text_tokens: int = 512
    preset: str = "quality"
    encoder: str = "FP8"
    looks_ahead: bool = True

    @property
    def image_tokens(self) -> int:
        """Of 16 x 16 px."""
        return self.width * self.height // 256

    @property
    def copies(self) -> tuple[int, ...]:
        """Tokens of each copy that a step runs."""
        both = (self.image_tokens + self.text_tokens, self.image_tokens)
        return both if PRESETS[self.preset].guided else both[:1]

    @property
    def steps(self) -> int:
        """Of the preset."""
        return PRESETS[self.preset].steps


QUALITY = Job()


@dataclass(frozen=True)
class Picture:
    """Seconds of everything between the queue and the PNG."""

    blocks: Parts
    residency: str
    encoder: float = 0.0
    stem: float = 0.0
    guidance: float = 0.0
    moves: float = 0.0
    vae: float = 0.0
    png: float = 0.0
    disk: float = field(default=0.0, kw_only=True)

    @property
    def denoising(self) -> float:
        """The steps alone, which is what a progress bar shows."""
        return self.blocks.total + self.stem + self.guidance

    @property
    def total(self) -> float:
        """All but ``disk``."""
        return self.denoising + self.encoder + self.moves + self.vae + self.png


def picture_seconds(card: Card, level: str, job: Job = QUALITY, how: How = FUSED) -> Picture:
    """One picture with both copies at ``level``, or with one where the preset has no guidance."""
    one, number = sizes.copy_bytes(level), len(job.copies)
    memory = card.memory - DESKTOP
    held = residency((one, one if number == 2 else 0), memory, WORKING_MEMORY)
    blocks, waits = Parts(), 0.0
    for tokens in job.copies:
        once = block_seconds(card, level, tokens, how)
        blocks += once.times(LAYERS * job.steps)
        if held == STREAMED:
            streamed = _streamed(card, level, once.total, memory, number, job, how)
            waits += job.steps * streamed
    if held == ALTERNATING:  # every second step the other way round: one move a step
        waits += job.steps * card.transfer_seconds(one, how.efficiency)
    encoder = sizes.encoder_bytes(job.encoder)
    resident = {BOTH: number * one, ALTERNATING: one, STREAMED: 0}[held]
    displaced = max(0, encoder + resident + WORKING_MEMORY - memory)
    back = card.transfer_seconds(min(displaced, resident), how.efficiency)
    if job.looks_ahead:  # it comes back block by block in the first step; one is waited for
        step = sum(block_seconds(card, level, tokens, how).total for tokens in job.copies)
        one_block = card.transfer_seconds(sizes.block_bytes(level), how.efficiency)
        back = max(min(back, one_block), back - LAYERS * step)
    moved = _VAE_BYTES + (encoder if displaced else 0)
    return Picture(
        blocks,
        held,
        encoder=_encoder_seconds(card, job, how),
        stem=_stem_seconds(card, job, how),
        guidance=_guidance_seconds(card, job, how),
        moves=waits + back + card.transfer_seconds(moved, how.efficiency),
        vae=_decoder_seconds(card, job, how),
        png=PNG_SECONDS * job.width * job.height / 1024**2,
        disk=(number * one + encoder + _VAE_BYTES) / DISK,
    )


def _streamed(
    card: Card, level: str, compute: float, memory: int, number: int, job: Job, how: How
) -> float:
    """Seconds that one forward waits for weights: those blocks that the card does not hold.

    With look-ahead only what a transfer takes longer than the block that runs meanwhile.
    """
    nbytes = sizes.block_bytes(level)
    room = max(0, memory - WORKING_MEMORY - (sizes.copy_bytes(level) - LAYERS * nbytes))
    kept = min(LAYERS, int(room // (number * nbytes)))
    transfer = card.transfer_seconds(nbytes, how.efficiency)
    if not job.looks_ahead:
        return (LAYERS - kept) * transfer
    return max(0.0, (LAYERS - kept) * transfer - LAYERS * compute)


def _encoder_seconds(card: Card, job: Job, how: How) -> float:
    """Products in 16 bits, each weight cast from what is stored before its use."""
    weights = sizes.encoder_weights()
    work = 2 * weights * job.text_tokens / (card.bf16 * how.efficiency.gemm)
    return work + card.copy_seconds(weights * (sizes.bits(job.encoder) / 8 + 2), how.efficiency)


def _stem_seconds(card: Card, job: Job, how: How) -> float:
    """What a forward does beside its blocks: in 16 bits, the text projection at every step."""
    seconds = 0.0
    for index, tokens in enumerate(job.copies):
        work = 2 * tokens * HIDDEN * LATENT * 2 + 2 * (2 * HIDDEN**2 + HIDDEN * ADALN)
        weights = 2 * (HIDDEN * LATENT * 2 + 2 * HIDDEN**2 + HIDDEN * ADALN)
        if index == 0:
            work += 2 * job.text_tokens * HIDDEN * TEXT_FEATURES
            weights += 2 * HIDDEN * TEXT_FEATURES
        seconds += work / (card.bf16 * how.efficiency.gemm)
        seconds += card.copy_seconds(weights + 20 * tokens * HIDDEN, how.efficiency)
    return job.steps * seconds


def _guidance_seconds(card: Card, job: Job, how: How) -> float:
    """Guidance and Euler in fp32, and the host's part of a step."""
    latents = 4 * job.image_tokens * LATENT
    passes = 12 if len(job.copies) == 2 else 6
    once = card.copy_seconds(passes * latents, how.efficiency) + STEP_HOST
    return job.steps * once


def _decoder_seconds(card: Card, job: Job, how: How) -> float:
    pixels = job.width * job.height
    convolutions = _DECODER_FLOPS_A_PIXEL * pixels / (card.bf16 * how.efficiency.convolution)
    attention = _DECODER_ATTENTION * pixels**2 / (card.bf16 * how.efficiency.attention)
    return convolutions + attention
