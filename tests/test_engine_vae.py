"""The VAE from both file formats and in both orders of its statistics; latents' orders."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ideogram4_quant.engine.latents import (
    pack,
    to_token_order,
    unpack,
)
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.errors import CheckpointError, CorruptFileError


def pixels(image):
    return np.asarray(image).astype(int)


def test_orders_of_channels():
    latents = torch.randn(2, 32, 6, 10)
    wanted, comfyui = torch.full((2, 15, 128), torch.nan), torch.full((2, 128, 3, 5), torch.nan)
    for c, i, j, pi, pj in product(range(32), range(3), range(5), range(2), range(2)):
        value = latents[:, c, 2 * i + pi, 2 * j + pj]
        wanted[:, 5 * i + j, 64 * pi + 32 * pj + c] = value
        comfyui[:, 4 * c + 2 * pi + pj, i, j] = value
    tokens = pack(latents)
    assert torch.equal(tokens, wanted)
    assert torch.equal(unpack(tokens, 3, 5), latents)
    # One channel of FLUX.2's order is one position of all tokens.
    assert torch.equal(to_token_order(comfyui[0, :, 1, 2]), tokens[0, 7])


@torch.no_grad()
def diffusers_picture(vae, tokens, rows, columns):
    """What diffusers' pipeline does after its last step."""
    from diffusers.image_processor import VaeImageProcessor

    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    z = tokens * std + vae.bn.running_mean
    z = z.view(-1, rows, columns, 2, 2, 32).permute(0, 5, 1, 3, 2, 4)
    decoded = vae.decode(z.reshape(-1, 32, rows * 2, columns * 2), return_dict=False)[0]
    return VaeImageProcessor().postprocess(decoded, output_type="pil")


def test_decode_equals_diffusers(tiny):
    tokens = torch.randn(2, 15, 128, generator=torch.Generator().manual_seed(0))
    ours = load_vae(tiny.vae_dir, device="cpu")
    wanted = diffusers_picture(tiny.vae, tokens, 3, 5)
    found = ours.decode(tokens, 3, 5)
    assert [f.size for f in found] == [(80, 48)] * 2
    for f, w in zip(found, wanted, strict=True):
        assert np.array_equal(pixels(f), pixels(w))


def test_folder_and_single_file_are_one_vae(tiny):
    folder, file = load_vae(tiny.vae_dir, device="cpu"), load_vae(tiny.vae_file, device="cpu")
    assert (folder.order, file.order) == ("(pi, pj, c)", "(c, pi, pj)")
    assert torch.equal(folder.mean, file.mean)
    assert torch.equal(folder.std, file.std)
    wanted = folder.model.state_dict()
    for name, tensor in file.model.state_dict().items():
        if not name.startswith("bn."):
            assert torch.equal(tensor, wanted[name]), name
    tokens = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(1))
    one, other = folder.decode(tokens, 2, 4)[0], file.decode(tokens, 2, 4)[0]
    assert np.array_equal(pixels(one), pixels(other))


def test_statistics_are_believed_where_they_contradict_the_file_format(tiny, tmp_path, caplog):
    """FLUX.2's own diffusers folder has the order (c, pi, pj)."""
    shutil.copytree(tiny.vae_dir, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in ("bn.running_mean", "bn.running_var"):
        state[name] = state[name].reshape(4, 32).t().flatten()
    save_file(state, file)
    ours = load_vae(tmp_path, device="cpu")
    assert ours.order == "(c, pi, pj)"
    assert torch.equal(ours.mean, load_vae(tiny.vae_dir, device="cpu").mean)
    assert "statistics lie in the order (c, pi, pj)" in caplog.text


def test_statistics_that_tell_nothing_leave_the_usual_order(tiny, tmp_path, caplog):
    state = load_file(tiny.vae_file)
    torch.manual_seed(2)
    state["bn.running_mean"], state["bn.running_var"] = torch.randn(128), torch.rand(128) + 0.5
    save_file(state, tmp_path / "random.safetensors")
    state["bn.running_mean"], state["bn.running_var"] = torch.zeros(128), torch.ones(128)
    save_file(state, tmp_path / "flat.safetensors")
    for name in ("random", "flat"):
        vae = load_vae(tmp_path / f"{name}.safetensors", device="cpu")
        assert vae.order == "(c, pi, pj)"
    assert not caplog.text


def test_encode_equals_diffusers_and_inverts_the_normalisation(tiny):
    torch.manual_seed(3)
    image = Image.fromarray(torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8).numpy())
    ours = load_vae(tiny.vae_dir, device="cpu")
    tokens = ours.encode(image)
    assert tokens.shape == (1, 15, 128)
    x = torch.from_numpy(pixels(image)).float().permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = tiny.vae.encode(x, return_dict=False)[0].mode()
    raw = unpack(tokens * ours.std + ours.mean, 3, 5)
    assert torch.allclose(raw, wanted, atol=1e-4)


