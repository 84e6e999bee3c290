"""Parameters, FLOPs and bytes of a model, from its configuration alone (no torch)."""

from yxanul_nemo.config.model import ModelConfig


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer block: q, k, v, o, the three SwiGLU matrices and two norms."""
    query_size = model.num_attention_heads * model.head_dim
    kv_size = model.kv_groups * model.head_dim
    attention = model.hidden_size * (query_size + 2 * kv_size) + query_size * model.hidden_size
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    return attention + feed_forward + 2 * model.hidden_size


def parameter_count(model: ModelConfig, vocab_rows: int) -> int:
    """Parameters with `vocab_rows` embedding rows (the tokenizer's size, or the padded one); the head is tied and adds none."""
    embedding = vocab_rows * model.embedding_rank + model.embedding_rank * model.hidden_size
    return embedding + model.num_layers * layer_parameters(model) + model.hidden_size


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Parameters of all blocks' matrices: what Muon updates, where it is chosen."""
    return model.num_layers * (layer_parameters(model) - 2 * model.hidden_size)


def moment_count(model: ModelConfig, vocab_rows: int, with_muon: bool) -> int:
    """Numbers that the optimizer keeps besides the parameters: AdamW two for each, Muon one. Muon's for whole rows are not counted."""
    return 2 * parameter_count(model, vocab_rows) - (layer_matrix_parameters(model) if with_muon else 0)


def training_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token: 6 per matrix weight, and causal attention (half of the square).

    The embedding lookup is no multiplication; the head and both uses of the projection are. Recomputation is not counted.
    """
    matrices = layer_matrix_parameters(model)
    head = model.embedding_rank * vocab_size
    projection = 2 * model.embedding_rank * model.hidden_size
    attention = 2 * model.num_layers * model.num_attention_heads * model.head_dim * seq_len
    return 3.0 * (2 * (matrices + head + projection) + attention)
