"""Layers to measure, and faked times, for the tests of measured choices."""

from __future__ import annotations

from ideogram4_quant.ops.tuning import autotune
from ideogram4_quant.ops.tuning.autotune import Layer
from ideogram4_quant.ops.tuning.choices import LINEAR, Key

INT8 = Layer("int8", 48, 256)
Q4_K = Layer("Q4_K", 48, 256)


def fake_times(monkeypatch, **seconds):
    """Every candidate takes what is given for it; returns the candidates that were timed."""
    timed = []

    def medians(functions, device, rounds=5, deadline=None, *, prune=False):
        for function in functions.values():
            function()
        timed.append(tuple(functions))
        return {name: seconds[name] for name in functions}

    monkeypatch.setattr(autotune, "medians", medians)
    return timed


def linear_key(layer, tokens=512, dtype="float32"):
    return Key(LINEAR, layer.n, layer.k, tokens, dtype, str(layer.rotation))
