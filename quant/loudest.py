"""The largest values of each channel, and what they would be without any one of the samples."""

from __future__ import annotations

import torch
from torch import Tensor


class Loudest:
    """``max over samples of |x_k|`` with one sample left out, for any sample: three vectors [K].

    A sample is a number, such as a prompt's; its values may come in any number of parts. Kept are
    the largest value of each channel, the sample it is of, and the largest of all other samples.
    """

    def __init__(self, channels: int) -> None:
        self._first = torch.zeros(channels)
        self._second = torch.zeros(channels)
        self._owner = torch.full((channels,), -1)
        self._samples: set[int] = set()

    @property
    def absmax(self) -> Tensor:
        """Over all samples, fp32 [K]."""
        return self._first

    @property
    def samples(self) -> int:
        """How many there were."""
        return len(self._samples)

    def add(self, absmax: Tensor, sample: int) -> None:
        """Count values of ``sample``, by their largest of each channel [K]."""
        self._samples.add(sample)
        own = self._owner == sample
        louder = absmax > self._first
        taken = louder & ~own
        kept = torch.where(own, self._second, torch.maximum(self._second, absmax))
        self._second = torch.where(taken, self._first, kept)
        self._owner = torch.where(taken, sample, self._owner)
        self._first = torch.maximum(self._first, absmax)

    def without(self, sample: int) -> Tensor:
        """Over all samples but this one, fp32 [K]; over this one where there is no other."""
        if self.samples < 2:
            return self._first
        return torch.where(self._owner == sample, self._second, self._first)
