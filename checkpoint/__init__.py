"""Every kind of Ideogram 4 file in, canonical names out."""

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
