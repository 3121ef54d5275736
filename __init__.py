"""Ideogram 4 Quant: Ideogram 4.0 in ComfyUI at 8 and 4 bits.

ComfyUI imports this folder by path and calls :func:`comfy_entrypoint`; nothing of the host is
imported before that, so the package also works without ComfyUI.
As a library it has the names of ``api.NAMES``, each imported when it is first asked for.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's V3 extension; called once by ComfyUI when it loads custom nodes."""
    from .nodes import Ideogram4QuantExtension

    return Ideogram4QuantExtension()


# A test runner loads this file by itself where the folder's name is none that Python could import.
_IS_PACKAGE = "__path__" in globals()


def __getattr__(name: str) -> object:
    """The version, and the names of the library."""
    import importlib

    if _IS_PACKAGE and name == "__version__":
        return importlib.import_module(".version", __name__).__version__
    if _IS_PACKAGE and not name.startswith("_"):
        api = importlib.import_module(".api", __name__)
        if name in api.NAMES:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import importlib

    names = importlib.import_module(".api", __name__).NAMES if _IS_PACKAGE else ()
    return sorted({*globals(), "__version__", *names})
