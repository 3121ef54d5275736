"""The note in a picture's PNG: what made it, at every queue and from any sampler node.

SaveImage writes what lies in the ``extra_pnginfo`` of the graph that runs, which the host hands to
nodes that ask for it. From the second queue on the loader is cached and does not run, and the
host's own samplers ask for nothing. So a loaded model writes its note whenever it begins to sample,
into the dict that was remembered when the graph was queued. The sampler may be cached too and only
the picture be saved anew, under another name: so the notes of a sampler that was queued before with
all that leads to it stand there from the start, and give way to new ones where it runs after all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)

NOTE = "ideogram4_quant"
"""The key in the PNG: a model's summary; a list of them where several lead to the picture.

A branch that a switch on the way leaves out now counts too, if it was sampled before.
"""

LOADER = "Ideogram4QuantLoad"
_MOST_WAYS = 256


class _PngInfo(dict):
    """An ``extra_pnginfo`` and its graph, whose notes go into it; it can be referred to weakly."""

    def __init__(self, found: Mapping, graph: Mapping) -> None:
        super().__init__(found)
        # copied: the host's check of a graph writes numbers into it in types of its own
        self.graph = {
            name: (node.get("class_type"), dict(inputs))
            for name, node in graph.items()
            if isinstance(node, Mapping) and isinstance(inputs := node.get("inputs", {}), Mapping)
        }
        kinds = {kind for kind, _ in tuple(_sampled)}
        ways = [(n, _way(self.graph, n)) for n, (kind, _) in self.graph.items() if kind in kinds]
        self._notes = {name: list(_sampled[way]) for name, way in ways if way in _sampled}
        self._sampling: set[str] = set()
        self._write()

    def add(self, name: str, note: dict) -> None:
        """The node ``name`` of the graph samples with the model of ``note``."""
        if name not in self._sampling:
            self._sampling.add(name)
            self._notes[name] = []
        if note not in self._notes[name]:
            self._notes[name].append(note)
        self._write()
        if name in self.graph:
            way = _way(self.graph, name)
            _sampled[way] = tuple(self._notes[name])
            _sampled.move_to_end(way)
            while len(_sampled) > _MOST_WAYS:
                _sampled.popitem(last=False)

    def __iter__(self) -> Iterator[str]:
        """The keys; without the note for a node to which no sampler leads."""
        return (key for key in super().__iter__() if key != NOTE or self._note())

    def __getitem__(self, key: str) -> object:
        """As any dict; of the note what concerns the node that runs."""
        return self._note() if key == NOTE and NOTE in self else super().__getitem__(key)

    def _note(self) -> dict | list[dict] | None:
        """Of the samplers that lead to the node that runs; of all where none is known."""
        context = get_executing_context()
        if context is None or context.node_id not in self.graph:
            return self._of(self._notes)
        return self._of(_ahead(self.graph, context.node_id))

    def _write(self) -> None:
        if found := self._of(self._notes):
            self[NOTE] = found

    def _of(self, names: Iterable[str]) -> dict | list[dict] | None:
        """The notes of these samplers, each once; one alone is not in a list."""
        wanted = set(names)
        there: list[dict] = []
        for name in dict.fromkeys((*self.graph, *self._notes)):  # one order, whoever ran first
            if name in wanted:
                there += [note for note in self._notes.get(name, ()) if note not in there]
        return there[0] if len(there) == 1 else there or None


# way of a sampler -> the notes that it sampled with last
_sampled: OrderedDict[tuple[str, str], tuple[dict, ...]] = OrderedDict()
_of_prompt: weakref.WeakValueDictionary[str, _PngInfo] = weakref.WeakValueDictionary()


def _ahead(graph: Mapping[str, tuple], name: str) -> list[str]:
    """A node, then all that lead to it, nearest first."""
    ahead = [name]
    for each in ahead:  # which grows meanwhile
        for _, value in sorted(graph[each][1].items()):
            if is_link(value) and value[0] in graph and value[0] not in ahead:
                ahead.append(value[0])
    return ahead


def _way(graph: Mapping[str, tuple], name: str) -> tuple[str, str]:
    """A node's type, and a digest of it and of all that leads to it.

    Without the nodes' ids, as the host's cache knows a node: that gives the picture of one workflow
    to another one that has the same nodes under other ids.
    """
    number = {each: i for i, each in enumerate(_ahead(graph, name))}
    found = []
    for each in number:
        kind, inputs = graph[each]
        said = {
            key: {"node": number[value[0]], "output": value[1]}
            if is_link(value) and value[0] in graph
            else value
            for key, value in sorted(inputs.items())
        }
        found.append([kind, said])
    text = json.dumps(found, default=repr)
    return str(graph[name][0]), hashlib.sha256(text.encode()).hexdigest()


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
    data["extra_pnginfo"] = place = _PngInfo(found or {}, graph)
    _of_prompt[str(request["prompt_id"])] = place
    return request


def note_when_sampling(patcher: comfy.model_patcher.ModelPatcher, note: dict) -> None:
    """Let a model, and every clone of it, write ``note`` when it begins to sample."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, NOTE, partial(_noted, note))


def _noted(note: dict, executor: Callable, *args: object, **kwargs: object) -> object:
    context = get_executing_context()
    place = None if context is None else _of_prompt.get(context.prompt_id)
    if place is None:
        logger.debug("no place for the note of %s", note.get("level"))
    else:
        place.add(context.node_id, note)
    return executor(*args, **kwargs)
