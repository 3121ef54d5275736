"""Ideogram 4 Quant: Ideogram 4.0 in ComfyUI at 8 and 4 bits.

ComfyUI imports this folder by path and calls :func:`comfy_entrypoint`; nothing of the host is
imported before that, so the package also works without ComfyUI.
"""

from .version import __version__ as __version__

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's V3 extension; called once by ComfyUI when it loads custom nodes."""
    from .nodes import Ideogram4QuantExtension

    return Ideogram4QuantExtension()
