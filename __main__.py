"""``python -m ideogram4_quant`` or ``python FOLDER``: the same command line as ``ideogram4-quant``.

The second form needs no installation: it runs the pack where it lies, also as
``custom_nodes/ideogram4-quant``, whose name is none that Python could import.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _import_folder() -> None:
    folder = Path(__file__).resolve().parent
    spec = spec_from_file_location(
        "ideogram4_quant", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    # Python put the folder itself here; its `nodes` or `tests` must not stand for anybody else's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


if not __package__:
    _import_folder()
    __spec__ = None  # makes spawned processes run this file as well, so that they find the package

if __name__ == "__main__":
    from ideogram4_quant.cli import main

    sys.exit(main())
