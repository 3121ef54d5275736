"""Every layout as the host saves it, read again to the bit; damaged descriptions are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.grammar import PREFIXES, build_entries, parse_key
from ideogram4_quant.checkpoint.saved import with_words
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.tests.layout_cases import KINDS, K, identical, make
from ideogram4_quant.tests.tensors import randn

NAME = "layers.0.attention.o"
KEY = f"model.diffusion_model.{NAME}.weight"


def text(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def saved(path, qt, **said):
    """The file that the host's saver makes of one linear; ``said`` changes its description."""
    stored = {key: value.contiguous() for key, value in qt.state_dict(KEY).items()}
    described = qt.layout_cls.description(qt._params) | said
    stored[KEY.removesuffix("weight") + "comfy_quant"] = text(described)
    save_file(stored, path)
    container = open_tensor_files(path)
    keys = [(parse_key(name), raw) for name, raw in container.tensors.items()]
    assert all(key is not None for key, _ in keys)
    return build_entries(keys, {}).entries[f"{NAME}.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_weight_is_read_to_the_bit(kind, tmp_path):
    qt = make(kind, randn(32, K))
    entry = saved(tmp_path / "m.safetensors", qt)
    assert entry.shape == (32, K)
    again = entry.read(torch.float32)
    # Int8's own fold may be told as smoothing or rotation of the layout, with the same values
    assert torch.equal(again.dequantize(), qt.dequantize())
    assert identical(again, qt)


@pytest.mark.parametrize("rotation", [None, 16, 64, 256])
def test_int8_without_smoothing_is_stocks_own_format(rotation):
    qt = make("int8", randn(32, K)).requantize_from_float(randn(32, K), rotation=rotation)
    wanted = {"format": "int8_tensorwise"}
    if rotation:
        wanted |= {"convrot": True, "convrot_groupsize": rotation}
    assert qt.layout_cls.description(qt._params) == wanted
    assert set(qt.state_dict("weight")) == {"weight", "weight_scale"}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Q4_K", {"qtype": "IQ9"}),
        ("Q4_K", {"qtype": 3}),
        ("Q4_K", {"qtype": "Q8_0"}),
        ("Q4_K", {"shape": [12]}),
        ("Q4_K", {"shape": [12, -512]}),
        ("Q4_K", {"shape": [1 << 40, 512]}),
        ("Q4_K", {"shape": [64, 512]}),
        ("folded Q8_0", {"fold": {"rotation": 3}}),
        ("folded Q8_0", {"fold": {"row_rotation": [16]}}),
        ("folded Q8_0", {"fold": {"first_row": "2"}}),
        ("folded int8", {"format": "ideogram4_quant_other"}),
    ],
)
def test_a_description_that_does_not_fit_is_refused(kind, said, tmp_path):
    entry = saved(tmp_path / "m.safetensors", make(kind, randn(32, K)), **said)
    with pytest.raises(CheckpointError) as raised:
        (entry.level, entry.shape, entry.read(torch.float32))
    assert KEY in str(raised.value)


def test_what_the_model_says_of_itself(tmp_path):
    path = tmp_path / "m.safetensors"
    said = {"copy": "unconditional", "config": {"num_layers": 3}}
    save_file({"model.diffusion_model.ideogram4_quant": text(said)}, path)
    metadata = with_words(open_tensor_files(path), PREFIXES).metadata
    assert metadata["ideogram4.copy"] == "unconditional"
    assert json.loads(metadata["ideogram4.config"]) == {"num_layers": 3}
    for bad in (torch.ones(2), text([1]), torch.tensor([0xFF, 0xFE], dtype=torch.uint8)):
        save_file({"ideogram4_quant": bad}, path)
        with pytest.raises(CorruptFileError):
            with_words(open_tensor_files(path), PREFIXES)
