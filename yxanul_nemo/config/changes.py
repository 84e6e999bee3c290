"""What may change in a run that has begun: every key of the configuration, sorted into what decides nothing of training, what decides
only training to come, and what cannot change any more."""

import re
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from yxanul_nemo.config.base import alternatives
from yxanul_nemo.config.run import RunConfig

Change = Literal["free", "future", "fixed", "by content"]
"""`free`: it decides nothing of what is trained. `future`: it decides the steps to come, and may change where `allow` names it. `fixed`: it
decided what was trained. `by content`: not the key is compared but the tokens or the vocabulary that it leads to."""

CHANGES: dict[str, Change] = {
    "run.name": "free",
    "run.dir": "free",
    "run.seed": "fixed",
    "budget.hours": "free",
    "budget.sizes": "free",
    "budget.because": "free",
    "run.description": "free",
    "model.name": "fixed",
    "model.num_layers": "fixed",
    "model.hidden_size": "fixed",
    "model.ffn_hidden_size": "fixed",
    "model.num_attention_heads": "fixed",
    "model.kv_groups": "fixed",
    "model.head_dim": "fixed",
    "model.embedding_rank": "fixed",
    "model.max_position_embeddings": "future",
    "model.rope_base": "future",
    "model.norm_eps": "future",
    "model.init_std": "fixed",
    "model.embedding_init_std": "fixed",
    "model.vocab_pad_multiple": "fixed",
    "tokenizer.name": "by content",
    "tokenizer.kind": "by content",
    "tokenizer.path": "by content",
    "tokenizer.hub_id": "by content",
    "tokenizer.hub_revision": "by content",
    "tokenizer.hub_license": "by content",
    "tokenizer.eos_token": "by content",
    "tokenizer.pad_token": "by content",
    "tokenizer.vocab_size": "by content",
    "tokenizer.transition": "by content",
    "tokenizer.max_words_per_token": "by content",
    "tokenizer.cross_newline": "by content",
    "tokenizer.cross_colon": "by content",
    "tokenizer.train_bytes": "by content",
    "data.name": "free",
    "data.demo_corpus": "by content",
    "data.demo_bytes": "by content",
    "data.sources": "future",
    "data.sources.NAME.path": "by content",
    "data.sources.NAME.hub": "by content",
    "data.sources.NAME.hub.repo": "by content",
    "data.sources.NAME.hub.revision": "by content",
    "data.sources.NAME.hub.files": "by content",
    "data.sources.NAME.hub.license": "by content",
    "data.sources.NAME.text_column": "by content",
    "data.sources.NAME.ids_column": "by content",
    "data.heldout_fraction": "by content",
    "data.dir": "free",
    "data.workers": "free",
    "data.seed": "fixed",
    "data.chunk_tokens": "fixed",
    "data.shuffle_tokens": "fixed",
    "data.document_mask": "future",
    "data.max_epochs": "free",
    "curriculum.name": "free",
    "curriculum.phases": "future",
    "curriculum.phases.N.tokens": "future",
    "curriculum.phases.N.seq_len": "future",
    "curriculum.phases.N.tokens_per_step": "future",
    "curriculum.phases.N.lr_scale": "future",
    "curriculum.phases.N.grad_clip": "future",
    "curriculum.phases.N.blend": "future",
    "curriculum.phases.N.description": "free",
    "curriculum.total_tokens": "future",
    "curriculum.blend": "future",
    "curriculum.adapt_blend": "future",
    "curriculum.adapt_blend_bounds": "future",
    "optim.lr": "future",
    "optim.min_lr_ratio": "future",
    "optim.warmup_tokens": "future",
    "optim.decay": "future",
    "optim.wsd_decay_ratio": "future",
    "optim.beta1": "future",
    "optim.beta2": "future",
    "optim.eps": "future",
    "optim.weight_decay": "future",
    "optim.muon": "fixed",
    "optim.muon.momentum": "future",
    "optim.muon.nesterov": "future",
    "optim.muon.neuron_norm": "future",
    "optim.muon.neuron_beta": "future",
    "optim.muon.cautious_decay": "future",
    "optim.muon.adamw_lr_factor": "future",
    "precision.name": "future",
    "precision.fp8_amax_history_len": "future",
    "precision.fp8_amax_compute_algo": "future",
    "precision.fp8_attention": "future",
    "precision.bf16_first_tokens": "future",
    "parallel": "free",
    "checkpoint": "free",
    "guards.max_skips_in_a_row": "free",
    "guards.spike_sigma": "future",
    "guards.spike_window_steps": "future",
    "guards.hang_minutes": "free",
    "validation": "free",
    "logging": "free",
    "notify": "free",
    "export": "free",
    "plan": "free",
    "bench": "free",
    "report": "free",
    "sweep": "free",
    "cluster": "free",
    "generate": "free",
    "evaluate": "free",
    "publish": "free",
    "stage": "free",
    "from": "free",
    "prompt": "free",
    "phases": "free",
    "callbacks": "free",
    "runs": "free",
    "allow": "free",
}
"""Key -> what may become of it. A whole section stands where a new key of it can only be free. `curriculum.phases.N` are phases to come;
of those that were begun the ledger knows more (`checkpoint.going_on`)."""

