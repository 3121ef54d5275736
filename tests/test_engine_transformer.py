"""The engine's transformer against diffusers' own, unmodified forward on the same weights."""

import pytest
import torch
import torch.nn.functional as F

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine import transformer as engine
from ideogram4_quant.engine.linear import QuantLinear
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.errors import CheckpointError, OpError
from ideogram4_quant.tests.engine_oracle import Stored, reference_velocity, stored
from ideogram4_quant.tests.tensors import relative
from ideogram4_quant.tests.tiny_model import CONFIG, random_transformer

REAL_HEADS = CONFIG | {"attention_head_dim": 256, "num_layers": 1, "rope_theta": 5_000_000}


@pytest.mark.parametrize(
    ("text", "rows", "columns"), [(1, 4, 8), (7, 3, 5), (60, 1, 1), (33, 5, 2)]
)
@pytest.mark.parametrize("config", [CONFIG, REAL_HEADS], ids=["pocket", "head_dim 256"])
def test_conditional_equals_diffusers(config, text, rows, columns):
    reference = random_transformer(3, config)
    ours = load_transformer(stored(reference, config=config), device="cpu")
    torch.manual_seed(0)
    x, features = torch.randn(2, rows * columns, 128), torch.randn(2, text, 832)
    for time in (0.0, 0.31, 1.0):
        wanted = reference_velocity(reference, x, time, features, rows, columns)
        found = velocity(ours, x, time, prepare(ours, rows, columns, features))
        assert found.dtype == torch.float32
        assert relative(found, wanted) < 2e-6


def test_unconditional_equals_diffusers(tiny):
    reference = tiny.unconditional
    ours = load_transformer(stored(reference, "unconditional"), "unconditional", device="cpu")
    x = torch.randn(2, 15, 128, generator=torch.Generator().manual_seed(1))
    wanted = reference_velocity(reference, x, 0.4, None, 3, 5)
    assert relative(velocity(ours, x, 0.4, prepare(ours, 3, 5)), wanted) < 2e-6


def test_files_equal_diffusers(tiny):
    torch.manual_seed(2)
    x, features = torch.randn(1, 32, 128), torch.randn(1, 9, 832)
    conditional = load_transformer(open_checkpoint(tiny.conditional_file), device="cpu")
    found = velocity(conditional, x, 0.2, prepare(conditional, 4, 8, features))
    assert relative(found, reference_velocity(tiny.conditional, x, 0.2, features, 4, 8)) < 2e-6
    ck = open_checkpoint(tiny.unconditional_file)
    unconditional = load_transformer(ck, "unconditional", device="cpu")
    found = velocity(unconditional, x, 0.2, prepare(unconditional, 4, 8))
    assert relative(found, reference_velocity(tiny.unconditional, x, 0.2, None, 4, 8)) < 2e-6


def test_one_text_serves_several_seeds(tiny):
    ours = load_transformer(stored(tiny.conditional), device="cpu")
    torch.manual_seed(4)
    x, features = torch.randn(3, 8, 128), torch.randn(1, 5, 832)
    prepared = prepare(ours, 2, 4, features)
    together = velocity(ours, x, 0.5, prepared)
    for i in range(3):
        assert relative(velocity(ours, x[i : i + 1], 0.5, prepared)[0], together[i]) < 2e-6