def test_a_pipelines_folder_is_found(tiny, tmp_path):
    shutil.copytree(tiny.vae_dir, tmp_path / "vae")
    assert load_vae(tmp_path, device="cpu").order == "(pi, pj, c)"


def test_old_prefixes_of_the_quantization_convolutions(tiny, tmp_path):
    state = load_file(tiny.vae_file)
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("quant_conv."):
            name = f"encoder.{name}"
        elif name.startswith("post_quant_conv."):
            name = f"decoder.{name}"
        renamed[name] = tensor
    save_file(renamed, tmp_path / "old.safetensors")
    assert renamed.keys() != state.keys()
    old, new = (
        load_vae(file, device="cpu").model.state_dict()
        for file in (tmp_path / "old.safetensors", tiny.vae_file)
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)


def test_wrong_files_are_named(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_vae(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a VAE folder"):
        load_vae(tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny.vae_file.read_bytes()[:-7])
    with pytest.raises(CorruptFileError, match=r"broken\.safetensors"):
        load_vae(broken)
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"not a FLUX\.2 VAE"):
        load_vae(tmp_path / "other.safetensors")
    state = load_file(tiny.vae_file)
    del state["decoder.mid.attn_1.k.weight"]
    save_file(state, tmp_path / "gap.safetensors")
    with pytest.raises(CheckpointError, match=r"mid_block\.attentions\.0\.to_k\.weight"):
        load_vae(tmp_path / "gap.safetensors")
    shutil.copytree(tiny.vae_dir, tmp_path / "v")
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    config["block_out_channels"] = [64, 64, 64, 64]
    (tmp_path / "v" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_vae(tmp_path / "v")
    (tmp_path / "v" / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="no usable JSON"):
        load_vae(tmp_path / "v")


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": -1},
        {"latent_channels": 1 << 40},
        {"block_out_channels": [64] * 1000},
        {"block_out_channels": [[[{}]]]},
        {"block_out_channels": []},
        {"block_out_channels": None},
        {"norm_num_groups": 0},
        {"down_block_types": ["Nothing"] * 4},
        {"act_fn": "\ud800"},
        {"sample_size": float("nan")},
    ],
    ids=str,
)
def test_a_config_that_no_vae_has_is_refused(tiny, tmp_path, change):
    folder = shutil.copytree(tiny.vae_dir, tmp_path / "v")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_vae(folder)
    assert caught.value.file.startswith(str(folder))


def test_names_and_shapes_that_no_vae_has_are_refused(tiny, tmp_path):
    state = load_file(tiny.vae_file)
    first = "encoder.down.0.block.0.conv1.weight"
    changes = (
        {"decoder.conv_in.weight": torch.zeros(())},
        {first: torch.zeros(3)},
        {first.replace("0", "9" * 5000, 1): torch.zeros(1), "bn.running_var": torch.zeros(3)},
        {"decoder.up." + "9" * 5000 + ".x": torch.zeros(1), "bn.running_mean": torch.zeros(())},
    )
    for change in changes:
        file = tmp_path / "changed.safetensors"
        save_file({**state, **change}, file)
        with pytest.raises(CheckpointError) as caught:
            load_vae(file, device="cpu")
        assert caught.value.file == str(file)
