"""The encoder as a writer: files of `tiny_writer`, OUT EXTRA ASKED LOOKING CAPTION.

Writes the taps of both encoders, and what was written by seed; reports what is refused.
EXTRA: a folder with the optional library that constrains, or "".
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import inside

SEED, TOKENS = 7, 48


def main() -> None:
    pack, (whole, headless, head, out, extra, asked, looking, caption) = inside.start()
    import folder_paths
    import torch
    from safetensors.torch import save_file

    loading = inside.load(pack, "nodes.encoder_loading")
    writing = inside.load(pack, "nodes.caption_writing")
    clips = {name: loading.load_encoder(Path(p)) for name, p in
             (("whole", whole), ("headless", headless))}  # fmt: skip
    tensors, texts, refused = {}, {}, {}
    with torch.inference_mode():
        for name, clip in clips.items():
            tensors[f"taps {name}"] = taps(clip, caption)
        refused["no head"] = error(lambda: generate(clips["headless"], "hello"))
        refused["stock"] = error(lambda: writing.write(object(), asked, SEED, TOKENS))
        folder = Path(folder_paths.get_folder_paths("text_encoders")[0])
        shutil.copy(head, folder / "the_head.safetensors")
        loading_again = loading.load_encoder(Path(headless))
        refused["no vision"] = error(
            lambda: generate(loading_again, "hello", torch.zeros(1, 64, 64, 3))
        )
        for name, clip in (("whole", clips["whole"]), ("headless", loading_again)):
            texts[f"free {name}"] = writing.write(clip, asked, SEED, TOKENS, constrained=False)
        texts["greedy"] = generate(clips["whole"], "hello")
        (folder / "the_head.safetensors").unlink()
        if extra:
            sys.path.append(extra)
            texts["constrained"] = writing.write(clips["whole"], asked, SEED, TOKENS)
        picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
        texts["picture"] = writing.write(
            clips["whole"], looking, SEED, TOKENS, picture, constrained=False
        )
        tensors |= prepared(picture)
        refused["cancelled"], steps = cancelled(clips["whole"])
        tensors["taps after"] = taps(clips["whole"], caption)
    save_file(tensors, out)
    writer = language(clips["whole"]).writer
    sizes = {name: patcher.model_size() for name, patcher in writer._patchers.items()}
    parameters = sum(p.numel() for p in clips["whole"].cond_stage_model.parameters())
    said = {"seed": SEED, "tokens": TOKENS, "memory": writer.said(), "bytes": sizes}
    said |= {"parameters": parameters, "cancelled at": steps}
    inside.report({"texts": texts, "refused": refused, **said})


def language(clip):
    return clip.cond_stage_model.qwen3vl_8b.transformer


def taps(clip, caption: str):
    found = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return found[0][0][0].clone().contiguous()


def generate(clip, text: str, image=None) -> str:
    """What the host's node Generate Text does."""
    tokens = clip.tokenize(
        text, image=image, skip_template=False, min_length=1, thinking=False, video=None, audio=None
    )
    return clip.decode(clip.generate(tokens, do_sample=False, max_length=12))


def error(call) -> str:
    try:
        call()
    except BaseException as raised:  # as the host's interruption is
        return f"{type(raised).__name__}: {raised}"
    return ""


def cancelled(clip) -> tuple[str, int]:
    """The run is interrupted while the fifth token is drawn."""
    import comfy.model_management as management

    drawn = []

    def draw(logits):
        drawn.append(logits.argmax(-1, keepdim=True))
        management.interrupt_current_processing(len(drawn) == 5)
        return drawn[-1]

    with language(clip).drawing(draw):
        message = error(
            lambda: clip.generate(clip.tokenize("x", thinking=False), max_length=20, seed=1)
        )
    return message, len(drawn)


def prepared(picture) -> dict:
    """The picture as the host cuts it up."""
    from comfy.text_encoders.qwen_vl import process_qwen2vl_images

    half = [0.5, 0.5, 0.5]
    pixels, grid = process_qwen2vl_images(picture, patch_size=16, image_mean=half, image_std=half)
    return {"pixels": pixels.float().contiguous(), "grid": grid.contiguous()}


if __name__ == "__main__":
    main()
