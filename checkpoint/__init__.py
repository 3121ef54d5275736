"""Every kind of Ideogram 4 file in, canonical names out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import lazy

if TYPE_CHECKING:
    from .checkpoints import Checkpoint, check_pair
    from .config import ModelConfig
    from .encoders import EncoderCheckpoint, open_encoder
    from .opening import open_checkpoint
    from .writers import TensorSpec, write_safetensors

__all__ = [
    "Checkpoint",
    "EncoderCheckpoint",
    "ModelConfig",
    "TensorSpec",
    "check_pair",
    "open_checkpoint",
    "open_encoder",
    "write_safetensors",
]

__getattr__ = lazy.names(
    __name__,
    {
        "Checkpoint": "checkpoints",
        "EncoderCheckpoint": "encoders",
        "ModelConfig": "config",
        "TensorSpec": "writers",
        "check_pair": "checkpoints",
        "open_checkpoint": "opening",
        "open_encoder": "encoders",
        "write_safetensors": "writers",
    },
)
