"""The Qwen3-VL text model as the host's CLIP: raw hidden states for conditioning, text by its head.

The transformer reads the raw hidden states after 13 decoder layers, so the final norm stays out of
the model; what writing needs beside it is read when something is written (`Writer`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.ideogram4 as host_encoder
import comfy.utils
import folder_paths
import torch

from ..captions.check import PLAIN_TEXT, STRIPPED, is_plain, is_stripped
from ..captions.instruction import PICTURE
from ..checkpoint import EncoderCheckpoint, open_encoder
from ..checkpoint.mapped import MappedFile
from ..errors import CheckpointError, NotIdeogram4Error, OpError
from .encoder_model import TextEncoder
from .hook_loras import refuse_hooks
from .host_ops import make_ops
from .mapped_weights import check_before_use, new_mapping, tell_host
from .writer import Writer, stop_tokens

logger = logging.getLogger(__name__)
MAX_TOKENS = 2048
HEAD_DIM = 128  # fixed in the host's Qwen3
LAYERS = 36
HOST_VOCABULARY = 151936  # the embedding rows of every released Qwen3-VL-8B
_ASKED = "thinking"  # what the host says of a text that is to be answered, not encoded
_PLACE = "<|image_pad|>"
# HF's name -> the host's, where a smaller model may differ
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)


def load_encoder(path: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A text encoder file or folder as the host's CLIP; weights stay as the file has them.

    Weights are dequantized layer by layer when they are used, as the host does for its own
    encoders. Raises CheckpointError and its kinds.
    """
    encoder = open_encoder(path)
    sizes = _sizes(encoder, path)
    dtype = torch.bfloat16
    progress = comfy.utils.ProgressBar(100)
    mapping = new_mapping()
    state = encoder.load(
        dtype=dtype,
        mapping=mapping,
        progress=lambda done, total: progress.update_absolute(round(100 * done / max(total, 1))),
    )
    state.pop("norm.weight", None)
    tell_host(state.values())
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    target = _Target(partial(_text_encoder, dtype), _Tokenizer)
    options = {"custom_operations": make_ops(dtype), "qwen3vl_8b_model_config": sizes}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=_tokenizer_data(encoder, path),
        parameters=comfy.utils.calculate_parameters(state),
        state_dict=[state],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    clip.tokenizer.mapped = () if mapping is None else mapping.files
    check_before_use(_layers(clip.cond_stage_model), mapping)
    words = clip.tokenizer.words
    clip.cond_stage_model.set_writer(Writer(encoder, dtype), stop_tokens(words))
    clip.patcher.cached_patcher_init = (_load_patcher, (path,))
    refuse_hooks(clip.patcher)
    return clip


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for name, m in model.named_modules() if name.endswith(".layers"))


def _load_patcher(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_encoder(path, disable_dynamic).patcher


def _text_encoder(weights: torch.dtype, device="cpu", dtype=None, model_options=None):
    """The model in the dtype of its weights, whatever the host would compute in."""
    return TextEncoder(device=device, dtype=weights, model_options=model_options)


class _Target:
    """What the host's CLIP asks of a model description."""

    def __init__(self, clip: Callable, tokenizer: type):
        self.params: dict = {}
        self.clip = clip
        self.tokenizer = tokenizer


def _sizes(encoder: EncoderCheckpoint, path: Path) -> dict:
    config = encoder.config
    for key, needed in (("head_dim", HEAD_DIM), ("num_hidden_layers", LAYERS)):
        if config[key] != needed:
            raise NotIdeogram4Error(
                f"this is not the text encoder of Ideogram 4: {key} differs",
                file=path,
                found=config[key],
                needed=needed,
                hint="Pick a Qwen3-VL-8B file.",
            )
    return {key: config[key] for key in _SIZES}


def _tokenizer_data(encoder: EncoderCheckpoint, path: Path) -> dict:
    """Nothing for the released vocabulary, whose tokenizer the host has; else the folder's own."""
    if encoder.config["vocab_size"] == HOST_VOCABULARY:
        return {}
    if encoder.tokenizer_dir is None:
        raise CheckpointError(
            "an encoder with its own vocabulary needs its tokenizer",
            file=path,
            found=f"{encoder.config['vocab_size']} tokens and no tokenizer.json beside the weights",
            needed=f"tokenizer.json, or the {HOST_VOCABULARY} tokens of Qwen3-VL",
            hint="Copy the whole folder of the encoder, not only its weights.",
        )
    from transformers import AutoTokenizer  # a third of a second, which the host's start is spared

    # the settings of the host's Qwen3VLTokenizer, on another folder
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        str(encoder.tokenizer_dir),
        pad_with_end=False,
        embedding_size=encoder.config["hidden_size"],
        embedding_key="qwen3vl_8b",
        tokenizer_class=AutoTokenizer,
        has_start_token=False,
        has_end_token=False,
        pad_to_max_length=False,
        max_length=99999999,
        min_length=1,
        pad_token=0,
    )
    return {"qwen3vl_8b_tokenizer_class": tokenizer}


class _Tokenizer(host_encoder.Ideogram4Tokenizer):
    """The host's tokenizer. Of a caption plain text is warned of; JSON that the page took the
    braces from, and more than the trained length, is an error. A question to the language model
    may be anything, with pictures where it has a place for them."""

    mapped: tuple[MappedFile, ...] = ()

    @property
    def words(self):
        """transformers' tokenizer."""
        return getattr(self, self.clip).tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        for file in self.mapped:  # the weights are moved next
            file.check()
        if _ASKED in kwargs:
            return self._asked(text, return_word_ids, **kwargs)
        if is_stripped(text):
            raise OpError("the caption arrived without its braces", hint=STRIPPED)
        if text.strip() and is_plain(text):
            logger.warning(PLAIN_TEXT)
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        found = sum(len(chunk) for chunk in tokens[self.clip_name])
        if found > MAX_TOKENS:
            raise OpError(
                "the caption is too long",
                found=f"{found} tokens",
                needed=f"at most {MAX_TOKENS}",
                hint="Shorten the descriptions, or describe fewer elements.",
            )
        return tokens

    def _asked(self, text: str, return_word_ids: bool, image=None, **kwargs) -> dict:
        """A turn to the language model; ``image`` [B, H, W, 3] stands before its words."""
        pictures = [] if image is None else list(image.split(1))
        if pictures and PICTURE not in text:
            text = PICTURE * len(pictures) + text
        for kind in ("video", "audio"):
            if kwargs.pop(kind, None) is not None:
                raise OpError(f"this encoder takes no {kind}", hint=f"Disconnect the {kind}.")
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        place = self.words.convert_tokens_to_ids(_PLACE)
        waiting = iter(pictures)
        for chunk in tokens[self.clip_name]:
            for i, token in enumerate(chunk):
                picture = next(waiting, None) if token[0] == place else None
                if picture is not None:
                    shown = {"type": "image", "data": picture, "original_type": "image"}
                    chunk[i] = (shown, *token[1:])
        return tokens
