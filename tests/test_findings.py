"""The form of ``findings/``: each script stands alone, pins what it installs and says what it saw.

The scripts themselves are run by hand: they need a network and minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
HEAD = ("# Question:", "# Good guess:", "# Behaviour:", "# Versions:", "# Seen:")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_stands_alone(script):
    text = script.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    said = [next(i for i, line in enumerate(lines) if line.startswith(word)) for word in HEAD]
    assert said == sorted(said)
    for needed in ("set -euo pipefail", "room=$(mktemp -d)", "trap 'rm -rf \"$room\"' EXIT"):
        assert needed in lines
    assert "ideogram4_quant" not in text
    assert "assert " in text, "nothing in it can fail"
    installs = re.findall(r"-m pip install ((?:[^\n]|(?<=\\)\n)*)", text)
    assert installs
    for words in installs:
        packages = [w for w in words.replace("\\\n", " ").split() if not w.startswith(("-", ":"))]
        assert packages
        assert all("==" in package for package in packages), words
    if bash := shutil.which("bash"):
        assert subprocess.run([bash, "-n", script], capture_output=True).returncode == 0


def test_the_table_lists_every_script():
    assert 4 <= len(SCRIPTS) <= 8
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert rows == [script.stem for script in SCRIPTS]
    assert all(os.access(script, os.X_OK) for script in SCRIPTS) or os.name == "nt"
