"""No code comes from data, no path from a file, and nothing asks a network."""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ideogram4_quant.tests.test_package import ROOT, packages

# What turns bytes into code, wherever it is imported from
_CODE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
_CODE_CALLS = {"eval", "exec", "compile", "__import__"}
# What speaks to a network; compare on a cluster is ray's, asked for by name and imported there
_NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp"}
_HUBS = {"huggingface_hub", "hf_hub_download", "snapshot_download", "modelscope"}
# Calls of POSIX alone, and how a place that uses one shows that it knows
_POSIX = {
    *("fork", "kill", "killpg", "setsid", "getuid", "setuid", "mkfifo", "link", "chown", "nice"),
    *("posix_fallocate", "posix_fadvise", "sendfile", "statvfs", "sched_setaffinity", "flock"),
    *("sched_getaffinity", "getrusage", "setrlimit", "SIGKILL", "SIGALRM", "setitimer", "alarm"),
}
_POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
# What writes a file, and what shows that it becomes one under its name when it is whole
_WRITES = {"write_text", "write_bytes", "savefig", "copyfile", "copy2", "save_file"}
_WHOLE = ("replaced(", "new_file(", "TemporaryDirectory(", "self._write(", "BytesIO(")
# What looks like a folder on the left of a slash, and what keeps the right side inside of it
_A_FOLDER = re.compile(r"Path\(|[Ff]older|[Rr]oot|director|path\b")
_KEPT_INSIDE = ("new_name(", "is_relative_to(", "get_save_image_path(")
_GUARDS = ("os.name", "hasattr(", "sys.platform", "platform.system", "is not None", "getattr(")


