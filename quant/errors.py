"""Typed errors of the quantizer; each is one of the pack's own (``errors.py``)."""

from __future__ import annotations

from ..errors import CheckpointError, Ideogram4QuantError


class QuantOptionError(Ideogram4QuantError, ValueError):
    """A level, container or option that cannot be used with this source or with each other."""


class AlreadyQuantizedError(CheckpointError):
    """The source holds fewer bits a weight than the level: that would only hide its loss."""


class NonFiniteWeightError(CheckpointError):
    """A weight is NaN or infinite, or becomes so in the type it should be stored in."""


class CalibrationError(CheckpointError):
    """A calibration file that is damaged, or of another model than the one at hand."""
