"""Stock ComfyUI runs our W4A8, W6A8 and INT4 files as comfy-kitchen's eager path does, and this
pack computes the same from them; a wish for 16-bit products of INT8 stock leaves aside."""

from __future__ import annotations

import itertools
import os
import subprocess
import textwrap
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.quant import Calibration, LayerStats, QuantOptions, quantize_checkpoint
from ideogram4_quant.tests import quant_model as model
from ideogram4_quant.tests.host.locate import find_host
from ideogram4_quant.tests.host.server import environment
from ideogram4_quant.tests.tensors import relative

HOST = find_host()
KITCHEN = os.environ.get("COMFY_KITCHEN_PATH")
"""A folder with a comfy-kitchen that has 6-bit codes, for a host whose own has none."""

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(isinstance(HOST, str), reason=HOST if isinstance(HOST, str) else ""),
]
torch.set_num_threads(1)

SCRIPT = """
    import sys
    sys.argv = ["comfy", "--cpu"]
    import torch
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.ops, comfy.utils
    import comfy_kitchen.backends.eager as eager
    from safetensors.torch import save_file

    def multiply(path, found):
        state = comfy.utils.load_torch_file(path)
        quantized = comfy.utils.detect_layer_quantization(state, "")
        ops = comfy.ops.mixed_precision_ops(quantized or {}, torch.float32)
        for module in [key[:-12] for key in state if key.endswith(".comfy_quant")]:
            own = {key.removeprefix(module + "."): value for key, value in state.items()
                   if key.startswith(module + ".") and not key.endswith(".bias")}
            n, k = SHAPES[module]
            linear = ops.Linear(k, n, bias=False, dtype=torch.float32)
            missing, unexpected = linear.load_state_dict(own, strict=False)
            assert not missing and not unexpected, (module, missing, unexpected)
            x = torch.randn(9, k, generator=torch.Generator().manual_seed(0))
            found[module + ".stock"] = linear(x)
            params, data = linear.weight._params, linear.weight._qdata
            if linear.quant_format == "asym_w4a8_int8":
                y = eager.w4a8_int8_linear(
                    x, data, params.scale, params.s_channel, codebook=params.codebook,
                    group_size=params.group_size, convrot_groupsize=params.convrot_groupsize,
                    out_dtype=torch.float32)
            elif linear.quant_format == "convrot_w4a4":
                y = eager.convrot_w4a4_linear(
                    x, data, params.scale, convrot_groupsize=params.convrot_groupsize)
            else:
                y = x @ linear.weight.dequantize().T
            found[module + ".eager"] = y

    with torch.inference_mode():
        for path in PATHS:
            found = {}
            multiply(path, found)
            save_file({name: y.contiguous() for name, y in found.items()}, path + ".y")
"""

LEVELS = ("W4A8", "W6A8", "INT4 W4A4", "INT8 W8A8 rotated", "mixed")
STORED = {
    f"conditional.{name}": storage
    for name, storage in zip(
        model.linear_names(),
        itertools.cycle(("W4A4", "W4A8 g32", "INT8", "W4A8 g16", "W6A8 g16", "W6A8 g32")),
        strict=False,
    )
}
"""How each linear of a mix is stored."""
LOUD = "layers.1.feed_forward.w2"
"""Whose activations a calibration says to leave in 16 bits."""


def loud_inputs() -> Calibration:
    """Rounded inputs alone leave LOUD 30 dB, the others 60."""
    layers = {}
    for name in model.linear_names():
        weight = model.weights()[f"{name}.weight"]
        alone = torch.tensor([1e-3 if name == LOUD else 1e-6]).double()
        layers[f"conditional.{name}"] = replace(
            LayerStats.of(torch.ones(1, weight.shape[1]), weight),
            signal=torch.ones(1).double(),
            noise={"int8 rotated": alone * 10, "int8 rotated inputs": alone},
        )
    return Calibration(layers, (0.0,))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Level -> its file, and beside it what a ComfyUI that knows nothing of this pack computes."""
    folder = tmp_path_factory.mktemp("native")
    source = model.write(folder / "s.safetensors", model.weights())
    made = {}
    for level in LEVELS:
        if level in ("W6A8", "mixed") and KITCHEN is None:
            continue
        made[level] = folder / f"{level}.safetensors"
        if level == "mixed":
            quantize_checkpoint(source, level, made[level], options=QuantOptions(storage=STORED))
            continue
        led = level == "INT8 W8A8 rotated"
        told = {"calibration": loud_inputs(), "treatment": "auto-native"} if led else {}
        quantize_checkpoint(source, level, made[level], options=QuantOptions(**told))
    shapes = {name.removesuffix(".weight"): tuple(w.shape) for name, w in model.weights().items()}
    head = f"PATHS, SHAPES = {[str(path) for path in made.values()]!r}, {shapes!r}\n"
    done = subprocess.run(
        [HOST.python, "-c", head + textwrap.dedent(SCRIPT)],
        cwd=HOST.root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return made


def both(files, level) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(theirs, by module and ``.stock`` or ``.eager``; this pack's, by module)."""
    if level not in files:
        pytest.skip("W6A8 needs comfy-kitchen 0.2.40 in the folder COMFY_KITCHEN_PATH")
    found = {}
    for name, weight in open_checkpoint(files[level]).load("conditional").items():
        if name.startswith("layers.") and hasattr(weight, "_params"):
            x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0))
            found[name.removesuffix(".weight")] = linear(x, weight.to(dtype=torch.float32))
    assert sorted(found) == sorted(model.linear_names())
    return load_file(f"{files[level]}.y"), found


@pytest.mark.parametrize("level", LEVELS[:3])
def test_stock_runs_the_file_as_the_eager_path_and_this_pack_alike(files, level):
    theirs, ours = both(files, level)
    weights = model.weights()
    for name, y in ours.items():
        stock = theirs[f"{name}.stock"]
        assert torch.equal(stock, theirs[f"{name}.eager"]), name
        if level == "INT4 W4A4" and not name.endswith("w2"):
            # stock rounds activations to 4 bits, this pack to 8
            weight = weights[f"{name}.weight"].float()
            x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0))
            true = x @ weight.T
            assert relative(y, true) < 0.9 * relative(stock, true), name
        else:
            assert relative(y, stock) < 1e-3, name  # 60 dB


def test_a_wish_for_16_bits_is_followed_here_and_harmless_in_stock(files):
    theirs, ours = both(files, "INT8 W8A8 rotated")
    for name, y in ours.items():
        dense, stock = theirs[f"{name}.eager"], theirs[f"{name}.stock"]
        assert (relative(y, dense) < 1e-5) == (name == LOUD), name
        assert 1e-3 < relative(stock, dense) < 0.02, name
        assert name == LOUD or relative(y, stock) < 1e-3, name


def test_each_linear_of_a_mix_runs_as_its_own_kind_does(files):
    theirs, ours = both(files, "mixed")
    weights = model.weights()
    for name, y in ours.items():
        stock, stored = theirs[f"{name}.stock"], STORED[f"conditional.{name}"]
        if stored != "INT8":  # whose reference here is a product in floats
            assert torch.equal(stock, theirs[f"{name}.eager"]), name
        if stored == "W4A4":
            weight = weights[f"{name}.weight"].float()
            x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0))
            assert relative(y, x @ weight.T) < 0.9 * relative(stock, x @ weight.T), name
        else:
            assert relative(y, stock) < 1e-3, name  # 60 dB
