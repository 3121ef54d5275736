"""Where a real ComfyUI lies on this machine: the doctor's answer, for the tests."""

from __future__ import annotations

from ideogram4_quant.diagnostics.doctor.comfyui import PACK, Host, find_host

__all__ = ["PACK", "Host", "find_host"]
