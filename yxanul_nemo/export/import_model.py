"""`stage=import`: a `.nemo` file or a Hugging Face folder as the first checkpoint of a run, so that training goes on from it.

It comes after `stage=data` of that recipe and before its `stage=train`. The optimizer starts afresh, and so does the count of
tokens: both formats hold weights alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import LLAMA_NAMES, TABLE, from_llama
from yxanul_nemo.export.hf_folder import CONFIG_NAME, HfFolder, open_hf_folder
from yxanul_nemo.files import sha256_file
from yxanul_nemo.lock import RunLock
from yxanul_nemo.log import logger
from yxanul_nemo.model.nemo_archive import open_archive

SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_groups",
    "head_dim",
    "embedding_rank",
    "rope_base",
    "norm_eps",
)
"""Keys of `model` that decide what given weights compute."""


def import_model(source: Path, config: RunConfig) -> Checkpoint:
    """Commit the weights of `source` as the checkpoint after 0 tokens of the run `config`.

    A `.nemo` file comes back exactly. A Hugging Face folder does where it keeps the factorized embedding; a standard Llama's
    table must be of the configured rank, and comes back as a pair that gives the same table.

    Raises:
        UserError: the run has no data, or checkpoints already; or the source is damaged, of another shape or tokenizer.
    """
    source = Path(source)
    manifest = load_manifest(config.data_dir)
    with RunLock(config.run.dir):
        store = CheckpointStore.of_run(config)
        if store.newest_good() is not None:
            raise UserError(
                store.root, "holds checkpoints already", "a run that has not begun", "Give another run.dir."
            )
        store.clean_temporaries()
        if source.is_file():
            tokenizer, weights = _read_nemo(source, config.model)
        elif (source / CONFIG_NAME).is_file():
            tokenizer, weights = _read_hf(source, config.model)
        else:
            problem = "holds no config.json" if source.exists() else "does not exist"
            raise UserError(source, problem, "a .nemo file or a Hugging Face folder")
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise UserError(
                f"{source} (tokenizer)",
                f"has the fingerprint {tokenizer.fingerprint[:16]}",
                f"{manifest.tokenizer_fingerprint[:16]}, with which {config.data_dir} was made",
                "Prepare the data with this tokenizer: tokenizer.kind=huggingface tokenizer.path=FOLDER.",
            )
        weights[TABLE] = _repadded(weights[TABLE], manifest.vocab_size, config.model)
        digest = sha256_file(source) if source.is_file() else open_hf_folder(source).digest()
        note = f"weights imported from {source.name}, SHA-256 {digest}"
        checkpoint = _commit(config, store, weights, note)
    logger.info("imported %s as %s", source, checkpoint.path)
    return checkpoint


def _read_nemo(path: Path, model: ModelConfig) -> tuple[Tokenizer, dict[str, Tensor]]:
    with open_archive(path) as archive:
        _require_shape(model, {key: getattr(archive.config.gpt, key) for key in SHAPE_KEYS}, path)
        return archive.tokenizer(), {name: weight.float() for name, weight in archive.weights().items()}


def _read_hf(path: Path, model: ModelConfig) -> tuple[Tokenizer, dict[str, Tensor]]:
    folder = open_hf_folder(path)
    tokenizer = folder.tokenizer()
    if tokenizer.vocab_size != folder.shape.vocab_size:
        raise UserError(
            path / CONFIG_NAME,
            f"vocab_size is {folder.shape.vocab_size:,}",
            f"{tokenizer.vocab_size:,}, the tokenizer's",
        )
    _require_shape(model, _described(folder, model), path / CONFIG_NAME)
    return tokenizer, from_llama(folder.weights(), model, tokenizer.vocab_size, folder.weights_path)


def _described(folder: HfFolder, model: ModelConfig) -> dict[str, Any]:
    """The folder's values for SHAPE_KEYS; UserError where it has parts that this architecture lacks."""
    shape, where = folder.shape, folder.path / CONFIG_NAME
    fixed = {
        "hidden_act": (shape.hidden_act, "silu"),
        "attention_bias": (shape.attention_bias, False),
        "mlp_bias": (shape.mlp_bias, False),
        "rope_type": (shape.rope.rope_type, "default"),
    }
    if shape.model_type == "llama":
        fixed["tie_word_embeddings"] = (shape.tie_word_embeddings, True)
    for key, (value, needed) in fixed.items():
        if value != needed:
            raise UserError(
                where, f"{key} is {value!r}", repr(needed), "Only models of this project's architecture fit."
            )
    described = {ours: getattr(shape, theirs) for ours, theirs in LLAMA_NAMES.items()}
    # A standard Llama does not say of which rank its table is; `from_llama` finds out.
    rank = model.embedding_rank if shape.embedding_rank is None else shape.embedding_rank
    return described | {
        "kv_groups": shape.key_value_heads,
        "head_dim": shape.head_width,
        "rope_base": shape.rope.rope_theta,
        "embedding_rank": rank,
    }


def _require_shape(model: ModelConfig, described: Mapping[str, Any], where: object) -> None:
    for key in SHAPE_KEYS:
        if described[key] != getattr(model, key):
            raise UserError(
                f"model.{key}",
                f"is {getattr(model, key)}",
                f"{described[key]}, as in {where}",
                "Configure the model it was.",
            )


def _repadded(table: Tensor, vocab_size: int, model: ModelConfig) -> Tensor:
    """The table as it is if it has the configured number of rows; otherwise its real ones, padded with zeros."""
    rows = model.padded_vocab_size(vocab_size)
    if table.size(0) == rows:
        return table
    return torch.cat([table[:vocab_size], table.new_zeros(rows - vocab_size, table.size(1))])


def _commit(config: RunConfig, store: CheckpointStore, weights: Mapping[str, Tensor], note: str) -> Checkpoint:
    from yxanul_nemo.checkpoint.identity import expected_run
    from yxanul_nemo.checkpoint.shards import save_shards
    from yxanul_nemo.model.build import build_model, reference_precision
    from yxanul_nemo.model.whole_weights import load_whole_weights
    from yxanul_nemo.training.cpu_backend import CpuBackend

    manifest = load_manifest(config.data_dir)
    model = build_model(config.model, manifest.vocab_size, *reference_precision(), seed=config.run.seed)
    load_whole_weights(model, weights, "weights")
    ledger = Ledger.fresh(expected_run(config, manifest, plan_phases(config.curriculum))).with_note(note)
    place = store.begin(ledger.tokens_total)
    with store.writing(place):
        save_shards(CpuBackend(model, config.optim).sharded_state(), place, rank=0)
        (place / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return store.commit(place, ledger, phase_end=False)


def run_import_stage(config: RunConfig) -> None:
    """`import_model` from the one `from` names."""
    if len(config.sources) != 1:
        problem = "is not set" if not config.sources else f"names {len(config.sources)} models"
        raise UserError("from", problem, "a .nemo file or a Hugging Face folder", "As in stage=import from=PATH.")
    import_model(config.sources[0], config)
