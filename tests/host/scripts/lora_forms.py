"""What the host's own Load LoRA makes of files: FILES (JSON: name -> LoRA), MODEL (conditional).

Reports, for each file, how many linears of the model it would patch.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside


def main() -> None:
    pack, (files, model) = inside.start()
    import torch

    with torch.inference_mode():
        loading = inside.load(pack, "nodes.model_loading")
        patcher = loading.load_model(loading.ModelSource(Path(model), "conditional"))
        found = {n: patched(patcher, f) for n, f in json.loads(Path(files).read_text()).items()}
    inside.report(found)


def patched(patcher, file: str) -> int:
    """Load LoRA on a copy of the model: the weights that it holds patches for."""
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(file)
    with_lora, _ = comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)
    return len(with_lora.patches)


if __name__ == "__main__":
    main()
