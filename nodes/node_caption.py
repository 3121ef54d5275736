"""Check caption."""

from __future__ import annotations

import json
import logging

from comfy_api.latest import io, ui

from ..captions.check import check_caption
from ..errors import OpError
from .schema import CATEGORY

logger = logging.getLogger(__name__)


class CheckCaption(io.ComfyNode):
    """A caption -> the same in the trained key order, and what is wrong with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantCheckCaption",
            display_name="Check caption (Ideogram 4)",
            category=CATEGORY,
            description=(
                "Checks a caption against the JSON format that Ideogram 4 was trained on and "
                "puts its keys in the trained order. Warns about plain text."
            ),
            search_aliases=["json prompt", "prompt check", "validate prompt", "ideogram prompt"],
            inputs=[
                io.MultiType.Input(
                    io.String.Input("caption", multiline=True, default="", dynamic_prompts=False),
                    types=[io.String, io.Dict],
                    tooltip="A JSON caption, typed or from Build JSON Prompt (Ideogram).",
                ),
                io.Boolean.Input(
                    "stop_on_errors",
                    default=True,
                    optional=True,
                    tooltip="Stop before sampling when the caption has errors.",
                ),
            ],
            outputs=[
                io.String.Output(
                    id="checked",
                    display_name="caption",
                    tooltip="The caption with its keys in the trained order, for CLIP Text Encode.",
                ),
                io.String.Output(
                    id="findings",
                    display_name="findings",
                    tooltip="Errors and warnings, one a line.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, caption: str | dict, stop_on_errors: bool = True) -> io.NodeOutput:
        text = caption if isinstance(caption, str) else json.dumps(caption, ensure_ascii=False)
        verdict = check_caption(text)
        if verdict.errors and stop_on_errors:
            raise OpError("the caption has errors: " + " ".join(verdict.errors))
        for finding in (*verdict.errors, *verdict.warnings):
            logger.warning("caption: %s", finding)
        findings = verdict.text()
        return io.NodeOutput(verdict.caption, findings, ui=ui.PreviewText(findings))
