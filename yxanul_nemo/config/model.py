"""`conf/model`: the architecture, and the rules that its numbers must keep."""

from pydantic import Field, model_validator

from yxanul_nemo.config.base import Section


class ModelConfig(Section):
    """A GPT with GQA, RMSNorm (pre-norm and final), SwiGLU, RoPE and a factorized tied embedding; no biases, no dropout."""

    name: str
    """Name of the architecture, written into exports."""
    num_layers: int = Field(ge=1, le=1024)
    """Transformer blocks."""
    hidden_size: int = Field(ge=8, le=2**17)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=8, le=2**20)
    """Width inside the SwiGLU block."""
    num_attention_heads: int = Field(ge=1, le=2**12)
    """Query heads."""
    kv_groups: int = Field(ge=1, le=2**12)
    """Key/value heads shared by the query heads (GQA)."""
    head_dim: int = Field(ge=2, le=2**12)
    """Width of one head."""
    embedding_rank: int = Field(ge=1, le=2**17)
    """Rank r of the factorized embedding E[vocab, r] P[r, hidden]."""
    max_position_embeddings: int = Field(default=4096, ge=2, le=2**24)
    """Longest sequence, in tokens, that a phase or an export may use."""
    rope_base: float = Field(default=10000.0, gt=0, lt=1e12)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    """Epsilon of every RMSNorm."""
    init_std: float = Field(default=0.02, gt=0, le=1)
    """Standard deviation of the initial weights; the two projections into the residual stream get it / sqrt(2 layers)."""
    embedding_init_std: float = Field(default=0.02, gt=0, lt=1e6)
    """Standard deviation of both embedding factors. The embedding of a token then has about this squared x sqrt(rank): with small
    values, what layers write into the residual stream drowns it at first, and the loss stays long at that of word frequencies."""
    vocab_pad_multiple: int = Field(default=128, ge=1, le=2**20)
    """The embedding has the tokenizer's vocabulary rounded up to a multiple of this many rows; padding never gets probability."""

    @model_validator(mode="after")
    def _shapes(self) -> "ModelConfig":
        if self.num_attention_heads % self.kv_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of kv_groups={self.kv_groups}; "
                "each key/value group must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of dimensions")
        if self.embedding_rank > self.hidden_size:
            raise ValueError(
                f"embedding_rank={self.embedding_rank} is over hidden_size={self.hidden_size}; "
                "a factorized embedding saves nothing then"
            )
        return self

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` ids."""
        return -(-vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple
