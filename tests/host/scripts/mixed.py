"""A file of a size in the host: FILES (JSON: `BF16` and `mixed` -> conditional files).

Reports relative errors of one pass: `error` of the mix against BF16 by the stock loader, `loaders`
between the stock loader and this pack's; `stored`: what the stock loader made of the linears.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import inside
from folded import load_stock, make_inputs
from lora import load, run


def main() -> None:
    pack, (files,) = inside.start()
    import torch

    files = json.loads(Path(files).read_text())
    with torch.inference_mode():
        inputs = make_inputs()
        base = load(pack, files["BF16"])
        true = run(base, inputs)
        ours = run(load(pack, files["mixed"]), inputs)
        theirs = load_stock(base, files["mixed"])
        found = run(theirs, inputs)
        kinds = Counter(
            str(getattr(module, "quant_format", None))
            for name, module in theirs.model.diffusion_model.named_modules()
            if name.startswith("layers.") and getattr(module, "weight", None) is not None
            and module.weight.dim() == 2
        )  # fmt: skip
    inside.report(
        {
            "error": inside.relative(found, true),
            "loaders": inside.relative(ours, found),
            "stored": dict(kinds),
        }
    )


if __name__ == "__main__":
    main()
