"""Fixtures that more than one test file needs: the real ComfyUI, and models to run in it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ideogram4_quant.tests.host.browser import Browser, find_browser
from ideogram4_quant.tests.host.locate import Host, find_host
from ideogram4_quant.tests.host.server import (
    PACK_FOLDER,
    Server,
    environment,
    make_base,
    reason_it_cannot_start,
)
from ideogram4_quant.tests.host.workflow_page import open_page

# helpers whose assertions shall say what they compared
pytest.register_assert_rewrite(
    "ideogram4_quant.tests.checkpoint_weights",
    "ideogram4_quant.tests.encoder_weights",
    "ideogram4_quant.tests.kernel_checks",
)

SCRIPTS = Path(__file__).resolve().parent / "host" / "scripts"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured choices of the tests are not those of the user."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setenv("LOCALAPPDATA", folder)
        yield


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A real ComfyUI; tests that need one skip with the reason where there is none that starts."""
    found = find_host()
    if isinstance(found, str):
        pytest.skip(found)
    broken = reason_it_cannot_start(found, tmp_path_factory.mktemp("first_start"))
    if broken is not None:
        pytest.skip(broken)
    return found


@pytest.fixture(scope="session")
def base(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a ComfyUI of its own, with the pack in custom_nodes."""
    return make_base(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(params=[False, True], ids=["grad mode", "inference mode"])
def mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the test runs in inference mode: once not, once so."""
    with torch.inference_mode(request.param):
        yield request.param


@pytest.fixture
def nothing_measured() -> Iterator[None]:
    """No measured choices of the CPU, before or after."""
    from ideogram4_quant.ops.tuning import choices

    cpu = torch.device("cpu")
    choices._TABLES.pop(cpu, None)
    yield
    choices._TABLES.pop(cpu, None)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaN and 85, so an output that a kernel leaves unwritten fails."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A small random transformer by canonical names; a test may change it."""
    from ideogram4_quant.tests import fixtures_files

    return fixtures_files.model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A small random Ideogram 4: files, and diffusers' models with the same weights."""
    from ideogram4_quant.tests.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory):
    """The committed pocket model, in the same shape as `tiny`."""
    from ideogram4_quant.pocket import comfy_vae, evaluate, paths
    from ideogram4_quant.tests.tiny_model import TinyModel

    vae_file = tmp_path_factory.mktemp("pocket") / paths.vae_file().name
    comfy_vae.write_comfy_vae(vae_file)
    files = paths.dit_path("cond"), paths.dit_path("uncond")
    loaded = evaluate.load_pocket()
    text_model = loaded.encoder.model
    parts = loaded.cond, loaded.uncond, text_model, loaded.vae
    return TinyModel(*files, paths.encoder_dir(), paths.vae_dir(), vae_file, *parts)


@pytest.fixture(scope="session")
def models(base: Path) -> Path:
    """`base`'s models folder with the pocket model in it: BF16, INT8 W8A8, Q8_0 and Q4_K."""
    from ideogram4_quant.pocket import comfy_vae, paths
    from ideogram4_quant.quant import quantize_checkpoint

    folder = base / "models"
    transformers = folder / "diffusion_models"
    for copy, name in (("cond", "conditional"), ("uncond", "unconditional")):
        source = paths.dit_path(copy)
        shutil.copy(source, transformers / source.name)
        for level, ending in (("INT8 W8A8", "safetensors"), ("Q8_0", "gguf"), ("Q4_K", "gguf")):
            out = transformers / f"pocket-{level.replace(' ', '_')}-{name}.{ending}"
            quantize_checkpoint(source, level, out, copy=name)
    encoder = paths.encoder_dir()
    shutil.copytree(encoder, folder / "text_encoders" / encoder.name)
    comfy_vae.write_comfy_vae(folder / "vae" / paths.vae_file().name)
    return folder


@pytest.fixture(scope="session")
def server(host: Host, base: Path, models: Path) -> Iterator[Server]:
    """A running ComfyUI with the pack and the pocket model; one for the whole session."""
    running = Server(host, base)
    yield running
    running.close()


@pytest.fixture
def written_to(models: Path) -> Iterator[Path]:
    """models/diffusion_models, which all modules' servers share; afterwards as before."""
    folder = models / "diffusion_models"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Browser]:
    """A browser with the server's page, its graph empty."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found (set CHROMIUM)")
    page = Browser(program)
    open_page(page, server.url)
    yield page
    page.close()


@pytest.fixture(scope="session")
def in_host(host: Host, base: Path) -> Callable[..., dict]:
    """Runs a script of tests/host/scripts in the host's Python; returns what it reports."""

    def run(script: str, *arguments: str | Path, seconds: float = 600) -> dict:
        pack = base / "custom_nodes" / PACK_FOLDER
        command = [host.python, SCRIPTS / script, host.root, pack, base, *arguments]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment(),
            cwd=base,
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not found:
            pytest.fail(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}")
        return json.loads(found[-1].removeprefix("RESULT "))

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Beside a failure of a test that used the server: the end of the server's log."""
    report = yield
    used = item.funcargs.get("server") if isinstance(item, pytest.Function) else None
    if report.failed and used is not None:
        report.sections.append(("ComfyUI", used.log[-5000:]))
    return report
