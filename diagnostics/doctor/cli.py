"""``ideogram4-quant doctor``: the examination as text for people, or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ...quant.tables import gigabytes
from .comfyui import named_host

_FITS = {
    "both": "both copies fit",
    "alternating": "one copy fits, they take turns",
    "streamed": "streamed from RAM, slow",
    None: "memory unknown",
}
_FOLDED = (
    "folded: this pack undoes it; behind ComfyUI's own loader, LoRAs are right with Load LoRA for "
    "Ideogram 4 alone"
)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command; it sets ``func``, a handler ``(args) -> exit code``."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine has, lacks and can run",
        description="List the files that pictures need, their folders, what is missing, and what "
        "the device supports. Nothing is downloaded or written. Exit code: 0 if a picture can be "
        "made, 1 if something is missing or broken.",
        epilog="example: ideogram4-quant doctor --comfyui D:\\ComfyUI",
    )
    parser.add_argument(
        "--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder, if it is not found by itself"
    )
    parser.add_argument(
        "--sha256", action="store_true", help="read the files found, whole, for their checksums"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(func=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    host = named_host(args.comfyui)
    from .examine import examine

    found = examine(host, sha256=args.sha256)
    print(json.dumps(found, indent=2) if args.json else "\n".join(_text(found)))
    return 1 if found["missing"] else 0


def _text(found: dict) -> Iterator[str]:
    host, device = found["comfyui"], found["device"]
    yield f"ComfyUI {host['version'] or '(version unknown)'} in {host['root']}"
    names = (f"{k} {v or 'not installed'}" for k, v in found["versions"].items())
    yield f"this Python: {', '.join(names)}"
    if not found["this_python_is_comfyuis"]:
        yield f"  ComfyUI runs on another one, with versions of its own: {host['python']}"
        yield f"  (this one is {sys.executable})"
    yield ""
    yield from _device(device)
    yield ""
    yield from _files(found)
    yield ""
    yield from _levels(found)
    for note in found["notes"]:
        yield f"note: {note}"
    yield ""
    if found["missing"]:
        yield "Missing or broken:"
        yield from (f"- {line}" for line in found["missing"])
    else:
        yield "Nothing is missing: a picture can be made."
    yield ""
    yield from _recommendation(found)


def _recommendation(found: dict) -> Iterator[str]:
    """One level for this machine, and what is left to do for it."""
    best = found["recommended"]
    if best is None:
        yield "No level fits this machine whole; the smallest is streamed from RAM, slowly."
        return
    held = _FITS[best["on_this_device"]]
    if best["one_branch"]:
        held = "one branch, which fits"
    level, size = best["level"], _size(best["copy_bytes"])
    yield f"Recommended for this machine: {level} ({size} a copy, {held})"
    if not best["files"]:
        yield f"  its files are here: pick {level} (or auto) in the loader"
        return
    for file in best["files"]:
        yield f"  download {file['name']}, {_size(file['nbytes'])}"
        yield f"    from {file['url']}"
        yield f"    into {file['folder']}"
    yield f"  {_size(best['bytes'])} in all; then press R in ComfyUI, and pick {level} or auto"


def _device(device: dict) -> Iterator[str]:
    compute = (
        "bfloat16" if device["bfloat16"] else "float32, as ComfyUI uses no bfloat16 here: slow"
    )
    yield f"device: {device['name']} ({device['type']}), {_size(device['memory'])}"
    yield f"  main memory: {_size(device['ram'])}"
    yield f"  computes in {compute}"
    for backend in device["backends"]:
        can = "yes" if backend["available"] else "no "
        yield f"  int8 by {backend['name']:<14}{can} {backend['reason']}"


def _files(found: dict) -> Iterator[str]:
    for kind, files in found["found"].items():
        yield f"{kind}: {' or '.join(reversed(found['folders'][kind]))}"
        for file in files:
            level = f", {file['level']}" if file["level"] else ""
            yield f"  {file['name']}, {_size(file['bytes'])}{level}"
            if kind == "text_encoders":
                yield f"    {_writes(file)}"
            if file.get("folded"):
                yield f"    {_FOLDED}"
            if file.get("sha256"):
                yield f"    SHA-256 {file['sha256']}"
        if not files:
            yield "  nothing that this pack can use"
    yield ""
    yield "published files (SHA-256 unknown here unless given; compare with the page):"
    for item in found["expected"]:
        here = "here   " if item["here"] else "not here"
        odd = ", BUT OF ANOTHER SIZE: download it again" if item["size_differs"] else ""
        known = f", SHA-256 {item['sha256']}" if item["sha256"] else ""
        yield f"  {here} {item['name']}, {_size(item['nbytes'])}{known}{odd}"
        if item["use"]:
            yield f"           {item['use']}"
        if not item["here"]:
            yield f"           {item['url']} -> {item['folder']}"


def _writes(file: dict) -> str:
    """Whether an encoder can write captions, for people."""
    if file.get("writing_problem"):
        return f"cannot write captions: {file['writing_problem']}"
    if file["writes"] is None:
        return "cannot write captions: it has no head (the published one is below)"
    seen = ", of pictures too" if file["sees"] else ", not of pictures: it has no vision tower"
    return f"writes captions (Caption's expand) with the head of {file['writes']}{seen}"


def _levels(found: dict) -> Iterator[str]:
    yield "levels on this device (sizes of your files, else computed; times are not measured; RAM:"
    yield "needed, with 4 GB for all else, and, modelled, so that no file is read twice):"
    published = {item["level"] for item in found["expected"]}
    rows = [r for r in found["levels"] if r["conditional"] is not None or r["level"] in published]
    for row in rows:
        have = "" if row["conditional"] is None else "  you have it"
        if have and row["one_branch"]:
            have += ", one branch: needs no other copy"
        elif have and row["unconditional"] is None:
            have += ", without the unconditional copy"
        size = f"{_size(row['copy_bytes'])} a copy"
        needs = f"RAM {row['ram_needed'] / 1e9:.0f}, {row['ram_at_speed'] / 1e9:.0f} GB"
        needs += ", MORE THAN HERE" if row["fits_ram"] is False else ""
        yield f"  {row['level']:<18} {size:<16} {_FITS[row['on_this_device']]}; {needs}{have}"
    if others := len(found["levels"]) - len(rows):
        yield f"  and {others} levels that no file here and none above has: --json lists them too"
    if found["auto"] is not None:
        yield f"auto picks {found['auto']}{_sizes_of_two(found['auto_pair'])}"


def _sizes_of_two(row: dict) -> str:
    """Of a pair of two levels what each copy takes and where both lie; of one level it is above."""
    if " + " not in row["level"]:
        return ""
    sizes = f"{_size(row['copy_bytes'])} + {_size(row['unconditional_bytes'])}"
    needs = f"RAM {row['ram_needed'] / 1e9:.0f}, {row['ram_at_speed'] / 1e9:.0f} GB"
    return f" (conditional + unconditional): {sizes}; {_FITS[row['on_this_device']]}; {needs}"


def _size(nbytes: int | None) -> str:
    return "size unknown" if nbytes is None else gigabytes(nbytes)
