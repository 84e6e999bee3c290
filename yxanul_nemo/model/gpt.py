"""Megatron-core's GPTModel with the factorized tied embedding and a head that never holds [tokens, vocabulary] for the loss."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.kernels.attention_limits import dtype_name, why_not_short
from yxanul_nemo.kernels.linear_cross_entropy import linear_cross_entropy
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.documents import Documents, document_starts, hidden_tokens, packed_sequences
from yxanul_nemo.model.embedding import FactorizedEmbedding
from yxanul_nemo.model.layer_choices import lists_documents
from yxanul_nemo.model.layers import TorchRotaryEmbedding, te_layer_spec, torch_block_spec


class _NoHead(torch.nn.Identity):
    """Stands where Megatron-core has a head and looks for its weight."""

    weight = None


class YxanulGPT(GPTModel):
    """`forward(ids)` gives logits, `forward(ids, labels)` the loss of each token; labels are already shifted by the caller."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        vocab_size: int,
        layer_spec: str,
        fused_layers: bool = False,
        tiled_attention: bool = False,
    ):
        self.real_vocab_size = vocab_size
        self.model_shape = model
        self.with_te = layer_spec == "te"
        spec = te_layer_spec(config) if layer_spec == "te" else torch_block_spec(config)
        super().__init__(
            config,
            spec,
            # GPTModel builds an unfactorized table first; setup_embeddings_and_output_layer replaces it, so it is kept tiny.
            vocab_size=parallel_state.get_tensor_model_parallel_world_size(),
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
        )
        if layer_spec == "torch":
            self.rotary_pos_emb = TorchRotaryEmbedding(model.head_dim, model.rope_base, self.pg_collection.cp)
        if fused_layers and self.with_te:
            # As in `layers.te_layer_spec`: Triton is not on every CPU.
            from yxanul_nemo.model.fused_block import FusedBlock

            FusedBlock.take_over(self.decoder)
        if self.with_te:
            for layer in self.decoder.layers:
                layer.self_attention.uses_tiles = tiled_attention
        built = sum(p.numel() for p in self.parameters())
        if config.tensor_model_parallel_size == 1:
            expected = parameter_count(model, self.vocab_size)
            assert built == expected, f"built {built} parameters, the configuration means {expected}"

    def setup_embeddings_and_output_layer(self) -> None:
        """The last step of GPTModel's construction: put the factorized pair where Megatron-core has a full table and a full head."""
        self.vocab_size = self.model_shape.padded_vocab_size(self.real_vocab_size)
        self.embedding = FactorizedEmbedding(
            self.config,
            self.model_shape.embedding_rank,
            self.vocab_size,
            self.max_sequence_length,
            tp_group=self.pg_collection.tp,
        )
        # The head has no parameters of its own.
        self.output_layer = _NoHead()
        super().setup_embeddings_and_output_layer()

    def forward(
        self, ids_BT: Tensor, labels_BT: Tensor | None = None, documents: Documents | None = None, **options: object
    ) -> Tensor:
        """Args: ids_BT token ids [B, T]; labels_BT the token after each of them [B, T], -100 where none is scored; documents that
        attention stays inside of, None: it goes over the whole window.

        Returns: logits [B, T, vocab_size] in FP32 without labels (a small model's tool), else the loss per token [B, T] in FP32.
        """
        options["output_processor"] = self._head
        if documents is None:
            return super().forward(ids_BT, None, None, labels=labels_BT, **options)
        if self.lists_documents(ids_BT.size(1)):
            # One long row, as the list counts: what is not attention does not mind, and nothing has to be copied into another order.
            labels_1N = None if labels_BT is None else labels_BT.reshape(1, -1)
            packed = packed_sequences(ids_BT, documents)
            out = super().forward(
                ids_BT.reshape(1, -1), None, None, labels=labels_1N, packed_seq_params=packed, **options
            )
            return out.view(*ids_BT.shape, *out.shape[2:])
        starts_BT = document_starts(ids_BT, documents.eos_id)
        mask = starts_BT if self.with_te else hidden_tokens(starts_BT)
        return super().forward(ids_BT, None, mask, labels=labels_BT, **options)

    def lists_documents(self, seq_len: int) -> bool:
        """Whether attention in windows of this length is kept inside documents by a list of them, which needs `Documents.room`."""
        if not (self.with_te and self.config.bf16):
            return False
        kernel = self.decoder.layers[0].self_attention.kernel_for(seq_len, torch.bfloat16)
        return lists_documents("bfloat16", seq_len, kernel)

    def _head(self, *, hidden_states: Tensor, labels: Tensor | None, output_weight: Tensor, **_: object) -> Tensor:
        tp_group = self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None
        z_TBR = self.embedding.projection.down(hidden_states)
        if labels is None:
            if tp_group is not None:
                z_TBR = tensor_parallel.copy_to_tensor_model_parallel_region(z_TBR)
            logits_TBV = F.linear(z_TBR, output_weight)
            if tp_group is not None:
                logits_TBV = gather_last_dim(logits_TBV, tp_group)
            return logits_TBV[..., : self.real_vocab_size].transpose(0, 1).float()
        n_time, n_batch, rank = z_TBR.shape
        loss = linear_cross_entropy(
            z_TBR.reshape(n_time * n_batch, rank),
            output_weight,
            labels.t().reshape(-1),
            vocab_size=self.real_vocab_size,
            tp_group=tp_group,
        )
        return loss.view(n_time, n_batch).t()


