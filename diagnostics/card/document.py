"""The file that ``card`` writes: plain JSON, a list of stages with flat rows.

``{"schema": 1, "pack": version, "date": "2026-11-30", "reduced": false, "finished": true, "stages":
[{"name", "status", "seconds", "note", "rows": [{...}]}]}``. Numbers are finite; every text is freed
of paths, the user's and the machine's name before it is written. Files come from strangers: sizes
and types are checked before a value is used.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OpError
from ...files.new_file import new_file
from ...version import __version__

SCHEMA = 1
"""Raised where the meaning of a field changes; a reader refuses what it does not know."""

OK, PARTLY, FAILED, STOPPED, NOT_RUN = "ok", "partly", "failed", "stopped", "not run"
RUNNING = "running"
STATUSES = (OK, PARTLY, FAILED, STOPPED, NOT_RUN, RUNNING)

SUMS_ALONE = "torch's sums alone"
"""The way of a product that gives int32 sums and no scaled outputs: a bound, no candidate."""

_MOST_BYTES = 4 << 20
_MOST_ROWS = 2000
_MOST_TEXT = 500
_HOME = re.compile(r"(?:[A-Za-z]:)?[\\/]+(?:Users|home)[\\/]+[^\\/:'\"]+(?=[\\/])")
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\s\\/:'\"<>|,;()]+)+[\\/]+(?=[^\s\\/])")


def new(names: list[str], *, reduced: bool) -> dict[str, Any]:
    """A document whose stages have not run."""
    return {
        "schema": SCHEMA,
        "pack": __version__,
        "date": datetime.date.today().isoformat(),
        "reduced": reduced,
        "finished": False,
        "stages": [
            {"name": name, "status": NOT_RUN, "seconds": 0.0, "note": "", "rows": []}
            for name in names
        ],
    }


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write the whole document; the older one stays until the new one is whole."""
    data = (json.dumps(cleaned(document), indent=1, allow_nan=False) + "\n").encode()
    with new_file(path, len(data), overwrite=True) as file:
        file.write_at(0, data)


def cleaned(value: Any) -> Any:
    """The same without what is personal; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: cleaned(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return clean(value) if isinstance(value, str) else value


def clean(text: str) -> str:
    """``text`` with the last part of each path alone, without the user's and machine's names."""
    for name in _names():  # first: a name may hold blanks, which end a path
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
    return _PATH.sub("", _HOME.sub("", text))[:_MOST_TEXT]


def _names() -> list[str]:
    """What may not be in a file. A name of one or two letters would eat words."""
    found = {platform.node(), platform.node().partition(".")[0], Path.home().name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # systems that know no user
        found.add(getpass.getuser())
    return [name for name in found - {"root", "localhost"} if len(name) > 2]


def load(path: Path) -> dict[str, Any]:
    """The document at ``path``. Raises OpError for a file that ``save`` did not write."""

    def refused(why: str) -> OpError:
        return OpError(
            f"{path.name} is no result of the command card: {why}",
            needed=f"a file of schema {SCHEMA}, as `card --out FILE.json` writes it",
        )

    if path.stat().st_size > _MOST_BYTES:
        raise refused(f"it is larger than {_MOST_BYTES >> 20} MB")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refused(f"no JSON ({type(error).__name__})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise refused(f"its schema is {str(found)[:40]!r}")
    why = _fault(document)
    if why is not None:
        raise refused(why)
    return document


def _fault(document: Mapping[str, Any]) -> str | None:
    kinds = {"pack": str, "date": str, "reduced": bool, "finished": bool, "stages": list}
    for name, kind in kinds.items():
        if type(document.get(name)) is not kind:
            return f"{name} is no {kind.__name__}"
    if not all(_is_text(document[name]) for name in ("pack", "date")):
        return "a text is too long"
    for stage in document["stages"]:
        if not isinstance(stage, dict) or stage.get("status") not in STATUSES:
            return "a stage has no known status"
        if not all(_is_text(stage.get(name)) for name in ("name", "note")):
            return "a stage has no name or note"
        rows = stage.get("rows")
        if type(rows) is not list or len(rows) > _MOST_ROWS or not _is_number(stage.get("seconds")):
            return f"stage {stage['name']!r} has no rows or seconds"
        if not all(isinstance(row, dict) and all(map(_is_flat, row.items())) for row in rows):
            return f"a row of stage {stage['name']!r} is not flat"
    return None


def _is_flat(item: tuple[str, Any]) -> bool:
    key, value = item
    return _is_text(key) and (
        value is None or isinstance(value, bool) or _is_text(value) or _is_number(value)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _is_number(value: Any) -> bool:
    """A finite number that a float holds."""
    if type(value) is int:
        return abs(value) < 1 << 53
    return type(value) is float and math.isfinite(value)


def rows(document: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """The rows of a stage; none where it is not there."""
    return next((s["rows"] for s in document["stages"] if s["name"] == stage), [])
