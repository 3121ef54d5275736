"""Where the Triton kernels are available; their tests, interpreted and on a GPU where one is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_apart(name: str, **environment: str) -> None:
    """Run another test file of this folder in a process with other environment variables."""
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        "test_kernels_products.py",
        "test_kernels_rows.py",
        "test_kernels_fused.py",
        "test_kernels_packed.py",
        "test_kernels_decode.py",
        "test_kernels_rope.py",
    ],
)
@pytest.mark.parametrize(
    "device",
    [
        "interpreted",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
        ),
    ],
)
def test_against_the_formulas(name, device):
    interpret = {"TRITON_INTERPRET": "1"} if device == "interpreted" else {}
    run_apart(name, KERNEL_TESTS=device, **interpret)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is not here")
def test_launchers_with_a_stub_of_the_driver():
    run_apart("test_kernels_launchers.py", KERNELS_STUB_DRIVER="1")


@needs_triton
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_say_why_not(device):
    from ideogram4_quant.ops.kernels import available

    ready, reason = available(device)
    assert not ready
    assert device in reason


def test_without_triton_the_reason_names_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from ideogram4_quant.ops import kernels\n"
        "print(kernels.available('cuda'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "(False, " in done.stdout
    assert "pip install triton" in done.stdout


def test_importing_the_package_loads_neither_torch_nor_triton():
    code = (
        "import sys, ideogram4_quant.ops.kernels, ideogram4_quant.diagnostics.machine_code.cli\n"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
