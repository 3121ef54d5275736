"""Byte-level BPE of 512 entries in the shape of Qwen's tokenizer.

Trained on captions without their words, so no capital letters ever merge: one letter, one token.
"""

import random
from dataclasses import replace
from pathlib import Path

from .data import random_prompt

VOCABULARY = 512
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>'+m.role+'\n'}}"
    "{% if m.content is string %}{{m.content}}{% else %}"
    "{% for c in m.content %}{% if c.type=='text' %}{{c.text}}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
# keys that Ideogram's captions may have and the pocket model's do not
_OTHER_KEYS = (
    '{"high_level_description":"","style_description":{"aesthetics":"","lighting":"","photo":"",'
    '"medium":"","art_style":"","color_palette":[]},"elements":[{"type":"obj","bbox":[],"desc":""}]}'
)


def _corpus() -> list[str]:
    rng = random.Random(0)
    lines = []
    for i in range(3000):
        prompt = replace(random_prompt(rng, with_shape=i % 2 == 0), word="")
        chat = TEMPLATE.format(prompt.caption)
        lines.append(chat.replace("<|im_start|>", "").replace("<|im_end|>", ""))
        lines.append(_OTHER_KEYS)
    return lines


def build_tokenizer(folder: Path) -> None:
    """Trains the tokenizer and writes its files to `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
