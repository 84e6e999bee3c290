"""llama.cpp's file of the folded model, and reading it back for the proof of equality.

Layout: architecture `llama` of ggml's GGUF specification. llama.cpp turns pairs of neighbouring dimensions (RoPE's "norm"
type) where a Hugging Face Llama turns the two halves of a head, so the rows of queries and keys change places.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.gguf_checks import require_gguf
from yxanul_nemo.export.gguf_rules import require_expressible
from yxanul_nemo.export.llama import build_llama
from yxanul_nemo.export.llama_shape import LlamaShape
from yxanul_nemo.files import allow_as_umask
from yxanul_nemo.json_files import MAX_TOKENIZER_BYTES, read_json
from yxanul_nemo.model.whole_weights import require_shapes

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""A Llama's name -> GGUF's, inside a layer."""
MADE_BY = "a GGUF file by stage=export"


def write_gguf(
    path: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Write the file.

    Args:
        weights: a standard Llama's, as `fold.to_llama` gives them.
        config: its `fold.llama_config`.
        tokenizer: saved in `tokenizer_folder`.
        dtype: of the matrices; norms are always stored in FP32, after rounding to it.
        name: of the model.
    """
    import gguf

    pre = require_expressible(tokenizer, tokenizer_folder)
    writer = gguf.GGUFWriter(path, "llama")
    is_bf16 = dtype == torch.bfloat16
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_bf16 else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, tokenizer, tokenizer_folder, pre)
    heads = _heads(config)
    for theirs, weight in weights.items():
        values = weight.to(dtype).float()
        if (count := heads.get(theirs.rpartition(".layers.")[2].partition(".")[2])) is not None:
            values = _neighbours(values, count)
        array = values.numpy()
        if is_bf16 and array.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_gguf_name(theirs), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(theirs), array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    allow_as_umask(path)


def load_gguf(path: Path) -> LlamaForCausalLM:
    """The model of a file by `write_gguf`, read with gguf's own reader, as transformers' Llama in FP32 on the CPU.

    Raises:
        UserError: it is damaged, or of another model than a Llama's plain matrices.
    """
    import gguf

    require_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        told = {key: field.contents() for key, field in reader.fields.items()}
        config = _config(told)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(path, f"cannot be read ({type(error).__name__}: {error})", MADE_BY) from None
    shape = LlamaShape.of(config, path)
    names = {_gguf_name(theirs): theirs for theirs in shape.weights()}
    heads = {"self_attn.q_proj.weight": shape.num_attention_heads, "self_attn.k_proj.weight": shape.key_value_heads}
    sizes = {names.get(tensor.name, tensor.name): tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    require_shapes(sizes, shape.weights(), path)
    weights = {}
    for tensor in reader.tensors:
        theirs = names[tensor.name]
        # ggml lists sizes from the innermost on.
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        weights[theirs] = torch.from_numpy(np.array(values, dtype=np.float32))
        if (count := heads.get(theirs.rpartition(".layers.")[2].partition(".")[2])) is not None:
            weights[theirs] = _halves(weights[theirs], count)
    return build_llama(weights, config, path)


def _config(told: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's config.json from a file's pairs."""
    return {
        "model_type": "llama",
        "vocab_size": len(told["tokenizer.ggml.tokens"]),
        "max_position_embeddings": told["llama.context_length"],
        "hidden_size": told["llama.embedding_length"],
        "num_hidden_layers": told["llama.block_count"],
        "intermediate_size": told["llama.feed_forward_length"],
        "num_attention_heads": told["llama.attention.head_count"],
        "num_key_value_heads": told["llama.attention.head_count_kv"],
        "head_dim": told["llama.attention.key_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": told["llama.rope.freq_base"]},
        "rms_norm_eps": told["llama.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": True,
    }


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, folder: Path, pre: str) -> None:
    import gguf

    described = read_json(folder / "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES)
    by_id = {number: (text, gguf.TokenType.NORMAL) for text, number in described["model"]["vocab"].items()}
    for entry in described["added_tokens"]:
        kind = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        by_id[entry["id"]] = (entry["content"], kind)
    rows = [by_id.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(tokenizer.vocab_size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    # In training every document stood behind the token that ended the one before.
    writer.add_add_bos_token(True)


def _gguf_name(theirs: str) -> str:
    if theirs in NAMES:
        return NAMES[theirs]
    number, _, part = theirs.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Name inside a layer -> heads, for the matrices whose rows RoPE pairs."""
    return {
        "self_attn.q_proj.weight": config["num_attention_heads"],
        "self_attn.k_proj.weight": config["num_key_value_heads"],
    }


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads x head_dim, hidden] with the partners of a rotation side by side instead of half a head apart."""
    return weight.view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape).contiguous()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `_neighbours`."""
    return weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape).contiguous()