def sources() -> Iterator[tuple[str, ast.Module, str]]:
    """(path, tree, text) of every module of the package."""
    for folder in packages():
        for file in sorted((ROOT / folder).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            yield file.relative_to(ROOT).as_posix(), ast.parse(text), text


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module or ""
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def called(node: ast.Call) -> str:
    """``torch.load`` of ``torch.load(...)``."""
    return ast.unparse(node.func)


def test_nothing_turns_bytes_into_code():
    found = []
    for path, tree, _ in sources():
        found += [
            f"{path}:{node.lineno} imports {name}"
            for node, name in imported(tree)
            if name.split(".")[0] in _CODE_MODULES or name == "torch.package"
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in _CODE_CALLS:
                found.append(f"{path}:{node.lineno} calls {called(node)}")
    assert found == []


def test_torch_load_reads_weights_only():
    """Literally, in every call; ``yaml.load`` and ``numpy.load`` with pickles do not occur."""
    found, calls = [], 0
    for path, tree, _ in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = called(node), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load":
                calls += 1
                if keywords.get("weights_only") != "True":
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
            if name in ("yaml.load", "torch.jit.load") or keywords.get("allow_pickle") == "True":
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert found == []
    assert calls  # the search sees them


def test_no_torch_load_where_files_of_strangers_come_in():
    folders = ("checkpoint/", "gguf_loader/", "nodes/", "ops/", "quant/", "sampling/")
    for path, _, text in sources():
        if path.startswith(folders):
            assert "torch.load" not in text, path
            assert "load_torch_file" not in text, path  # the host's, which reads pickles too


def test_nothing_imports_a_network():
    found = []
    for path, tree, _ in sources():
        for node, name in imported(tree):
            if {*name.split(".")} & _HUBS or name.split(".")[0] in _NETWORK:
                found.append(f"{path}:{node.lineno} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node).endswith("from_pretrained"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if keywords.get("local_files_only") != "True":
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
                # without a word the Auto classes ask the terminal whether to run the folder's code
                asks = re.search(r"\bAuto[A-Z]", called(node)) is not None
                if asks and keywords.get("trust_remote_code") != "False":
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
            trusting = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
            if trusting and ast.unparse(node.value) != "False":
                found.append(f"{path}:{node.lineno} trusts remote code")
            if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template":
                found.append(f"{path}:{node.lineno} runs a template of a file")
    assert found == []


def test_posix_calls_are_guarded():
    found = []
    for path, tree, text in sources():
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in _POSIX:
                owner = ast.unparse(node.value)
                if owner not in ("os", "signal", "fcntl", "resource"):
                    continue
                around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
                where = ast.get_source_segment(text, around[-1]) if around else ""
                if not any(guard in where for guard in _GUARDS):
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        tried = {
            id(inner)
            for block in ast.walk(tree)
            if isinstance(block, ast.Try)
            for inner in ast.walk(block)
        }
        found += [
            f"{path}:{node.lineno} imports {name}"
            for node, name in imported(tree)
            if name in _POSIX_MODULES and id(node) not in tried
        ]
    assert found == []


def test_every_writer_goes_through_new_file():
    """No module opens a file for writing by itself: what it writes is whole or not there.

    But pocket/, which makes what is committed here, and nothing where it is installed.
    """
    found, seen = [], 0
    for path, tree, text in sources():
        if path == "files/new_file.py" or path.startswith("pocket/"):
            continue
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            name = called(node).rpartition(".")[2]
            mode = ast.unparse(node.args[1]) if name == "open" and len(node.args) > 1 else ""
            writes = name in _WRITES or (name == "open" and any(c in mode for c in "wax+"))
            if not writes:
                continue
            seen += 1
            around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
            where = "".join(ast.get_source_segment(text, f) for f in around)
            if not any(guard in where for guard in _WHOLE):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert found == []
    assert seen > 5  # the search sees them


def test_paths_of_widgets_are_looked_up_and_never_joined():
    """In nodes/, a name from a workflow becomes a path through a listing alone."""
    found = []
    for path, tree, text in sources():
        if not path.startswith("nodes/"):
            continue
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
                continue
            if not _A_FOLDER.search(ast.unparse(node.left)) or isinstance(node.right, ast.Constant):
                continue
            around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
            where = ast.get_source_segment(text, around[-1]) if around else ""
            if not any(check in where for check in _KEPT_INSIDE):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in (
                *("os.path.join", "folder_paths.get_full_path", "open"),
                "folder_paths.get_full_path_or_raise",
            ):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert found == []


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "..\\secret.safetensors", "/etc/passwd", "C:\\secret", ""),
        *("inside/../../secret.safetensors", "./inside.safetensors", "~/x", "inside.safetensors/"),
        "\0",
    ],
)
def test_a_listing_knows_its_own_names_only(tmp_path: Path, name: str):
    from ideogram4_quant.checkpoint.listing import list_files
    from ideogram4_quant.errors import CheckpointError

    root = tmp_path / "models"
    root.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (root / "inside.safetensors").write_bytes(b"")
    listing = list_files("models", [str(root)])
    assert listing.names == ["inside.safetensors"]
    assert listing.problem(name) is not True
    with pytest.raises(CheckpointError, match="no such file"):
        listing.path(name)


def test_quantize_load_sample_and_compare_need_no_network(tiny, tmp_path: Path, monkeypatch):
    """With every socket an error; the nodes are tried alike in test_host_trust.py."""
    from ideogram4_quant.engine.compare.cases import Case, System
    from ideogram4_quant.engine.compare.render import Plan, Settings
    from ideogram4_quant.engine.compare.score import score
    from ideogram4_quant.engine.compare.store import Store
    from ideogram4_quant.engine.compare.workers import render
    from ideogram4_quant.quant import quantize_checkpoint

    tried = []

    class Refused(socket.socket):
        def __init__(self, *arguments, **keywords):
            tried.append(arguments)
            raise OSError("no network in this test")

    def refuse(*arguments, **keywords):
        tried.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", Refused)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(OSError, match="no network"):
        socket.socket()
    files = []
    for source in (tiny.conditional_file, tiny.unconditional_file):
        files.append(tmp_path / f"q8-{source.name}.gguf")
        quantize_checkpoint(source, "Q8_0", files[-1])
    systems = [
        System("BF16", tiny.conditional_file, tiny.unconditional_file),
        System("Q8_0", *files),
    ]
    cases = [Case("a word", 0, 64, 32)]
    settings = Settings(tiny.encoder_dir, tiny.vae_dir, "turbo", steps=2, read=False, device="cpu")
    plan = Plan(systems, cases, settings, Store(tmp_path / "store"))
    assert render(plan) == 2
    result = score("BF16", [plan.rendered(system) for system in systems], cases)
    assert result.system("Q8_0").values["psnr"]
    assert len(tried) == 1  # the one of this test
