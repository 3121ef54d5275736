"""What the pack costs a ComfyUI that has other models too: FOLDER, a folder of their files.

Reports the CPU seconds of registering the nodes, the modules that brought along, and what a queue
reads of the files: how many are opened, and how often.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import inside

KINDS = ("diffusion_models", "text_encoders", "loras", "vae")
HEAVY = ("diffusers", "transformers", "triton", "tokenizers", "matplotlib")


def main() -> None:
    pack, (folder,) = inside.start()
    import folder_paths
    from comfy_api.latest import io  # noqa: F401

    import nodes  # noqa: F401  what a running host has imported by then

    for kind in KINDS:
        folder_paths.add_model_folder_path(kind, str(Path(folder) / kind), is_default=True)
    before, started = set(sys.modules), time.process_time()
    extension = asyncio.run(sys.modules[pack].comfy_entrypoint())
    made = asyncio.run(extension.get_node_list())
    registered = time.process_time() - started
    brought = {name.partition(".")[0] for name in set(sys.modules) - before}

    opened: Counter[str] = Counter()
    sys.addaudithook(lambda event, a: opened.update([str(a[0])]) if event == "open" else None)
    foreign = str(Path(folder))
    found = {"registered": registered, "heavy": sorted(brought & set(HEAVY)), "nodes": len(made)}
    found["queues"] = []
    for _ in range(2):
        opened.clear()
        started = time.process_time()
        queue(pack, made)
        found["queues"].append(
            {
                "seconds": time.process_time() - started,
                "files": sum(path.startswith(foreign) for path in opened),
                "opens": sum(n for path, n in opened.items() if path.startswith(foreign)),
            }
        )
    inside.report(found)


def queue(pack: str, made: list) -> None:
    """What the host asks of the nodes at a queue: their inputs with the lists, and their files."""
    for node in made:
        node.INPUT_TYPES()
    choice = inside.load(pack, "nodes.model_choice")
    # where no other test has put one, there is no file of the model
    with contextlib.suppress(inside.load(pack, "errors").Ideogram4QuantError):
        choice.choose_files(level="auto")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main()
