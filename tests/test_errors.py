"""The pack's errors: how a host shows their class, and that they cross between processes."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest

import ideogram4_quant
from ideogram4_quant import errors
from ideogram4_quant.engine.compare.cases import CompareError
from ideogram4_quant.errors import CheckpointError, Ideogram4QuantError
from ideogram4_quant.files.new_file import OutputExistsError
from ideogram4_quant.quant.errors import QuantOptionError

KINDS = [
    *(k for k in vars(errors).values() if isinstance(k, type)),
    CompareError,
    OutputExistsError,
    QuantOptionError,
]
KINDS = [kind for kind in KINDS if issubclass(kind, Ideogram4QuantError)]


def shown_by_the_host(kind: type) -> str:
    """As ComfyUI's execution.py names the class of an error."""
    return f"{kind.__module__}.{kind.__qualname__}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_class_shows_without_a_path(kind):
    assert shown_by_the_host(kind) == f"ideogram4_quant.{kind.__name__}"


def test_class_shows_so_in_a_folder_of_another_name(tmp_path):
    """ComfyUI gives a custom node's modules its path as their name."""
    name = "_custom_nodes_x_ideogram4-quant"
    source = importlib.util.spec_from_file_location(f"{name}.errors", errors.__file__)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    assert shown_by_the_host(module.CheckpointError) == "ideogram4_quant.CheckpointError"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_cross_between_processes(kind):
    error = kind("no such thing", file="a.gguf", found=3, hint="Take another.")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_of_the_library_is_among_its_names():
    named = importlib.import_module("ideogram4_quant.api").NAMES
    for name in (n for n in named if n.endswith("Error")):
        assert getattr(ideogram4_quant, name).__name__ == name
    assert issubclass(ideogram4_quant.CheckpointError, CheckpointError)
    assert pkgutil.resolve_name("ideogram4_quant:CheckpointError") is CheckpointError
