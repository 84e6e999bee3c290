"""A Llama's config.json as checked numbers: what is not named here never reaches transformers, whoever made the file.

transformers acts on keys of a configuration, and takes unknown ones for its own: `attn_implementation` may name a package of code
on a hub, `quantization_config` replaces layers, `num_hidden_layers` decides how long building takes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from yxanul_nemo.errors import UserError

Count = Annotated[int, Field(ge=1, le=2**24)]
Number = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]
UNREADABLE = ("quantization_config", "compression_config", "sparsity_config")
"""Keys of a configuration under which the weights are something else than matrices of numbers."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, use_attribute_docstrings=True)


class Rope(_Checked):
    """Rotary positions: the base, and how it is stretched for texts longer than those of training."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: Number = 10000.0
    factor: Number | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)
    """Share of a head's dimensions that turn; no Llama leaves any out."""

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        for key in needed[self.rope_type]:
            if getattr(self, key) is None:
                raise ValueError(f"rope_type={self.rope_type} needs {key}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.rope_type == "llama3" and low is not None and high is not None and low >= high:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        return self


class LlamaShape(_Checked):
    """What decides the weights of a Llama and what it computes with them. Values that are not given are transformers' own."""

    model_type: Literal["llama", "yxanul"]
    """A standard Llama, or one with the factorized embedding of `modeling_yxanul.py`."""
    vocab_size: Count
    hidden_size: int = Field(ge=1, le=2**17)
    intermediate_size: int = Field(ge=1, le=2**20)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: int = Field(ge=1, le=2**12)
    num_key_value_heads: int | None = Field(default=None, ge=1, le=2**12)
    head_dim: int | None = Field(default=None, ge=2, le=2**12)
    embedding_rank: int | None = Field(default=None, ge=1, le=2**17)
    max_position_embeddings: Count = 2048
    rms_norm_eps: float = Field(default=1e-6, gt=0, lt=1, allow_inf_nan=False)
    hidden_act: Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope: Rope = Rope()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads={self.key_value_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} is odd; RoPE rotates pairs of dimensions")
        if (self.model_type == "yxanul") != (self.embedding_rank is not None):
            raise ValueError("embedding_rank is a key of model_type=yxanul, and of no other")
        return self

    @classmethod
    def of(cls, config: Mapping[str, Any], where: object) -> Self:
        """Check a config.json.

        Raises:
            UserError: names the key that is missing, of another type, out of range, or asks for what is not read here.
        """
        for key in UNREADABLE:
            if config.get(key) is not None:
                raise UserError(
                    where, f"has {key}", "weights as plain matrices of numbers", "Get the model unquantized."
                )
        try:
            return cls.model_validate({**config, "rope": _rope(config)})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise UserError(where, f"has no {key}", "a Llama's configuration") from None
            value = "" if first["type"] == "value_error" else f" is {_shown(first['input'])}"
            message = first["msg"].removeprefix("Value error, ")
            raise UserError(
                where, f"{key}{value} ({message})".lstrip() if key else message, "a Llama's configuration"
            ) from None

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Dimensions of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def config(self) -> dict[str, Any]:
        """The arguments of transformers' LlamaConfig, all of them checked."""
        plain = self.model_dump(exclude={"rope", "model_type"}, exclude_none=True)
        return plain | {"rope_parameters": self.rope.model_dump(exclude_none=True)}

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, as transformers names them; a tied head is no weight of its own."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        query_size, kv_size = self.num_attention_heads * self.head_width, self.key_value_heads * self.head_width
        matrices = {
            "self_attn.q_proj": (query_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, query_size),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
        if self.embedding_rank is None:
            shapes["model.embed_tokens.weight"] = (self.vocab_size, hidden)
            if not self.tie_word_embeddings:
                shapes["lm_head.weight"] = (self.vocab_size, hidden)
        else:
            shapes["model.embed_tokens.table.weight"] = (self.vocab_size, self.embedding_rank)
            shapes["model.embed_tokens.projection.weight"] = (hidden, self.embedding_rank)
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            for name, shape in matrices.items():
                shapes[f"{layer}{name}.weight"] = shape
                if self.attention_bias if name.startswith("self_attn") else self.mlp_bias:
                    shapes[f"{layer}{name}.bias"] = shape[:1]
            shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        return shapes


def _rope(config: Mapping[str, Any]) -> Any:
    """The keys of `Rope` from the places in which versions of transformers have written them."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return given
    keys = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
    outside = {key: config[key] for key in keys if config.get(key) is not None}
    typed = {"rope_type": given["type"]} if "type" in given and "rope_type" not in given else {}
    return outside | {key: value for key, value in given.items() if value is not None} | typed


def _shown(value: Any) -> str:
    """A value of a foreign file, short enough for a message."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a number of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
