"""A copy that is connected and not there: an error before anything is loaded or sampled."""

from __future__ import annotations

import comfy.model_patcher
from comfy_api.latest import io

from ..checkpoint.pairs import Pair
from ..checkpoint.published import other_copy
from ..errors import PairMismatchError
from ..sampling import preset
from .connections import source_of
from .guidance import Guidance
from .one_branch import one_branch_of

_WITHOUT = "pictures are then made without guidance, which follows the caption less closely"


def check_complete(pair: Pair, connected: bool, folder: str) -> None:
    """For a loader: PairMismatchError where its unconditional output leads somewhere and there is
    no such copy. folder: where to put one."""
    if pair.complete or not connected:
        return
    raise PairMismatchError(
        f"the unconditional copy of {pair.level} is missing, and the loader's output "
        "unconditional is connected",
        found=f"{pair.conditional.name}, the conditional copy alone",
        needed=other_copy(pair.level),
        hint=f"Put that file into {folder} and press R, or pick a level that has both copies, or "
        f"remove the connection from the output unconditional: {_WITHOUT}.",
    )


def check_given(
    node: type[io.ComfyNode],
    conditional: comfy.model_patcher.ModelPatcher,
    unconditional: comfy.model_patcher.ModelPatcher | None,
    guidance: Guidance,
) -> None:
    """For a sampler: PairMismatchError where its unconditional input is connected, brings no model,
    and guidance needs one. node: the one that runs, which asks for its id and its graph."""
    hidden = node.hidden  # None where no host runs it
    if unconditional is not None or hidden is None:
        return
    source = source_of(hidden.prompt, hidden.unique_id, "unconditional")
    if source is None:
        return
    if one_branch_of(conditional) is not None or not _guides(guidance):
        return
    raise PairMismatchError(
        "the unconditional input is connected, but what is connected there gives no model",
        found=f"nothing from {source}",
        needed="the unconditional copy, from its loader through every node between",
        hint="Connect the unconditional copy on the input side of that node too, or remove the "
        f"connection to the unconditional input here: {_WITHOUT}.",
    )


def _guides(guidance: Guidance) -> bool:
    """Whether any step may ask for the unconditional copy."""
    if guidance.preset is not None:
        return preset(guidance.preset).guided
    return any(value != 1.0 for value in guidance.values)
