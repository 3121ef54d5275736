"""Which attention a model gets where the user leaves it to the file and the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..ops.dispatch import AUTO, BackendReport

logger = logging.getLogger(__name__)


def followed(
    requested: str, wish: str | None, backends: Sequence[BackendReport]
) -> tuple[str, bool]:
    """(the attention to install, whether the file's ``wish`` decided): behind ``auto`` alone, and
    where the device has it.
    """
    if requested != AUTO or wish is None:
        return requested, False
    found = next((b for b in backends if b.name == wish), None)
    if found is None or not found.available:
        why = "unknown here" if found is None else found.reason
        logger.warning("the file asks for attention %s, which is not there: %s", wish, why)
        return requested, False
    return wish, True
