"""llama.cpp's names of a Qwen3-VL text encoder's tensors, written out by hand."""

LLAMA_CPP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name: str) -> str:
    """``layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    module, parameter = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{LLAMA_CPP[module]}.{parameter}"
    _, number, module = module.split(".", 2)
    return f"blk.{number}.{LLAMA_CPP[module]}.{parameter}"
