"""Ideogram 4 Quant: Ideogram 4.0 in ComfyUI at 8 and 4 bits.

ComfyUI imports this folder by path and calls :func:`comfy_entrypoint`; nothing of the host is
imported before that, so the package also works without ComfyUI.
As a library it has the names of ``api.NAMES``, each imported when it is first asked for.
"""

from .version import __version__ as __version__

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's V3 extension; called once by ComfyUI when it loads custom nodes."""
    from .nodes import Ideogram4QuantExtension

    return Ideogram4QuantExtension()


def __getattr__(name: str) -> object:
    """A name of the library."""
    if not name.startswith("_"):
        import importlib

        api = importlib.import_module(".api", __name__)
        if name in api.NAMES:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import importlib

    names = importlib.import_module(".api", __name__).NAMES
    return sorted({*globals(), *names})
