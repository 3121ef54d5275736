"""Noise of the pack's loops: no two of their seeds give the same."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

from ideogram4_quant.engine.generate import initial_noise
from ideogram4_quant.quant.calibration_passes import run_passes
from ideogram4_quant.sampling import noise_seeds

SEEDS = [(0,), (0, 1, 2), (7, 7), (0, 1 << 31, 1 << 32), (1 << 48, 1 << 63), ((1 << 64) - 1, 0)]


class Recorder:
    """What a profiler is told by the two passes."""

    times = (0.25, 0.75)

    def __init__(self) -> None:
        self.phase, self.calls, self.told = "", [], None

    @contextmanager
    def _named(self, name):
        self.phase = name
        yield

    def statistics(self):
        return self._named("statistics")

    def errors(self):
        return self._named("errors")

    def sample(self, index):
        self.told = index

    def at(self, time):
        assert time in self.times

    def __call__(self, prompt, noise):
        self.calls.append((self.phase, self.told, prompt, noise))


def differ(seeds) -> bool:
    noises = [initial_noise(seed, 2, 4) for seed in seeds]
    return not any(torch.equal(a, b) for a, b in itertools.combinations(noises, 2))


def test_the_generator_takes_the_low_32_bits():
    assert not differ([5, 5 + (1 << 32)])
    assert not differ([5, 5 + (1 << 48)])


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_any_two_seeds_give_different_noise(seeds, passes):
    found = noise_seeds(seeds, passes)
    assert [len(each) for each in found] == [len(seeds)] * passes
    assert differ(itertools.chain.from_iterable(found))
    assert found[0][0] == seeds[0] % (1 << 32)
    assert found == noise_seeds(seeds, passes)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("seeds", SEEDS)
def test_no_two_calls_of_the_passes_share_their_noise(prompts, seeds):
    recorder = Recorder()
    run_passes(recorder, prompts, seeds, recorder)
    count = prompts * len(seeds)
    assert [phase for phase, *_ in recorder.calls] == ["statistics"] * count + ["errors"] * count
    assert differ([noise for *_, noise in recorder.calls])
    for _, told, prompt, _ in recorder.calls:
        assert prompt in range(prompts)
        assert told == prompt or prompts == 1
    if prompts == 1:
        assert [told for _, told, *_ in recorder.calls] == [*range(len(seeds))] * 2
