"""Errors of the quantizer in a node's words: its inputs in the place of a command's options."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..errors import Ideogram4QuantError

# options that nodes call otherwise, or do by themselves
_OTHERWISE = {
    "resume": "overwrite off, which goes on with it",
    "uncond": "the input unconditional",
    "protect-budget": "a preset with some linears in bf16",
}
_OPTION = re.compile(r"--([a-z][a-z-]*)(?: [A-Z]+\b)?")


@contextmanager
def in_words_of_the_node(inputs: Collection[str]) -> Iterator[None]:
    """Within, hints that name options of the command line name inputs of the node instead."""
    try:
        yield
    except Ideogram4QuantError as error:
        if error.hint is None:
            raise
        raise error.with_hint(for_the_node(error.hint, inputs)) from error.__cause__


def for_the_node(hint: str, inputs: Collection[str]) -> str:
    """``hint`` with ``--name`` as the node's input ``name``, where the node has one."""

    def said(match: re.Match) -> str:
        name = match[1].replace("-", "_")
        if match[1] in _OTHERWISE:
            return _OTHERWISE[match[1]]
        return f"the node's input {name}" if name in inputs else match[0]

    return _OPTION.sub(said, hint)
