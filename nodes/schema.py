"""What the nodes' schemas share."""

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
