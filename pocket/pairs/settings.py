"""Which levels, which pairs of them and which guidance are measured: plain data.

The pocket model's last layers are scaled for the presets (`export.for_presets`): the shipped copies
are ``1.5 / 7`` and ``0.5 / 6`` of what was trained. ``own scale`` undoes that: the guidance is then
a true one, as the real model's is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ops.layouts import GGUFLayout, Int8Layout, NF4Layout
from ..export import STRENGTH
from ..table.systems import REFERENCE, ROTATION, Scheme, stored

PRESETS_GUIDE = 7
INT8 = "INT8 W8A8 rotated"
_GRADES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
#: As the quantizer writes them without a calibration.
LEVELS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(REFERENCE),
        Scheme(INT8, stored(Int8Layout.NAME, rotation=ROTATION)),
        *(Scheme(t, stored(GGUFLayout.NAME, qtype=t)) for t in (*_GRADES, "IQ4_XS")),
        Scheme("NF4", stored(NF4Layout.NAME)),
        *(Scheme(t, stored(GGUFLayout.NAME, qtype=t)) for t in ("Q3_K", "Q2_K")),
    )
}
#: What may run the unconditional pass on the conditional copy: a LoRA of `delta`'s by its rank.
RANKS = (16, 64, 256)


def lora(rank: int) -> str:
    """The name of `delta`'s LoRA of a rank in the place of an unconditional level."""
    return f"LoRA of rank {rank}"


@dataclass(frozen=True)
class Setting:
    """A constant guidance, of the copies as shipped or at their own scale."""

    guidance: float
    own_scale: bool = False

    @property
    def name(self) -> str:
        return f"guidance {self.guidance:g}" + (", own scale" if self.own_scale else "")

    @property
    def factors(self) -> tuple[float, float]:
        """(a, b) of ``a v_conditional - b v_unconditional``, of the copies as shipped."""
        first, second = self.guidance, self.guidance - 1.0
        if not self.own_scale:
            return first, second
        return first * PRESETS_GUIDE / STRENGTH, second * (PRESETS_GUIDE - 1) / (STRENGTH - 1)

    @property
    def true_factors(self) -> tuple[float, float]:
        """The same of the copies at their own scale."""
        first, second = self.factors
        return first * STRENGTH / PRESETS_GUIDE, second * (STRENGTH - 1) / (PRESETS_GUIDE - 1)


SETTINGS = tuple(Setting(g, own) for own in (False, True) for g in (7.0, 3.0))

Pair = tuple[str, str]
EQUAL: tuple[Pair, ...] = tuple((name, name) for name in LEVELS if name != REFERENCE)
#: One conditional level, ever lower unconditional ones, and what takes their place.
LOWER: tuple[Pair, ...] = (
    *((INT8, name) for name in ("Q6_K", "Q5_K", "Q4_K", "NF4", "Q3_K", "Q2_K")),
    *((INT8, lora(rank)) for rank in RANKS),
)
#: The same two levels both ways, as the first look had them.
BOTH_WAYS: tuple[Pair, ...] = ((INT8, "Q4_K"), ("Q4_K", INT8))


def _same_bytes(equal: str, high: str, low: str) -> tuple[Pair, ...]:
    """Pairs that take the same bytes to within 4 %: two equal levels first."""
    return (equal, equal), (high, low), (low, high)


SAME_BYTES: tuple[tuple[Pair, ...], ...] = (
    _same_bytes("Q6_K", "Q8_0", "Q4_K"),
    _same_bytes("Q5_K", "Q6_K", "Q4_K"),
    _same_bytes("Q4_K", "Q5_K", "Q3_K"),
    _same_bytes("Q3_K", "Q4_K", "Q2_K"),
)
#: What auto takes on 16 GB where there are files of every level.
ON_16_GB: Pair = ("Q6_K", "Q5_K")
#: Where all pairs are measured, and the bytes that are measured elsewhere too.
WHOLE = Setting(7.0)
_ELSEWHERE = "Q5_K"


def pairs_of(sick: bool, setting: Setting) -> tuple[Pair, ...]:
    """The pairs that are measured on a model at a setting."""
    ways = (("Q4_K", "Q4_K"), *BOTH_WAYS)
    if sick and setting != WHOLE:
        return ways
    everywhere = sick or setting != WHOLE
    groups = [g for g in SAME_BYTES if not everywhere or g[0][0] == _ELSEWHERE]
    same = [pair for group in groups for pair in group]
    more = () if everywhere else (*EQUAL, *LOWER, ON_16_GB)
    return tuple(dict.fromkeys((*more, *ways, *same)))


def settings_of(sick: bool) -> tuple[Setting, ...]:
    """The settings that a model is measured at: a sick one at one true guidance."""
    return tuple(s for s in SETTINGS if not (sick and s == Setting(3.0, own_scale=True)))
