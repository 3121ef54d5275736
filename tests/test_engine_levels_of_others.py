"""Levels that others write, in the engine, against diffusers' model with what they stand for."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_sdnq as sdnq_files
from ideogram4_quant.tests.engine_oracle import reference_velocity
from ideogram4_quant.tests.host.level_files import PACKERS
from ideogram4_quant.tests.tensors import relative
from ideogram4_quant.tests.test_engine_levels import ACTIVATIONS, ONE_LAYER, ROUND_OFF, inputs
from ideogram4_quant.tests.tiny_model import canonical_state, diffusers_state, random_transformer

# int8 activations; scales kept in float16; held as Q8_0; else the weight itself is multiplied
ROUNDED = dict.fromkeys(("W4A8", "W6A8", "INT4 W4A4", "SDNQ 8-bit"), ACTIVATIONS)
ROUNDED |= {"SDNQ 4-bit": 2e-3, "SVDQuant W4A4": ACTIVATIONS}


@pytest.mark.parametrize("level", PACKERS)
def test_a_file_is_what_its_writer_means(tmp_path, level):
    model = random_transformer(0, ONE_LAYER)
    stored, truth = {}, {}
    for name, tensor in canonical_state(model).items():
        if name.startswith("layers.") and tensor.ndim == 2:
            parts, truth[name] = PACKERS[level](tensor.float())
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
        else:
            stored[name] = truth[name] = tensor
    out = tmp_path / "ideogram4_cond.safetensors"
    metadata = {"config": json.dumps(ONE_LAYER)}
    if level in sdnq_files.LEVELS:
        said = sdnq_files.config(sdnq_files.LEVELS[level])
        out = sdnq_files.save(tmp_path / "transformer", stored, said, metadata)
    else:
        files.save(out, stored, metadata)
    opened = open_checkpoint(out, copy="conditional")
    assert opened.level == level
    model.load_state_dict(diffusers_state(truth))
    ours = load_transformer(opened, "conditional", device="cpu")
    x, features = inputs()
    wanted = reference_velocity(model, x, 0.6, features, 4, 8)
    found = velocity(ours, x, 0.6, prepare(ours, 4, 8, features))
    assert relative(found, wanted) < ROUNDED.get(level, ROUND_OFF)