def test_no_mask_and_no_padding(tiny, monkeypatch):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **rest):
        seen.append((attn_mask, query.shape[-2], key.shape[-2]))
        return attention(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ours = load_transformer(stored(tiny.conditional), device="cpu")
    features = torch.randn(1, 9, 832)
    velocity(ours, torch.randn(1, 6, 128), 0.5, prepare(ours, 2, 3, features))
    assert seen == [(None, 15, 15)] * CONFIG["num_layers"]


def test_diffusers_own_forward_works_on_the_engines_model(tiny):
    """The model stays diffusers' class: with its mask it gives what ours gives without."""
    from diffusers import Ideogram4Transformer2DModel

    ours = load_transformer(stored(tiny.conditional), device="cpu")
    assert isinstance(ours, Ideogram4Transformer2DModel)
    torch.manual_seed(5)
    x, features = torch.randn(1, 6, 128), torch.randn(1, 4, 832)
    wanted = velocity(ours, x, 0.5, prepare(ours, 2, 3, features))
    assert relative(reference_velocity(ours, x, 0.5, features, 2, 3), wanted) < 2e-6


def test_bf16_is_as_close_as_diffusers_bf16(tiny):
    model = tiny.conditional
    ours = load_transformer(stored(model), device="cpu", dtype=torch.bfloat16)
    torch.manual_seed(6)
    x, features = torch.randn(1, 32, 128), torch.randn(1, 20, 832)
    exact = reference_velocity(model, x, 0.37, features, 4, 8)
    half = random_transformer(0).to(torch.bfloat16)
    theirs = reference_velocity(half, x.bfloat16(), 0.37, features, 4, 8).float()
    found = velocity(ours, x, 0.37, prepare(ours, 4, 8, features))
    assert relative(found, exact) < 1.2 * relative(theirs, exact)
    assert relative(found, exact) < 0.02


def test_linear_weights_keep_their_storage_and_norms_compute(tiny):
    ours = load_transformer(stored(tiny.conditional), device="cpu")
    linears = [m for m in ours.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == 6 * CONFIG["num_layers"] + 7
    assert {m.weight.dtype for m in linears} == {torch.bfloat16}
    assert not [m for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    assert ours.layers[0].attention_norm1.weight.dtype == torch.float32
    assert not any(p.is_meta for p in [*ours.parameters(), *ours.buffers()])


def test_the_unconditional_copy_leaves_the_text_projection_out(tiny):
    ck = stored(tiny.unconditional, "unconditional")
    ours = load_transformer(ck, "unconditional", device="cpu")
    assert not [n for n, _ in ours.named_parameters() if n.startswith("llm_cond")]
    with pytest.raises(OpError, match="takes no text"):
        prepare(ours, 2, 2, torch.randn(1, 3, 832))
    without = Stored({k: v for k, v in ck.state.items() if "llm_cond" not in k}, CONFIG, ck.copies)
    load_transformer(without, "unconditional", device="cpu")


def test_wrong_files_are_named(tiny):
    ck = stored(tiny.conditional)
    with pytest.raises(OpError, match=r"float16.*feed_forward\.w2 of layers 0 and 1"):
        load_transformer(ck, device="cpu", dtype=torch.float16)
    name = "layers.2.attention.qkv.weight"
    missing = Stored({k: v for k, v in ck.state.items() if k != name}, CONFIG)
    with pytest.raises(
        CheckpointError, match=r"tensor layers\.2\.attention\.qkv\.weight: 1 weights"
    ):
        load_transformer(missing, device="cpu")
    cut = Stored(ck.state | {name: ck.state[name][:-1]}, CONFIG)
    with pytest.raises(CheckpointError, match=r"found \[767, 256\], needed \[768, 256\]"):
        load_transformer(cut, device="cpu")


def test_dense_linears_stay_exact_where_bf16_does_not_hold_them(tiny):
    ck = stored(tiny.conditional)
    fine = torch.randn(768, 256, generator=torch.Generator().manual_seed(1)) / 16
    name = "layers.1.attention.qkv.weight"
    ours = load_transformer(Stored(ck.state | {name: fine}, CONFIG), device="cpu")
    assert torch.equal(ours.layers[1].attention.to_qkv.weight, fine)
    assert ours.layers[0].attention.to_qkv.weight.dtype == torch.bfloat16


def test_tensors_without_a_place_are_reported(tiny, caplog):
    ck = stored(tiny.conditional)
    load_transformer(Stored(ck.state | {"extra.weight": torch.zeros(1)}, CONFIG), device="cpu")
    assert "1 tensors without a place, such as extra.weight" in caplog.text


def test_positions_match_the_pipelines():
    from diffusers import Ideogram4Pipeline

    for text, rows, columns in ((5, 3, 4), (0, 2, 2), (1, 1, 7)):
        wanted = Ideogram4Pipeline._prepare_ids([text], rows, columns, text, torch.device("cpu"))[0]
        assert torch.equal(engine.positions(text, rows, columns), wanted)


@pytest.mark.slow
def test_one_block_at_the_real_widths_equals_diffusers():
    real = {
        "num_layers": 1,
        "attention_head_dim": 256,
        "num_attention_heads": 18,
        "intermediate_size": 12288,
        "adaln_dim": 512,
        "rope_theta": 5_000_000,
    }
    config = CONFIG | real
    reference = random_transformer(11, config)
    ours = load_transformer(stored(reference, config=config), device="cpu")
    torch.manual_seed(12)
    x, features = torch.randn(1, 12, 128), torch.randn(1, 5, 832)
    wanted = reference_velocity(reference, x, 0.5, features, 3, 4)
    assert relative(velocity(ours, x, 0.5, prepare(ours, 3, 4, features)), wanted) < 5e-6
