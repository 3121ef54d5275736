"""What cannot be folded, and damaged records of folding: errors with the reason."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import CorruptFileError
from ideogram4_quant.tests import fixtures_fold as fold

O0 = "layers.0.attention.o"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return fold.written(tmp_path_factory.mktemp("fold"))


def rewritten(path, out, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, out, metadata)
    return out


W1 = "fold.layers.0.feed_forward.w1.smooth"


def _set(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(W1, torch.zeros(256)), "cannot be divided by"),
        (_set(W1, torch.full((256,), math.nan)), "cannot be divided by"),
        (_set(W1, torch.ones(256)), "differs from what shares its input"),
        (lambda tensors: tensors.pop(W1), "differs from what shares its input"),
        (_set(W1, torch.ones(2, 128)), "no vector of factors"),
        (_set(f"fold.{O0}.rotation", torch.tensor([77], dtype=torch.int32)), "unknown rotation"),
        (_set(f"fold.{O0}.rotation", torch.ones(2, dtype=torch.int32)), "no rotation group"),
        (_set(f"fold.{O0}.smooth", torch.ones(128)), "do not fit the weight"),
        (_set("fold.input_proj.smooth", torch.ones(128)), "nothing can be folded there"),
        (
            _set("fold.layers.0.feed_forward.w2.rotation", torch.tensor([64], dtype=torch.int32)),
            "no weight can absorb a rotation",
        ),
    ],
)
def test_a_damaged_record_is_an_error(case, tmp_path, change, message):
    path = rewritten(case.files["INT8 W8A8"], tmp_path / "damaged.safetensors", change)
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(path).load("conditional")


def test_a_removed_record_is_an_error(case, tmp_path):
    def remove(tensors):
        for key in [key for key in tensors if key.startswith("fold.")]:
            del tensors[key]

    path = rewritten(case.files["INT8 W8A8"], tmp_path / "removed.safetensors", remove)
    with pytest.raises(CorruptFileError, match="the record of it was removed"):
        open_checkpoint(path)


def test_a_folded_file_in_a_format_that_is_not_written_so_is_an_error(case, tmp_path):
    name = "layers.0.feed_forward.w1.weight"

    def as_fp8(tensors):
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
        conf = json.dumps({"format": "float8_e4m3fn"}).encode()
        tensors[name.replace("weight", "comfy_quant")] = torch.tensor(list(conf), dtype=torch.uint8)

    path = rewritten(case.files["INT8 W8A8"], tmp_path / "fp8.safetensors", as_fp8)
    with pytest.raises(CorruptFileError, match="cannot be folded"):
        open_checkpoint(path).load("conditional")
