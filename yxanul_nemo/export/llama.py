"""The folded model as transformers' Llama, in memory or from a folder: an implementation that is not ours, with a KV cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from yxanul_nemo.export.llama_shape import LlamaShape
from yxanul_nemo.export.modeling_yxanul import YxanulConfig, YxanulForCausalLM
from yxanul_nemo.model.whole_weights import require_weights

CHUNK_LOGITS_BYTES = 256 << 20


def build_llama(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], where: object = "weights"
) -> LlamaForCausalLM:
    """A Llama of weights and configuration in a Llama's names (`fold.to_llama`, `fold.llama_config`), in FP32 on the CPU.

    Args:
        config: its `model_type` is llama or, for the factorized embedding, yxanul; only the keys of `LlamaShape` count.
        where: how to name the weights in messages.

    Raises:
        UserError: names a key that does not fit, or a weight that is missing, unknown, misshapen or no finite number.
    """
    shape = LlamaShape.of(config, where)
    # Before anything is built: the numbers in a configuration cost nothing to write.
    require_weights(weights, shape.weights(), where)
    factorized = shape.model_type == "yxanul"
    model_class, config_class = (YxanulForCausalLM, YxanulConfig) if factorized else (LlamaForCausalLM, LlamaConfig)
    with quiet_transformers():
        described = config_class(**shape.config())
        model = model_class.from_pretrained(None, config=described, state_dict=dict(weights), dtype=torch.float32)
    return model.eval()


def load_folder(folder: Path, trust_own_code: bool = False) -> LlamaForCausalLM:
    """The model of a folder that `formats.write_hf` wrote, as a user loads it, in FP32 on the CPU, without the network.

    Args:
        trust_own_code: run the modelling code in the folder, as a factorized one asks for.
    """
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=trust_own_code
        )
    return model.eval()


def moved(model: LlamaForCausalLM, device: torch.device, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Return `model.to(device, dtype)`, which transformers decorates so that its types no longer know it for a method."""
    torch.nn.Module.to(model, device, dtype)
    return model


def greedy(model: LlamaForCausalLM, prompts_BT: Tensor, new_tokens: int) -> Tensor:
    """The most likely continuation [B, new_tokens]; the end of a document does not end it."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return generate_ids(model, prompts_BT, settings)[:, prompts_BT.size(1) :].clone()


@torch.inference_mode()
def generate_ids(
    model: LlamaForCausalLM,
    prompts_BT: Tensor,
    settings: GenerationConfig,
    mask_BT: Tensor | None = None,
    stopping: StoppingCriteriaList | None = None,
) -> Tensor:
    """Return prompts and continuations by `model.generate` under `settings` alone; as arguments they would be mixed with the model's
    own (transformers 5).

    Args:
        model: the model.
        prompts_BT: padded at the left where they differ in length.
        settings: of the continuation.
        mask_BT: 0 where a prompt is padded; None: nowhere.
        stopping: further reasons to end a row.
    """
    kept, model.generation_config = model.generation_config, settings
    mask_BT = torch.ones_like(prompts_BT) if mask_BT is None else mask_BT
    try:
        # transformers declares `self` as another type, and the result as any of those that other settings give.
        return model.generate(prompts_BT, attention_mask=mask_BT, stopping_criteria=stopping)  # type: ignore[misc, return-value]  # see above
    finally:
        model.generation_config = kept


class LlamaLoss:
    """(ids_BT, labels_BT) -> loss_BT in FP32, as `validation.scoring.LossFunction`; labels are the token after each of `ids_BT`.

    Logits never exist for [tokens, vocabulary] as a whole.
    """

    def __init__(self, model: LlamaForCausalLM):
        self._model = model
        self._rows = max(1, CHUNK_LOGITS_BYTES // (4 * model.config.vocab_size))

    def __call__(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The loss where a label is given; 0 where it is -100."""
        # Padding stands at the end, where causal attention does not look.
        hidden_BTH = self._model.model(ids_BT, use_cache=False).last_hidden_state
        rows = zip(hidden_BTH.flatten(0, 1).split(self._rows), labels_BT.flatten().split(self._rows), strict=True)
        losses = [
            F.cross_entropy(self._model.lm_head(hidden).float(), labels, reduction="none") for hidden, labels in rows
        ]
        return torch.cat(losses).view(labels_BT.shape)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no table of loaded weights on the console; what is wrong with them is reported as an error."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
