"""The workflows that come with the pack, for the tests of their files and of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ideogram4_quant.tests.host.locate import PACK

FILES = sorted((PACK / "workflows").glob("*.json"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def load(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def of_type(workflow: dict, kind: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind]
