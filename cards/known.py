"""The cards: what their makers say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpError

GIB = 1 << 30


@dataclass(frozen=True)
class Efficiency:
    """Share of each bound that a real kernel is taken to reach: assumed, the same for all cards.

    ``gemm`` 0.70: of the tensor cores' peak at the boost clock, which a card under this load does
    not hold; ``attention`` 0.75, torch's flash kernel at a head size of 256, see
    ``FLASH_MEASURED``; ``attention_int8`` 0.60, comfy-kitchen's, of which there is no published
    figure; ``bandwidth`` 0.80 of the memory; ``bus`` 0.80 of PCIe, from pinned memory;
    ``convolution`` 0.40, the VAE's.
    """

    gemm: float = 0.70
    attention: float = 0.75
    attention_int8: float = 0.60
    bandwidth: float = 0.80
    bus: float = 0.80
    convolution: float = 0.40


ASSUMED = Efficiency()

FLASH_MEASURED = {"RTX 4090": 1068.8e-6, "RTX 5090": 792.8e-6}
"""Seconds of torch 2.13's scaled_dot_product_attention that others measured: 16 heads of 256, 4096
tokens, causal, float16 (cloudrift-ai/emmy, pull request 423). It is the kernel that runs here; the
3090's and 4060's multiprocessors have the same rates for each clock as the 4090's."""


def flash_share(card: Card) -> float:
    """Of the card's peak in ``FLASH_MEASURED``: half of the products, as the mask leaves."""
    heads, tokens, size = 16, 4096, 256
    work = 4 * tokens**2 * size * heads / 2
    return work / FLASH_MEASURED[card.name] / card.bf16


@dataclass(frozen=True)
class Card:
    """Rates as published, operations and bytes a second; operations without sparsity.

    ``int8`` with int32 sums, ``bf16`` with fp32 sums; ``bus`` of PCIe in one direction; ``arch`` 86
    is sm_86. ``attention`` is the share of ``Efficiency.attention`` that torch's flash kernel
    reaches there, ``attention_int8`` the same of comfy-kitchen's INT8 kernel and its own share.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    int8: float
    bf16: float
    bandwidth: float
    memory: int
    bus: float
    source: str
    attention: float = 1.0
    attention_int8: float = 1.0

    @property
    def int8_per_cycle(self) -> float:
        """INT8 operations of one multiprocessor in a cycle."""
        return self.int8 / (self.multiprocessors * self.clock)

    def transfer_seconds(self, nbytes: float, efficiency: Efficiency = ASSUMED) -> float:
        """Seconds for ``nbytes`` from pinned memory of the host to the card."""
        return nbytes / (self.bus * efficiency.bus)

    def copy_seconds(self, nbytes: float, efficiency: Efficiency = ASSUMED) -> float:
        """Seconds in which the card's own memory moves ``nbytes``, read and written together."""
        return nbytes / (self.bandwidth * efficiency.bandwidth)


_PCIE4_X16, _PCIE4_X8, _PCIE5_X16 = 31.5e9, 15.75e9, 63.0e9
_GA102 = "NVIDIA Ampere GA102 GPU Architecture, whitepaper V2, table of GeForce cards"
_ADA = "NVIDIA Ada GPU Architecture, whitepaper, table of GeForce cards"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, whitepaper, table of GeForce cards"

CARDS: tuple[Card, ...] = (
    Card("RTX 3090", 86, 82, 1.695e9, 284e12, 71e12, 936e9, 24 * GIB, _PCIE4_X16, _GA102),
    Card("RTX 4090", 89, 128, 2.520e9, 660.6e12, 165.2e12, 1008e9, 24 * GIB, _PCIE4_X16, _ADA),
    Card("RTX 5090", 120, 170, 2.407e9, 838e12, 209.5e12, 1792e9, 32 * GIB, _PCIE5_X16, _BLACKWELL),
    Card("RTX 3070", 86, 46, 1.725e9, 162.6e12, 40.6e12, 448e9, 8 * GIB, _PCIE4_X16, _GA102),
    Card(
        "RTX 4060", 89, 24, 2.460e9, 121e12, 30.2e12, 272e9, 8 * GIB, _PCIE4_X8,
        "NVIDIA's product page: 242 AI TOPS sparse, so 121 dense; a quarter of it in bf16",
    ),
    Card(
        "H200", 90, 132, 1.830e9, 1979e12, 989.4e12, 4800e9, 141_000_000_000, _PCIE5_X16,
        "NVIDIA H200 data sheet (SXM), dense; flash 2 at 35 % of the peak: FlashAttention-3, "
        "arXiv 2407.08608",
        attention=0.35 / ASSUMED.attention,
        attention_int8=0.5,  # assumed: its kernels are Ampere's, not those that feed Hopper's units
    ),
)  # fmt: skip
"""In the order of tables."""


def card(name: str) -> Card:
    """The card of that name, or whose name is in what a driver says ("NVIDIA GeForce RTX 3090").

    Raises OpError that names those there are. A "3090 Ti" or a "4060 Laptop" is another card.
    """
    found = find(name)
    if found is None:
        raise OpError("no such card", found=repr(name), needed=", ".join(c.name for c in CARDS))
    return found


def find(name: str, cards: Sequence[Card] = CARDS) -> Card | None:
    """As ``card``; None where there is none."""
    words = name.casefold().replace("-", " ").split()
    if {"ti", "super", "laptop", "mobile", "max", "nvl", "d"} & set(words):
        return None
    for known in cards:
        wanted = known.name.casefold().split()
        if wanted[-1] in words or wanted[-1] in (word.partition("gb")[0] for word in words):
            return known
    return None
