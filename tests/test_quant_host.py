"""Stock ComfyUI's own loader reads the native container without this pack."""

import json
import subprocess
import textwrap
from dataclasses import replace

import pytest
import torch

from ideogram4_quant.quant import Calibration, LayerStats, QuantOptions, quantize_checkpoint
from ideogram4_quant.tests import quant_model as model
from ideogram4_quant.tests.host.locate import find_host

HOST = find_host()

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(isinstance(HOST, str), reason=HOST if isinstance(HOST, str) else ""),
]

SCRIPT = """
    import json, sys
    sys.argv = ["comfy", "--cpu"]
    import torch
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.ops, comfy.utils
    with torch.inference_mode():
        state, metadata = comfy.utils.load_torch_file(PATH, return_metadata=True)
        quantized = comfy.utils.detect_layer_quantization(state, "")
        ops = comfy.ops.mixed_precision_ops(quantized or {}, torch.float32)
        true = comfy.utils.load_torch_file(SOURCE)
        found = {"model_type": metadata["model_type"], "linears": {}}
        for name, weight in true.items():
            if weight.ndim != 2 or name == "embed_image_indicator.weight":
                continue
            module = name.removesuffix(".weight")
            n, k = weight.shape
            linear = ops.Linear(k, n, bias=f"{module}.bias" in true, dtype=torch.float32)
            own = {key.removeprefix(module + "."): value for key, value in state.items()
                   if key.startswith(module + ".")}
            missing, unexpected = linear.load_state_dict(own, strict=False)
            x = torch.randn(9, k, generator=torch.Generator().manual_seed(0))
            bias = true.get(f"{module}.bias")
            wanted = x @ weight.float().T + (0 if bias is None else bias.float())
            error = (linear(x) - wanted).norm() / wanted.norm()
            found["linears"][module] = {
                "format": getattr(linear, "quant_format", None), "error": error.item(),
                "problems": [*missing, *unexpected]}
    print("RESULT " + json.dumps(found))
"""


def in_stock_comfyui(out, source):
    """SCRIPT on two files, in a ComfyUI that knows nothing of this pack."""
    script = f"PATH, SOURCE = {str(out)!r}, {str(source)!r}\n" + textwrap.dedent(SCRIPT)
    return subprocess.run(
        [HOST.python, "-c", script], cwd=HOST.root, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated"])
def test_the_stock_loader_takes_every_linear(tmp_path, level):
    source = model.write(tmp_path / "source.safetensors", model.weights())
    out = tmp_path / "q.safetensors"
    quantize_checkpoint(source, level, out, options=QuantOptions(protect=("layers.1.*.w2",)))
    done = in_stock_comfyui(out, source)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["model_type"] == "ideogram4_cond"
    linears = found["linears"]
    assert linears.keys() == {*model.linear_names(), *model.STEM_LINEARS}
    for name, linear in linears.items():
        plain = name in (*model.STEM_LINEARS, "layers.1.feed_forward.w2")
        assert linear["problems"] == [], name
        assert linear["format"] == (None if plain else "int8_tensorwise"), name
        assert linear["error"] < (1e-6 if plain else 0.02), name


def test_the_stock_loader_takes_treatments_of_its_own_container_and_refuses_smoothing(tmp_path):
    weights = model.weights()
    source = model.write(tmp_path / "source.safetensors", weights)
    plain = {"int8": 0.01, "int8 smooth 0.5": 0.005, "int8 rotated": 0.02}
    turned = {**plain, "int8 rotated": 0.007}
    layers = {
        f"conditional.{name}": replace(
            LayerStats.of(torch.ones(1, weight.shape[1]), weight),
            signal=torch.ones(1).double(),
            noise={c: torch.tensor([e * e]).double() for c, e in errors.items()},
        )
        for name in model.linear_names()
        for errors in [turned if name.endswith("w2") else plain]
        for weight in [weights[f"{name}.weight"]]
    }
    calibration = Calibration(layers, (0.0,))
    native, smoothed = tmp_path / "native.safetensors", tmp_path / "smoothed.safetensors"
    for path, treatment in ((native, "auto-native"), (smoothed, "auto")):
        options = QuantOptions(calibration=calibration, treatment=treatment)
        quantize_checkpoint(source, "INT8 W8A8", path, options=options)

    done = in_stock_comfyui(native, source)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    linears = json.loads(lines[0].removeprefix("RESULT "))["linears"]
    for name in model.linear_names():
        assert linears[name]["format"] == "int8_tensorwise", name
        assert linears[name]["problems"] == [], name
        assert linears[name]["error"] < 0.02, name

    refused = in_stock_comfyui(smoothed, source)
    assert refused.returncode != 0
    assert "ideogram4_quant_int8" in refused.stderr.splitlines()[-1]
