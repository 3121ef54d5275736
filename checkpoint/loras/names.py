"""The names of a LoRA file's tensors: which copy, which linear, and what part of the update."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..copies import CONDITIONAL, UNCONDITIONAL

# prefix -> the copy that it names; None: the file does not say
_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("unconditional_transformer.", UNCONDITIONAL),
    ("conditional_transformer.", CONDITIONAL),
    ("base_model.model.", None),
    ("model.diffusion_model.", None),
    ("diffusion_model.", None),
    ("transformer.", None),
    ("lora_transformer_", None),
    ("lora_unet_", None),
    ("lycoris_", None),
)
# the tail of a tensor's name -> its part; PEFT puts its adapter's name into all of them
_ADAPTER = r"(\.\w+)?"
_PARTS = {
    rf"lora_A{_ADAPTER}\.weight|lora_down{_ADAPTER}\.weight|lora\.down\.weight": "down",
    rf"lora_B{_ADAPTER}\.weight|lora_up{_ADAPTER}\.weight|lora\.up\.weight": "up",
    rf"lora_B{_ADAPTER}\.bias|lora_up{_ADAPTER}\.bias": "lora_bias",
    rf"dora_scale|lora_magnitude_vector{_ADAPTER}(\.weight)?": "magnitude",
    rf"(?P<loha>hada_w[12]_[ab]){_ADAPTER}": "",
    rf"(?P<lokr>lokr_w[12](_[ab])?){_ADAPTER}": "",
    rf"oft_R{_ADAPTER}(\.weight)?": "oft_R",
    rf"(?P<boft>boft_[Rs]){_ADAPTER}": "",
    r"(?P<plain>alpha|oft_blocks|rescale|diff|diff_b|set_weight|w_norm|b_norm)": "",
}
_TAILS = [(re.compile(rf"(?:^|\.)(?:{tail})$"), part) for tail, part in _PARTS.items()]
_ENOUGH = 4000  # names that are looked at to tell another model: more than any LoRA of one has
_LONGEST = 96  # characters: more than any of these tails has
# a split name -> (the fused linear, which third of its rows)
_SPLIT = {"to_q": ("qkv", 0), "to_k": ("qkv", 1), "to_v": ("qkv", 2)}
THIRDS = 3

# what some keys of other models' LoRAs look like, with dots as underscores
_OTHERS = {
    r"double_blocks|single_blocks": "FLUX",
    r"single_transformer_blocks": "FLUX (diffusers)",
    r"joint_blocks": "Stable Diffusion 3",
    r"(noise|context)_refiner": "Lumina 2 or Z-Image",
    r"(down|up|mid)_block|input_blocks|output_blocks": "Stable Diffusion 1, 2 or XL",
    r"(^|_)transformer_blocks_\d+_(attn_add|img_m|txt_m)": "Qwen-Image",
    r"(^|_)blocks_\d+_(cross|self)_attn": "Wan",
    r"text_model|lora_te|text_encoder|language_model|self_attn_[qkvo]_proj": "a text encoder",
}


class Place(NamedTuple):
    """Where a tensor belongs: the copy (None: not said), the module as the model or as a split
    file names it, the module as the file spells it, and the part."""

    copy: str | None
    module: str
    spelled: str
    part: str


def part_of(name: str) -> tuple[str, str] | None:
    """A tensor's name -> (the module's as spelled, which part of an update), or None."""
    # a stranger's thousands of long names would take a second
    end = name if len(name) <= _LONGEST else "." + name[-_LONGEST:].partition(".")[2]
    for tail, part in _TAILS:
        match = tail.search(end)
        if match is not None:
            named = next((value for value in match.groupdict().values() if value), part)
            return name[: len(name) - len(match.group())], named
    return None


def locate(name: str, known: Mapping[str, str]) -> Place | None:
    """Where a tensor belongs, or None for one that this model has no place for.

    known: as `spellings` gives it.
    """
    found = part_of(name)
    if found is None:
        return None
    spelled, part = found
    module, copy = spelled, None
    while (prefix := next((p for p in _PREFIXES if module.startswith(p[0])), None)) is not None:
        module = module.removeprefix(prefix[0])
        copy = prefix[1] or copy
    known_as = known.get(module)
    return None if known_as is None else Place(copy, known_as, spelled, part)


def spellings(modules: Iterable[str]) -> dict[str, str]:
    """Every way to write a module's name -> the name with dots, split ones included."""
    names = []
    for module in modules:
        names.append((module, module))
        if module.endswith(".qkv"):
            names += [(split := module.removesuffix("qkv") + part, split) for part in _SPLIT]
        if module.endswith("attention.o"):
            names += [(module.removesuffix("o") + part, module) for part in ("to_out.0", "to_out")]
    return {written: module for name, module in names for written in (name, name.replace(".", "_"))}


def fused(module: str) -> tuple[str, int | None]:
    """The model's own linear of a name, and which third of its rows (None: all of them)."""
    stem, _, last = module.rpartition(".")
    if last in _SPLIT:
        whole, third = _SPLIT[last]
        return f"{stem}.{whole}", third
    return module, None


def other_model(names: Iterable[str]) -> str | None:
    """Which model a file that fits nothing of this one is for, where its names tell."""
    for name in itertools.islice(names, _ENOUGH):
        written = name[:300].replace(".", "_")
        for pattern, model in _OTHERS.items():
            if re.search(pattern, written):
                return model
    return None
