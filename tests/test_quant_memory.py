"""Memory of a quantization: that of the largest tensor a few times over, not that of the file."""

import json
import math
import struct
import subprocess
import sys
import textwrap

import pytest
import torch

from ideogram4_quant.checkpoint.canonical import canonical_shapes
from ideogram4_quant.checkpoint.config import ModelConfig
from ideogram4_quant.ops.chunks import FED_BACK
from ideogram4_quant.tests import quant_model as model

pytest.importorskip("resource")

SCRIPT = """
    import json, resource, sys
    import torch
    from ideogram4_quant.checkpoint import open_checkpoint
    from ideogram4_quant.quant import Calibration, LayerStats, QuantOptions, quantize_checkpoint
    torch.set_num_threads(1)
    small, big, level, ending, calibrated = sys.argv[1:]

    def options(path):
        if not calibrated:
            return None
        shapes = open_checkpoint(path).shapes("conditional").items()
        layers = {
            "conditional." + name.removesuffix(".weight"): LayerStats.of(
                torch.randn(40, shape[1]), torch.zeros(shape)
            )
            for name, shape in shapes
            if name.startswith("layers.") and len(shape) == 2
        }
        return QuantOptions(calibration=Calibration(layers, (0.2, 0.7)))

    quantize_checkpoint(small, level, small + ending, options=options(small))  # fills caches
    chosen = options(big)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = quantize_checkpoint(big, level, big + ending, options=chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"extra": (peak - base) * unit, "size": report.size}))
"""


def sparse(path, copy="cond", **changes):
    """A bf16 file of zeros that takes no room; (bytes, values of the largest tensor)."""
    config = {**model.CONFIG, **changes}
    header, end, largest = {}, 0, 0
    for name, shape in canonical_shapes(ModelConfig(**config)).items():
        values = math.prod(shape)
        place = [end, end + 2 * values]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": place}
        end += 2 * values
        largest = max(largest, values)
    header["__metadata__"] = {"model_type": f"ideogram4_{copy}", "config": json.dumps(config)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end, largest


def extra_memory(tmp_path, level, calibrated=False, **changes):
    """(bytes above those of a small run, bytes of the source, values of its largest tensor)."""
    small, big = tmp_path / "small.safetensors", tmp_path / "big.safetensors"
    sparse(small)
    size, largest = sparse(big, **changes)
    ending = ".gguf" if level.startswith("Q") else ".out.safetensors"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), small, big, level, ending]
    command.append("calibrated" if calibrated else "")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] > size // 4
    print(f"{level}: {found['extra'] / 1e6:.0f} MB for {size / 1e6:.0f} MB, largest {largest:,}")
    return found["extra"], size, largest


@pytest.mark.parametrize("level", ["Q8_0", "INT8 W8A8"])
def test_memory_is_that_of_a_few_tensors(tmp_path, level):
    extra, size, largest = extra_memory(
        tmp_path, level, num_layers=12, num_attention_heads=4, intermediate_size=4096
    )
    assert size > 190e6
    assert extra < 8 * largest + 50e6  # 50 MB for chunks and the allocator
    assert extra < size / 2


@pytest.mark.parametrize("level", ["Q4_K", "INT8 W8A8 rotated"])
def test_a_calibration_adds_a_chunk_of_rows(tmp_path, level):
    """Error feedback goes by columns of four million weights at a time."""
    extra, size, largest = extra_memory(
        tmp_path, level, calibrated=True, num_layers=12, num_attention_heads=4,
        intermediate_size=4096,
    )  # fmt: skip
    assert size > 190e6
    assert extra < 8 * largest + 50e6 + 32 * min(largest, FED_BACK)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["Q8_0", "INT8 W8A8 rotated"])
def test_memory_on_a_file_of_several_gigabytes(tmp_path, level):
    """Of the largest tensor bf16, fp32 and the result are held: two, four and a byte a value."""
    extra, size, largest = extra_memory(
        tmp_path, level, num_layers=16, num_attention_heads=18, intermediate_size=12288
    )
    assert size > 3e9
    assert extra < 10 * largest + 50e6
    assert extra < size / 10


DELTA = """
    import json, sys
    import torch
    from ideogram4_quant.quant.delta import DeltaOptions, make_delta
    torch.set_num_threads(1)
    small, other_small, big, other_big, out = sys.argv[1:]

    def memory(kind):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(kind)) * 1024

    make_delta(small, other_small, out + ".small", DeltaOptions(rank=16))  # fills caches
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    base = memory("VmRSS")
    report = make_delta(big, other_big, out, DeltaOptions(rank=16))
    print(json.dumps({"extra": memory("VmHWM") - base, "size": report.size}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak in /proc")
def test_a_delta_holds_one_linear_at_a_time(tmp_path):
    """Of its two weights and their difference: fp32, and what its decomposition takes."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "big", "other_big")]
    large = {"num_layers": 24, "num_attention_heads": 1, "intermediate_size": 8192}
    noise = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    for number, path in enumerate(paths):
        changes = large if number > 1 else {}
        size, largest = sparse(path, ("cond", "uncond")[number % 2], **changes)
        if number % 2:  # the copies differ in every weight but the last few
            with open(path, "r+b") as file:
                start = 8 + struct.unpack("<Q", file.read(8))[0]
                file.seek(start)
                for _ in range(max(1, (size - start) // noise.nbytes)):
                    file.write(noise.view(torch.uint8).numpy().data[: size - start])
    command = [sys.executable, "-c", textwrap.dedent(DELTA), *paths, tmp_path / "lora.safetensors"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{found['extra'] / 1e6:.0f} MB for 2 x {size / 1e6:.0f} MB, largest {largest:,}")
    assert size > 150e6
    assert 4 * largest < found["extra"] < 20 * largest + 50e6
    assert found["extra"] < size / 2
