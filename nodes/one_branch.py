"""Models that need no guidance: what is refused with them, and what is left out, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.model_patcher

from ..checkpoint import Checkpoint
from ..checkpoint.branches import (
    GUIDANCE_NONE,
    GUIDANCE_PAIR,
    OneBranch,
    tell_one_branch,
)
from ..errors import OpError, PairMismatchError
from ..sampling import preset
from .guidance import Guidance, format_guidance
from .model_source import ModelSource, source_of

BRANCH = "ideogram4_quant_one_branch"
"""Attachment of a loaded model: an `OneBranch`, or None for a copy of a pair."""


def one_branch_of(patcher: comfy.model_patcher.ModelPatcher) -> OneBranch | None:
    """Why a model needs no guidance. Of another loader's model the file's name tells, where the
    host kept it."""
    if source_of(patcher) is not None:
        return patcher.get_attachment(BRANCH)
    _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    path = arguments[0] if arguments else None
    return tell_one_branch(Path(path), {}) if isinstance(path, str) else None


def words_of(header: Checkpoint, source: ModelSource) -> dict[str, str]:
    """What a saved model says of its guidance: nothing where nobody said anything."""
    if header.one_branch is not None:
        known = header.one_branch.preset
        return {"guidance": GUIDANCE_NONE} | ({} if known is None else {"preset": known})
    return {"guidance": GUIDANCE_PAIR} if source.one_branch is False else {}


def settle(
    conditional: comfy.model_patcher.ModelPatcher,
    unconditional: comfy.model_patcher.ModelPatcher | None,
    guidance: Guidance,
) -> tuple[Guidance, tuple[str, ...]]:
    """(the guidance that will run, what to say of it in the report).

    One branch runs without any. Raises PairMismatchError where a second copy is connected to it,
    OpError where guidance is asked of it, or where a preset without guidance meets a second copy.
    """
    branch = one_branch_of(conditional)
    chosen = None if guidance.preset is None else preset(guidance.preset)
    if branch is None:
        if chosen is None or chosen.guided:
            return guidance, ()
        if unconditional is not None:
            raise OpError(
                f"the preset {chosen.name} runs without guidance, so the unconditional copy would "
                "take memory for nothing",
                hint="Remove the connection on the unconditional input, or pick the preset "
                "default, turbo or quality.",
            )
        known = f"the preset {chosen.name} is made for {chosen.needs}"
        if chosen.name == _WITH_LORA:
            return guidance, (f"{known}: without it pictures stay unfinished",)
        switch = "nothing says that this model is one: if it is, set branches to one in the loader"
        return guidance, (f"{known}, and {switch}",)
    if unconditional is not None:
        raise PairMismatchError(
            "the model on the conditional input is of one branch, which needs no guidance",
            found=f"a second model on the unconditional input ({branch.reason})",
            needed="nothing there",
            hint="Remove the connection on the unconditional input. If the model is one of two "
            "copies, set branches to two in the loader.",
        )
    if any(value != 1.0 for value in guidance.values):
        raise OpError(
            "guidance is asked of a model of one branch, which holds it in itself",
            found=f"{format_guidance(guidance.values)} ({branch.reason})",
            needed="no guidance, or 1",
            hint="Leave the guidance input empty, and take sigmas from the preset instant or fast. "
            "If the model is one of two copies, set branches to two in the loader.",
        )
    lines = (f"one branch, so no guidance is needed: {branch.reason}",)
    if chosen is not None and chosen.guided:
        left = f"the preset {chosen.name} is made for two copies: its guidance is left out here"
        known = branch.preset
        better = "instant and fast are made for one branch" if known is None else f"pick {known}"
        lines += (f"{left}; {better}",)
    return replace(guidance, preset=None, values=(1.0,)), lines


_WITH_LORA = "turbotime"
