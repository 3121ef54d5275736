"""The note in a picture's PNG: what made it, at every queue and from any sampler node.

SaveImage writes what lies in the ``extra_pnginfo`` of the graph that runs, which the host hands to
nodes that ask for it. From the second queue on the loader is cached and does not run, and the
host's own samplers ask for nothing. So a loaded model writes its note whenever it begins to sample,
into the dict that was remembered when the graph was queued.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from collections.abc import Callable, Mapping
from functools import partial

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)

NOTE = "ideogram4_quant"
"""The key in the PNG: a model's summary; a list of them where a graph samples with several."""

LOADER = "Ideogram4QuantLoad"


class _PngInfo(dict):
    """A dict that can be referred to weakly: it goes with the graph it belongs to."""


_of_prompt: weakref.WeakValueDictionary[str, _PngInfo] = weakref.WeakValueDictionary()


def watch_queue() -> None:
    """Remember from now on where the notes of each queued graph go; nothing without a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(remember)


def remember(request: dict) -> dict:
    """The host's handler of what a client queues: ``request`` with an id and a place for notes."""
    graph, data = request.get("prompt"), request.setdefault("extra_data", {})
    if not isinstance(graph, Mapping) or not isinstance(data, dict):
        return request
    kinds = (node.get("class_type") for node in graph.values() if isinstance(node, Mapping))
    found = data.get("extra_pnginfo")
    if LOADER not in kinds or not isinstance(found, (dict, type(None))):
        return request
    if request.get("prompt_id") is None:
        request["prompt_id"] = str(uuid.uuid4())
    data["extra_pnginfo"] = place = _PngInfo(found or {})
    _of_prompt[str(request["prompt_id"])] = place
    return request


def note_when_sampling(patcher: comfy.model_patcher.ModelPatcher, note: dict) -> None:
    """Let a model, and every clone of it, write ``note`` when it begins to sample."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, NOTE, partial(_noted, note))


def add_note(place: dict | None, note: dict) -> None:
    """Write ``note`` into an ``extra_pnginfo``, beside those of other models of the same graph."""
    if place is None:
        return
    there = place.get(NOTE, [])
    notes = there if isinstance(there, list) else [there]
    if note not in notes:
        notes = [*notes, note]
    place[NOTE] = notes[0] if len(notes) == 1 else notes


def _noted(note: dict, executor: Callable, *args: object, **kwargs: object) -> object:
    context = get_executing_context()
    place = None if context is None else _of_prompt.get(context.prompt_id)
    if place is None:
        logger.debug("no place for the note of %s", note.get("level"))
    add_note(place, note)
    return executor(*args, **kwargs)
