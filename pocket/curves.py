"""Draws the training curves: `python -m ideogram4_quant.pocket.curves LOGS OUT.png`."""

import json
import sys
from pathlib import Path

TRANSFORMER_STAGES = ("letters", "facts", "cond", "cond_end", "uncond", "uncond_end")
VAE_STAGES = tuple(
    f"vae_{k}_{p}" for k in ("free", "fine", "coarse") for p in ("decoder", "encoder")
)


def read_log(path: Path) -> list[dict]:
    """The rows of one stage's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(logs: Path, out: Path) -> None:
    """Three panels: losses of the copies, what the auxiliary head reads, losses of the VAE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, reading, vae) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name in TRANSFORMER_STAGES:
        rows = read_log(logs / f"{name}.jsonl")
        losses.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=name)
    for name in ("letters", "facts", "cond", "cond_end"):
        rows = read_log(logs / f"{name}.jsonl")
        for key in ("letters_right", "facts_right"):
            if name != "letters" or key == "letters_right":
                label = f"{name}: {key.split('_')[0]}"
                reading.plot([r["step"] for r in rows], [r[key] for r in rows], label=label)
    for name in VAE_STAGES:
        rows = read_log(logs / f"{name}.jsonl")
        vae.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=name[4:])
    losses.set(title="flow matching loss", yscale="log")
    reading.set(title="read by the auxiliary head, share right")
    vae.set(title="VAE loss", yscale="log")
    for axes in (losses, reading, vae):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
