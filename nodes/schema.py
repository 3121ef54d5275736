"""What the nodes' schemas share."""

from collections.abc import Iterable

from comfy_api.latest import io

CATEGORY = "Ideogram 4 Quant"


def details_input() -> io.Boolean.Input:
    """The switch of a report."""
    return io.Boolean.Input(
        "details",
        default=False,
        optional=True,
        advanced=True,
        tooltip="A longer report: where each fact comes from, fingerprints, every measured time.",
    )


def combo_input(
    name: str, options: Iterable[str], tooltip: str, *, advanced: bool = True, **more: object
) -> io.Combo.Input:
    """A list whose first entry is its default, which a workflow without this input gets."""
    listed = list(options)
    return io.Combo.Input(
        name,
        options=listed,
        default=listed[0],
        optional=True,
        advanced=advanced or None,
        tooltip=tooltip,
        **more,
    )
