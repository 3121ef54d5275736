"""The headers of a model are read by opening its file once, whatever lies beside the weights."""

from __future__ import annotations

import builtins
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.safetensors_header import read_safetensors_header
from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.tests import quant_model


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """Opens by name, while the test runs."""
    found: Counter = Counter()
    true_open = builtins.open

    def counting(file, *more, **named):
        found[str(file)] += 1
        return true_open(file, *more, **named)

    monkeypatch.setattr(builtins, "open", counting)
    return found


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("INT8 W8A8 rotated", "m.safetensors"),
        ("W4A8", "m.safetensors"),
        ("Q4_K", "m.gguf"),
        ("BF16", "m.safetensors"),
    ],
)
def test_headers_are_read_in_one_go(tmp_path, opened, level, name):
    """There is a text beside each INT8 weight, which was an open for each: 170 in the model."""
    source = quant_model.write(tmp_path / "source.safetensors", quant_model.weights())
    made = source
    if level != "BF16":
        made = tmp_path / name
        quantize_checkpoint(source, level, made, copy="conditional")
    opened.clear()
    open_checkpoint(made)
    assert opened[str(made)] == 1


def test_texts_are_those_of_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    text = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    long = torch.arange(1000).to(torch.uint8)
    tensors = {"short": text, "long": long, "none": text[:0], "matrix": text[:28].view(4, 7)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    found = read_safetensors_header(path)[1]
    assert {name for name, raw in found.items() if raw.held is not None} == {"none", "short"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read(), tensor)
        assert found[name].read().dtype == torch.uint8
