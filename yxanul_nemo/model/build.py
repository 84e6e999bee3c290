"""One way to build the model, whatever it is for: training, validation, export."""

import torch

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.log import logger
from yxanul_nemo.machine.runtime import check_precision, init_process_groups, resolve_device, resolve_layer_spec
from yxanul_nemo.model.gpt import YxanulGPT, transformer_config
from yxanul_nemo.model.init import initialize
from yxanul_nemo.model.layer_choices import uses_tiles, why_not_fused


def build_model(
    model: ModelConfig,
    vocab_size: int,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    seed: int,
    seq_len: int | None = None,
    drawn: bool = True,
) -> YxanulGPT:
    """A freshly initialized model on the device of `parallel`; the same seed gives the same weights on every device and layout.

    Args:
        seq_len: length that it will run at, where that is fixed; decides which attention is used on a GPU.
        drawn: False leaves the weights as memory has them, where all of them are loaded next.

    Raises:
        UserError: the machine cannot run this precision, layer spec or layout.
    """
    device = resolve_device(parallel)
    check_precision(precision, parallel, device)
    layer_spec = resolve_layer_spec(parallel, device)
    init_process_groups(parallel, device, seed)
    config = transformer_config(model, precision, parallel, layer_spec, device == "cuda", seq_len)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    modules_because = why_not_fused(model, precision, parallel, capability)
    if layer_spec == "te" and precision.is_fp8:
        logger.info(
            "FP8 layers: %s", f"Transformer Engine's modules, {modules_because}" if modules_because else "fused"
        )
    built = YxanulGPT(
        model,
        config,
        vocab_size,
        layer_spec,
        fused_layers=modules_because is None,
        tiled_attention=uses_tiles(precision, parallel),
    )
    if drawn:
        initialize(built, model, seed)
    return built.to(device)


def reference_precision() -> tuple[PrecisionConfig, ParallelConfig]:
    """FP32 on a CPU with plain torch layers: what exports and parity checks are computed in."""
    return PrecisionConfig(name="fp32"), ParallelConfig(device="cpu", layer_spec="torch")
