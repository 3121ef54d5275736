"""The error of comparisons, apart from what takes long to import."""

from __future__ import annotations

from ...errors import Ideogram4QuantError


class CompareError(Ideogram4QuantError, ValueError):
    """Cases, systems or folders that cannot be compared."""
