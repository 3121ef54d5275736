"""A running ComfyUI: started on a free port with folders of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .locate import PACK, Host

PACK_FOLDER = "ideogram4-quant.test-copy"  # hyphens and a dot, as a user's folder may have
_START_SECONDS = 600  # ten at rest; a loaded machine takes its time
_ANSWER_SECONDS = 300


@dataclass(frozen=True)
class Run:
    """How a graph ended: the output of every node, or the error of the one that failed."""

    prompt_id: str
    status: str
    outputs: dict
    messages: list
    cached: list[str]

    @property
    def error(self) -> dict:
        """The host's report of the failure; empty where there was none."""
        return next((m[1] for m in self.messages if m[0] == "execution_error"), {})


class Rejected(Exception):
    """The server refused a graph before running it; `.report` is its answer."""

    def __init__(self, report: dict):
        super().__init__(json.dumps(report, indent=1))
        self.report = report


def make_base(base: Path) -> Path:
    """The folders of a ComfyUI with this pack in custom_nodes, under a name with a hyphen."""
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name in ("diffusion_models", "text_encoders", "vae", "loras", "embeddings"):
        (base / "models" / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_FOLDER
    if not link.exists():
        link.symlink_to(PACK, target_is_directory=True)
    return base


def environment() -> dict[str, str]:
    """The child's environment: one thread, and nothing of this package's own path.

    ``COMFY_KITCHEN_PATH``, a folder with another comfy-kitchen, stands before the host's own.
    """
    child = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kitchen = os.environ.get("COMFY_KITCHEN_PATH")
    return (
        child
        | ({"PYTHONPATH": kitchen} if kitchen else {})
        | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    )


def reason_it_cannot_start(host: Host, base: Path) -> str | None:
    """None where the host starts by itself, without any custom node, and ends; else the end of its
    log. So a half-installed Python is one reason, not a failure in every test."""
    command = [str(host.python), str(host.root / "main.py"), "--cpu", "--quick-test-for-ci"]
    command += ["--base-directory", str(base), "--disable-all-custom-nodes"]
    command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_START_SECONDS,
            cwd=base, env=environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the ComfyUI in {host.root} cannot start with {host.python}: {error}"
    if done.returncode == 0:
        return None
    log = f"{done.stdout}\n{done.stderr}".strip()[-3000:]
    return f"the ComfyUI in {host.root} cannot start with {host.python}:\n{log}"


class Server:
    """A ComfyUI process; `close` ends it."""

    def __init__(self, host: Host, base: Path, *arguments: str):
        self.base, self.log_path = base, base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(host.python), str(host.root / "main.py"), "--cpu", "--port", str(port)]
        command += ["--base-directory", str(base), "--disable-auto-launch"]
        command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}", *arguments]
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, cwd=base, env=environment()
        )
        self._wait_until_up()

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def alive(self) -> bool:
        """Whether the process still runs and answers."""
        return self._process.poll() is None and "system" in self.get("/system_stats")

    def get(self, path: str):
        """The JSON behind a path."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """What lies behind a path."""
        with urllib.request.urlopen(self.url + path, timeout=_ANSWER_SECONDS) as answer:
            return answer.read()

    def fetch(self, image: dict) -> bytes:
        """The bytes of a picture that a node saved."""
        return self.read(f"/view?{urllib.parse.urlencode(image)}")

    def post(self, path: str, body: dict):
        """The JSON answer to a JSON body; Rejected where the server says no."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                data = answer.read()
                return json.loads(data) if data else {}
        except urllib.error.HTTPError as error:
            raise Rejected(json.loads(error.read())) from None

    def run(self, graph: dict, *, seconds: float = 300, extra: dict | None = None) -> Run:
        """Queues a graph (API format) and waits for its end."""
        body = {"prompt": graph, "extra_data": {"extra_pnginfo": extra or {}}}
        prompt_id = self.post("/prompt", body)["prompt_id"]
        return self.wait(prompt_id, seconds)

    def wait(self, prompt_id: str, seconds: float = 300) -> Run:
        """Waits for the end of a queued graph."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                messages = entry["status"]["messages"]
                cached = [n for m in messages if m[0] == "execution_cached" for n in m[1]["nodes"]]
                return Run(
                    prompt_id, entry["status"]["status_str"], entry["outputs"], messages, cached
                )
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the graph did not end; the server's log:\n{self.log[-5000:]}")

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        self._process.kill()
        raise AssertionError(f"ComfyUI did not start; its log:\n{self.log[-5000:]}")
