"""How the commands' help pages look."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """argparse's own, which wraps texts; examples stay as they are written, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text and not text.startswith("example:"):
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))
