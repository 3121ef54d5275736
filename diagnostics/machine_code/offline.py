"""Compile shipped kernels for GPUs that are not here, and report on the machine code.

Triton's compiler needs neither a driver nor a device; its wheel brings ``cuobjdump`` and
``nvdisasm``. What is read from the cubin is exact: registers, spills, shared memory, instructions.
Time, cache behaviour and bank conflicts are not to be had this way.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BackendUnavailableError
from ...ops.kernels.configs import release
from . import sass


@dataclass(frozen=True)
class Variant:
    """One shipped specialization of a kernel: what ``triton.jit`` would build for a launch.

    ``module`` and ``function`` name the kernel inside this folder, ``signature`` the types of its
    run-time arguments (``"*bf16"``, ``"i32"``), ``constants`` its constexprs. ``divisible`` names
    the arguments that are multiples of 16, as aligned pointers and most strides are. ``fp_fusion``:
    products and sums may be fused, which rounds once in place of twice.
    """

    module: str
    function: str
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, int | bool | str]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    fp_fusion: bool = True


@dataclass(frozen=True)
class Report:
    """What the machine code of one variant on one architecture says. Sizes in bytes.

    ``loop_*`` count the main loop: the one with most matrix instructions. ``spills`` are loads and
    stores of local memory, in the whole kernel.
    """

    kernel: str
    label: str
    arch: int
    triton: str
    registers: int
    stack: int
    spills: int
    shared: int
    blocks_per_sm: int
    num_warps: int
    instructions: int
    ffma: int
    imma: int
    hmma: int
    ldgsts: int
    ldsm: int
    loop_instructions: int
    loop_imma: int
    loop_prmt: int
    loop_ldgsts: int
    loop_ldsm: int

    @property
    def per_imma(self) -> float | None:
        """Instructions per integer matrix instruction in the main loop; None if it has none."""
        return self.loop_instructions / self.loop_imma if self.loop_imma else None

    def as_dict(self) -> dict[str, Any]:
        """Every field, and ``per_imma``."""
        return dataclasses.asdict(self) | {"per_imma": self.per_imma}


@dataclass(frozen=True)
class Built:
    """A compiled variant: the report, the cubin and its disassembly."""

    report: Report
    cubin: bytes
    disassembly: str


def require_tools() -> tuple[str, Path]:
    """Triton's version and the folder of its binary tools; BackendUnavailableError says why not."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendUnavailableError(
            "TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter",
            hint="Unset TRITON_INTERPRET to compile kernels.",
        )
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailableError(
            f"Triton is not installed ({error})",
            hint="Install triton (Linux) or triton-windows (Windows).",
        ) from error
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in ("cuobjdump", "nvdisasm"):
        if not _tool(folder, tool).is_file():
            raise BackendUnavailableError(
                f"this build of Triton {triton.__version__} comes without {tool}",
                found=f"nothing at {_tool(folder, tool)}",
                hint="The wheels of triton on PyPI for Linux have it.",
            )
    return triton.__version__, folder


def kernel_of(variant: Variant) -> Any:
    """The ``triton.jit`` function that a variant names."""
    module = importlib.import_module(f"...ops.kernels.{variant.module}", __package__)
    return getattr(module, variant.function)


def build(variant: Variant, arch: int, kernel: Any = None) -> Built:
    """Compile ``variant`` for ``sm_arch`` and read its machine code. Takes 1 to 5 s.

    ``kernel`` is a ``triton.jit`` function to compile in place of the one that the variant names.
    Raises BackendUnavailableError without Triton or its tools; Triton's own errors pass through.
    """
    version, folder = require_tools()
    compiled = _compile(kernel_of(variant) if kernel is None else kernel, variant, arch)
    cubin = compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = sass.resources(_run(_tool(folder, "cuobjdump"), "-res-usage", path))
        disassembly = _run(_tool(folder, "nvdisasm"), "-c", path)
    report = _report(variant, arch, version, usage, compiled.metadata.shared, disassembly)
    return Built(report, cubin, disassembly)


def _report(
    variant: Variant,
    arch: int,
    version: str,
    usage: Mapping[str, int],
    shared: int,
    disassembly: str,
) -> Report:
    program = sass.parse(disassembly)
    whole, loop = program.counts(), sass.count(program.main_loop())
    return Report(
        kernel=variant.function.removesuffix("_kernel"),
        label=variant.label,
        arch=arch,
        triton=version,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=whole["LDL"] + whole["STL"],
        shared=shared,
        blocks_per_sm=sass.blocks_per_sm(arch, usage["REG"], shared, variant.num_warps),
        num_warps=variant.num_warps,
        instructions=whole.total(),
        ffma=whole["FFMA"] + whole["FFMA2"],
        imma=sum(whole[name] for name in sass.INTEGER_MMA),
        hmma=sum(whole[name] for name in sass.FLOAT_MMA),
        ldgsts=whole["LDGSTS"],
        ldsm=whole["LDSM"],
        loop_instructions=loop.total(),
        loop_imma=sum(loop[name] for name in sass.INTEGER_MMA),
        loop_prmt=loop["PRMT"],
        loop_ldgsts=loop["LDGSTS"],
        loop_ldsm=loop["LDSM"],
    )


def _compile(kernel: Any, variant: Variant, arch: int) -> Any:
    """The compiled kernel, through the part of Triton's interface that changed in 3.3."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    unknown = set(names) ^ (set(variant.signature) | set(variant.constants))
    if unknown:
        raise ValueError(f"{variant.function} and its signature differ in {sorted(unknown)}")
    divisible = [names.index(name) for name in variant.divisible]
    if release(triton.__version__) >= (3, 3):
        source = ASTSource(
            fn=kernel,
            signature={name: variant.signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(k),): v for k, v in variant.constants.items()},
            attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
        )
    else:
        from triton.backends.compiler import AttrsDescriptor

        source = ASTSource(
            fn=kernel,
            signature=dict(variant.signature),
            constants=dict(variant.constants),
            attrs=AttrsDescriptor.from_dict(
                {
                    "arg_properties": {"tt.divisibility": divisible, "tt.equal_to": []},
                    "cls": "AttrsDescriptor",
                }
            ),
        )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(folder: Path, name: str) -> Path:
    return folder / (f"{name}.exe" if os.name == "nt" else name)


def _run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        raise BackendUnavailableError(
            f"{Path(str(command[0])).name} failed with exit status {done.returncode}",
            found=(done.stderr or done.stdout).strip()[:500],
        )
    return done.stdout + done.stderr
