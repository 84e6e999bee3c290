"""`stage=export`: a checkpoint as `export/model.nemo` and `export/hf/`, whole and proven equal, or not at all."""

import os
import shutil
import time
from pathlib import Path

import torch

from data_prep.manifest import load_manifest
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.formats import model_card, write_hf, write_nemo
from yxanul_nemo.export.parity import check_parity, fixed_prompts, hf_logits, nemo_logits, require_context
from yxanul_nemo.export.record import write_record
from yxanul_nemo.files import fsync_dir, sha256_file
from yxanul_nemo.log import logger
from yxanul_nemo.model.build import reference_precision
from yxanul_nemo.training.restore import restore_model
from yxanul_nemo.validation.record import find_result

UNFINISHED = ".export.tmp"


def export_checkpoint(config: RunConfig) -> None:
    """Write all configured formats, load each anew, compare, and only then put the folder in place of an older export.

    Raises:
        UserError: no checkpoint, or data and tokenizer of another run.
        ParityError: what was written does not compute what the checkpoint does; nothing is left behind.
    """
    began = time.perf_counter()
    manifest = load_manifest(config.data_dir)
    checkpoint = chosen_checkpoint(config)
    require_context(config.model.max_position_embeddings)
    tokenizer_folder = config.run.dir / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(tokenizer_folder, "is not the tokenizer of the data", fix="Run stage=data again.")
    model = restore_model(config, checkpoint, manifest.vocab_size, *reference_precision())
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.export.dtype]
    unfinished = config.run.dir / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        prompts = fixed_prompts(manifest.vocab_size, manifest.eos_id)
        parity = {}
        if "hf" in config.export.formats:
            card = model_card(config.model, manifest.vocab_size, checkpoint.tokens, config.run.name, find_result(config, checkpoint))
            write_hf(unfinished / "hf", model, tokenizer, dtype, card)
            parity["hf"] = check_parity("export/hf", model, hf_logits(unfinished / "hf"), prompts, dtype)
        if "nemo" in config.export.formats:
            write_nemo(unfinished / "model.nemo", model, tokenizer_folder, dtype)
            parity["nemo"] = check_parity("export/model.nemo", model, nemo_logits(unfinished / "model.nemo"), prompts, dtype)
        files = {
            str(path.relative_to(unfinished)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        write_record(config, checkpoint, unfinished, files, parity)
        replace_folder(unfinished, config.run.dir / "export")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for name, result in parity.items():
        size = sum(entry["bytes"] for file, entry in files.items() if file.startswith(name) or file.endswith(f".{name}"))
        logger.info(
            "exported %s: %.1f MB, largest logit difference %.2g", name, size / 1e6, result["max_logit_difference"]
        )
    logger.info("export of %s took %.1f s", checkpoint.path.name, time.perf_counter() - began)


def chosen_checkpoint(config: RunConfig) -> Checkpoint:
    """The checkpoint that `export.checkpoint` names."""
    store = CheckpointStore(config.run.dir / "checkpoints", verify=config.checkpoint.verify)
    checkpoint = store.best() if config.export.checkpoint == "best" else store.newest_good()
    if checkpoint is None:
        raise UserError(store.root, "holds no checkpoint", fix="Run `python launcher.py stage=train` first.")
    return checkpoint


def replace_folder(new: Path, place: Path) -> None:
    """Put `new` where `place` is; a kill in between leaves the old folder under `<place>.old` and the next call goes on."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    fsync_dir(place.parent)
    shutil.rmtree(old, ignore_errors=True)