def gather_last_dim(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' shards [..., n] side by side [..., ranks x n]; the gradient of a rank's shard is its own part.

    As Megatron-core's `gather_from_tensor_model_parallel_region`, which allocates on a GPU wherever the shard is (0.19).
    """
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.detach().contiguous(), group=group)
    parts[group.rank()] = shard
    return torch.cat(parts, dim=-1)


SHORTEST_FUSED_SEQ_LEN = 128
"""Below it, cuDNN's fused attention fails inside a CUDA graph (illegal memory access; Transformer Engine 2.20, cuDNN 9.14)."""


def attention_backend(seq_len: int | None, head_dim: int, dtype: torch.dtype) -> AttnBackend:
    """Transformer Engine's choice for windows of this length, of which those that `WindowSelfAttention` takes never get there."""
    if seq_len is None or seq_len >= SHORTEST_FUSED_SEQ_LEN:
        return AttnBackend.auto
    if why_not_short(dtype_name(dtype), seq_len, head_dim) is None:
        return AttnBackend.auto
    return AttnBackend.unfused


def transformer_config(
    model: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    layer_spec: str,
    on_gpu: bool,
    seq_len: int | None = None,
) -> TransformerConfig:
    """Megatron-core's configuration of the blocks. `layer_spec` is `te` or `torch`, already resolved."""
    assert precision.name != "auto", "chosen by now"
    with_te = layer_spec == "te"
    dtype = torch.float32 if precision.name == "fp32" else torch.bfloat16
    fp8: dict[str, object] = {}
    if precision.is_fp8:
        fp8 = {
            "fp8": "e4m3" if precision.name in ("fp8_e4m3", "mxfp8") else "hybrid",
            "fp8_recipe": {"fp8_current": "tensorwise", "mxfp8": "mxfp8"}.get(precision.name, "delayed"),
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
            "fp8_dot_product_attention": precision.fp8_attention,
            # Otherwise attention's projections keep their first FP8 weights until `set_is_first_microbatch`, which a graph cannot hold.
            "disable_parameter_transpose_cache": True,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `model.init` draws the weights, so that they don't depend on device, layer spec or layout.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_parallel,
        context_parallel_size=parallel.context_parallel,
        bias_activation_fusion=with_te,
        bias_dropout_fusion=with_te,
        apply_rope_fusion=with_te,
        masked_softmax_fusion=with_te,
        persist_layer_norm=with_te,
        use_transformer_engine_op_fuser=with_te and parallel.op_fuser,
        attention_backend=attention_backend(seq_len, model.head_dim, dtype) if with_te else AttnBackend.auto,
        gradient_accumulation_fusion=False,
        deterministic_mode=parallel.deterministic and on_gpu,
        **fp8,
    )
