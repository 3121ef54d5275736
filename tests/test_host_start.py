"""A ComfyUI that is found but cannot start: one reason, with its log."""

from __future__ import annotations

import sys
from pathlib import Path

from ideogram4_quant.tests.host.locate import Host
from ideogram4_quant.tests.host.server import reason_it_cannot_start


def test_a_half_installed_python_is_one_reason_with_the_log(tmp_path):
    (tmp_path / "main.py").write_text("import a_package_that_is_not_installed\n")
    reason = reason_it_cannot_start(Host(tmp_path, Path(sys.executable)), tmp_path)
    assert "cannot start" in reason
    assert "No module named 'a_package_that_is_not_installed'" in reason


def test_a_python_that_is_not_there_is_a_reason(tmp_path):
    assert "cannot start" in reason_it_cannot_start(Host(tmp_path, tmp_path / "python"), tmp_path)


def test_a_comfyui_that_starts_has_no_reason(tmp_path):
    (tmp_path / "main.py").write_text("print('up')\n")
    assert reason_it_cannot_start(Host(tmp_path, Path(sys.executable)), tmp_path) is None
