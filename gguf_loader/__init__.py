"""GGUF files: bounded header parsing and writing. Block formats live in ``ops.blocks``."""

from .metadata import ArrayRef
from .reader import GGUFHeader, GGUFTensor, header_of, read_header
from .types import TENSOR_TYPES, TYPE_NUMBERS, TensorType, ValueType
from .writer import GGUFSpec, GGUFWriteError, Typed, write_gguf

__all__ = [
    "TENSOR_TYPES",
    "TYPE_NUMBERS",
    "ArrayRef",
    "GGUFHeader",
    "GGUFSpec",
    "GGUFTensor",
    "GGUFWriteError",
    "TensorType",
    "Typed",
    "ValueType",
    "header_of",
    "read_header",
    "write_gguf",
]
