"""ComfyUI nodes: the only folder that imports the host.

The extension is imported on first use, so that the pure modules in here (captions, guidance,
LoRA names, reports) can be imported and tested without ComfyUI.
"""


def __getattr__(name: str):
    if name == "Ideogram4QuantExtension":
        from .extension import Ideogram4QuantExtension

        return Ideogram4QuantExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
