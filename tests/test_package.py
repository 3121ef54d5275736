"""The pack as a package: what it imports, what it ships, how a host finds its nodes."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
# folders of the checkout that are no part of the package
OUTSIDE = {"tests", "benchmarks", "build", "dist", "demo-out"}
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server")


def packages() -> list[Path]:
    """Every folder of the package, relative to the root."""
    found = []
    for init in sorted(ROOT.rglob("__init__.py")):
        folder = init.parent.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in folder.parts)
        if not hidden and (not folder.parts or folder.parts[0] not in OUTSIDE):
            found.append(folder)
    return found


def dotted(folder: Path) -> str:
    return ".".join(("ideogram4_quant", *folder.parts))


def modules(*, nodes: bool) -> list[str]:
    """Modules of the package; with `nodes` those of nodes/ alone, else all the others."""
    names = []
    for folder in packages():
        for file in sorted((ROOT / folder).glob("*.py")):
            stem = () if file.stem == "__init__" else (file.stem,)
            name = ".".join((dotted(folder), *stem))
            if (folder.parts[:1] == ("nodes",)) == nodes and file.stem != "__main__":
                names.append(name)
    return names


def python(code: str, *arguments: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_outside_nodes_imports_the_host():
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps([n for n in json.loads(sys.argv[2]) if n in sys.modules]))"
    )
    names = modules(nodes=False)
    assert len(names) > 20
    assert json.loads(python(code, json.dumps(names), json.dumps(HOST_MODULES))) == []


def test_importing_the_package_is_light():
    code = (
        "import sys, ideogram4_quant\n"
        "print(sorted(n for n in ('torch', 'diffusers', 'transformers') if n in sys.modules))"
    )
    assert python(code).strip() == "[]"


def test_imports_inside_the_package_are_relative():
    own = {folder.parts[0] for folder in packages() if folder.parts} | {"ideogram4_quant", "cli"}
    offenders = []
    for name in modules(nodes=True) + modules(nodes=False):
        path = ROOT.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                absolute = isinstance(node, ast.ImportFrom) and node.level == 0
                imported = [node.module] if absolute else []
            offenders += [(name, target) for target in imported if target.split(".")[0] in own]
    assert offenders == []


# as in docs/architecture.md: each row imports rows below it, never above
ORDER = (
    {"cli"},
    {"nodes"},
    {"pocket", "engine"},
    {"diagnostics"},
    {"quant"},
    {"cards"},
    {"checkpoint"},
    {"sampling", "gguf_loader", "captions"},
    {"ops"},
    {"files"},
    {"errors", "version", "lazy", "command_help"},
)


def rank(module: str) -> int:
    """The row of a module's first folder; the package's own face stands above all."""
    room = [*module.split("."), ""][1]
    return next((i for i, row in enumerate(ORDER) if room in row), -1)


def test_listed_packages_are_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["packages"] == [dotted(folder) for folder in packages()]


def test_no_node_mappings_that_would_hide_the_entrypoint():
    code = (
        "import ideogram4_quant as p, inspect\n"
        "print(hasattr(p, 'NODE_CLASS_MAPPINGS'), inspect.iscoroutinefunction(p.comfy_entrypoint))"
    )
    assert python(code).split() == ["False", "True"]


def test_loads_by_path_under_any_name():
    code = (
        "import importlib, importlib.util, sys\n"
        "name, path = '/some/where/my-nodes_x_2', sys.argv[1]\n"
        "spec = importlib.util.spec_from_file_location(name, path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[name] = module\n"
        "spec.loader.exec_module(module)\n"
        "levels = importlib.import_module(name + '.checkpoint.levels')\n"
        "linear = importlib.import_module(name + '.ops.linear')\n"
        "print(levels.AUTO, linear.LinearOptions().backend, 'ideogram4_quant' in sys.modules)"
    )
    assert python(code, str(ROOT / "__init__.py")).split() == ["auto", "auto", "False"]


def test_every_node_has_a_help_page():
    ids = {
        node.value.value
        for file in (ROOT / "nodes").glob("node_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "node_id"
    }
    pages = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert ids == pages
    assert all(name.startswith("Ideogram4Quant") for name in ids)


@pytest.mark.slow
def test_wheel_holds_weights_workflows_and_help(tmp_path):
    source = tmp_path / "source"  # the build leaves folders behind
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", *OUTSIDE - {"tests"})
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run([*command, "--outdir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [
        *ROOT.glob("web/docs/*.md"),
        ROOT / "nodes" / "costs.json",
        *ROOT.glob("workflows/*.json"),
        *ROOT.glob("subgraphs/*.json"),
        *(p for p in ROOT.glob("pocket/weights/**/*") if p.is_file()),
        *(ROOT / folder / "__init__.py" for folder in packages()),
    ]
    for path in shipped:
        assert f"ideogram4_quant/{path.relative_to(ROOT).as_posix()}" in names
    assert not any(name.startswith("ideogram4_quant/tests/") for name in names)


def test_dependencies_are_ranges_with_a_reason_and_a_licence():
    """Each has bounds, a comment beside or above it, and a line in NOTICE."""
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    own = [line.partition("#")[0].strip() for line in required.splitlines()]
    extras = tomllib.loads(text)["project"]["optional-dependencies"].values()
    wanted = [*filter(None, own), *(each for extra in extras for each in extra)]
    lines = f"{required}\n{text}".splitlines()
    for each in wanted:
        name, bounds = re.fullmatch(r"([\w.-]+)([^;]*).*", each).groups()
        assert re.search(r"[<>~]|\*", bounds), f"no range: {each}"
        at = next(i for i, line in enumerate(lines) if line.startswith(each) or f'"{each}"' in line)
        commented = "#" in lines[at] or lines[at - 1].lstrip().startswith("#")
        assert commented, f"no reason: {each}"
        assert re.search(rf"\b{name}\b", notice), f"no licence in NOTICE: {each}"
    assert len(wanted) > 15


def test_the_tests_that_trust_names_exist():
    """A file is named once, and ``::test`` after it means one of that file."""
    named, source = 0, ""
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    for file, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8") if file else source
        named += bool(file or test)
        assert not test or f"def {test}(" in source, (file, test)
    assert named > 40


def imported(file: Path, name: str, known: set[str]) -> set[str]:
    """Modules of ``known`` that a file names in its imports, wherever in it they stand."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            base = [*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                found.add(inside if inside in known else base)
    return found & known - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when modules that import nothing left, or are imported by nothing, are gone."""
    left = {name: set(targets) for name, targets in graph.items()}
    while True:
        wanted = set().union(*left.values()) if left else set()
        gone = {name for name, targets in left.items() if not targets or name not in wanted}
        if not gone:
            return sorted([name, *sorted(targets)] for name, targets in left.items())
        left = {name: targets - gone for name, targets in left.items() if name not in gone}


def test_the_search_for_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [
        ["b", "c"],
        ["c", "b"],
    ]


def imports() -> dict[str, set[str]]:
    """Every module and the modules of the package that it imports."""
    names = [*modules(nodes=True), *modules(nodes=False)]
    graph = {}
    for name in names:
        path = ROOT.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        graph[name] = imported(file, name, set(names))
    return graph


def test_no_module_imports_itself_over_others():
    """Imports inside functions and for type checkers count as well."""
    graph = imports()
    assert sum(map(len, graph.values())) > 300
    assert circles(graph) == []


def test_imports_point_down_the_table_of_rooms():
    graph = imports()
    upward = [
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if rank(target) < rank(name)
    ]
    assert upward == []
    assert {"cli", "nodes", "ops"} <= {name.split(".")[1] for name in graph if "." in name}
