"""Names of a package that are imported when they are first asked for.

The command line checks its arguments before torch is there, which takes seconds to import; what it
needs of a package's small modules must not bring the large ones along.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def names(package: str, where: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a package: ``where`` has the module, in it, of each name."""

    def find(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{where[name]}", package), name)

    return find