OPTIMIZER_KEY = "optim"
"""Names the optimizer among the settings, as the command line does."""
SOURCES_KEY = "data.sources"
"""Names the sources among the settings, in their order."""
_CURRICULUM = ("curriculum.phases", "curriculum.total_tokens", "curriculum.blend")
"""Keys that a run's settings have as the phases that follow from them."""


class Setting(NamedTuple):
    """The value of one key."""

    key: str
    value: Any


def change_of(key: str) -> Change | None:
    """Return what may become of a dotted key of the command line; None where the table has none of it."""
    pattern = pattern_of(key)
    while pattern not in CHANGES and "." in pattern:
        pattern = pattern.rpartition(".")[0]
    return CHANGES.get(pattern)


def pattern_of(key: str) -> str:
    """Return the key as the table has it: `N` for a number in a list, `NAME` for a name in a map."""
    key = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return re.sub(r"^data\.sources\.[^.]+", "data.sources.NAME", key)


def may_be_allowed(name: str) -> bool:
    """Return whether `allow` can name a key: something in or under it decides the future."""
    pattern = pattern_of(name)
    if change_of(name) == "future" or pattern == "curriculum.phases.N":
        return True
    return any(key.startswith(f"{pattern}.") and change == "future" for key, change in CHANGES.items())


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """Return what decides training outside the phases of the curriculum, by key, as JSON has it."""
    found = {
        key: value
        for key, value in leaves(config)
        if change_of(key) in ("future", "fixed") and not key.startswith(_CURRICULUM) and key != "optim.muon"
    }
    return found | {OPTIMIZER_KEY: config.optim.name, SOURCES_KEY: list(config.data.source_names)}


def default_of(key: str) -> Any:
    """Return the schema's default for a key, as JSON has it; raises KeyError where it has none."""
    section: Any = RunConfig
    *sections, last = key.split(".")
    for name in sections:
        section = next((one for one in _sections_in(section.model_fields[name].annotation)), None)
        if section is None:
            raise KeyError(key)
    field = section.model_fields[last]
    if field.is_required():
        raise KeyError(key)
    return field.get_default(call_default_factory=True)


def leaves(section: BaseModel, prefix: str = "") -> list[Setting]:
    """Return the dotted keys and values of a section and of the sections in it."""
    found: list[Setting] = []
    dumped = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, BaseModel):
            found += leaves(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, BaseModel) for one in value):
            found += [leaf for i, one in enumerate(value) for leaf in leaves(one, f"{key}.{i}.")]
        elif isinstance(value, dict) and value and all(isinstance(one, BaseModel) for one in value.values()):
            found += [leaf for inner, one in value.items() for leaf in leaves(one, f"{key}.{inner}.")]
        else:
            found.append(Setting(key, dumped[field.alias or name]))
    return found


def shown(value: Any) -> str:
    """Return a value as the command line would have it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) < 1e6 else f"{value:,.0f}".replace(",", "_")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
