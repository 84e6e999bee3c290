"""`stage=export`: a checkpoint as `export/model.nemo` and `export/hf/`, whole and proven equal, or not at all."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.export.formats import model_card, write_hf, write_nemo
from yxanul_nemo.export.gguf_file import load_gguf, write_gguf
from yxanul_nemo.export.gguf_rules import require_expressible
from yxanul_nemo.export.llama import load_folder, moved
from yxanul_nemo.export.parity import (
    check_parity,
    expect_folded_then_rounded,
    expect_weights_rounded,
    fixed_prompts,
    load_nemo,
    proof_device,
    require_exportable,
)
from yxanul_nemo.export.publish import list_and_sync, list_files, recover_folder, replace_folder, sync_folder
from yxanul_nemo.export.record import write_record
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import rank_and_processes
from yxanul_nemo.model.build import reference_precision
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.validation.record import find_result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEMO_NAME, HF_NAME, GGUF_NAME = "model.nemo", "hf", "model.gguf"


def export_checkpoint(config: RunConfig) -> None:
    """Write all configured formats, load each anew, compare, and only then put the folder in place of an older export.

    Raises:
        UserError: no checkpoint, data and tokenizer of another run, or a disk that cannot be written.
        ParityError: what was written does not compute what the checkpoint does; nothing is left behind, and an older
            export stays as it was.
    """
    if rank_and_processes()[0]:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        # Under torchrun the first process does it alone.
        os.environ.pop(name, None)
    began = time.perf_counter()
    Exporter(config).run()
    logger.info("export took %.1f s", time.perf_counter() - began)


class Exporter:
    """One export of one run."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.manifest = load_manifest(config.data_dir)
        self.checkpoint = CheckpointStore.of_run(config).choose(config.export.checkpoint, "export.checkpoint")
        require_exportable(config.model)
        self.tokenizer_folder = config.run.folder.tokenizer
        self.tokenizer = Tokenizer.load_known(self.tokenizer_folder, self.manifest.tokenizer_fingerprint)
        if "gguf" in config.export.formats:
            require_expressible(self.tokenizer, self.tokenizer_folder)
        self.dtype = DTYPES[config.export.dtype]

    def run(self) -> None:
        """Write, prove, publish."""
        run = self.config.run.folder
        place, unfinished = run.export, run.unfinished_export
        model = restore_model(self.config, self.checkpoint, self.manifest.vocab_size, *reference_precision())
        with disk_errors(run.root, "exporting", also=(SafetensorError,)):
            recover_folder(place)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            try:
                logger.info("export: writing %s", ", ".join(self.config.export.formats))
                self.write(unfinished, model)
                with ThreadPoolExecutor(1) as beside:
                    written = beside.submit(list_and_sync, unfinished)
                    parity = self.prove(unfinished, model)
                    files = written.result()
                if HF_NAME in parity:
                    card = unfinished / HF_NAME / "README.md"
                    card.write_text(self._card(parity[HF_NAME]), encoding="utf-8")
                    files |= list_files(unfinished, [card])
                write_record(self.config, self.checkpoint, unfinished, files, parity)
                sync_folder(unfinished)
                replace_folder(unfinished, place)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        for name, result in parity.items():
            size_bytes = sum(entry["bytes"] for file, entry in files.items() if Path(file).parts[0] == name)
            logger.info("exported %s: %.1f MB, %s", place / name, size_bytes / 1e6, _in_words(result))

    def write(self, folder: Path, model: YxanulGPT) -> None:
        """Write the configured formats of `model` into `folder`."""
        if "hf" in self.config.export.formats:
            write_hf(folder / HF_NAME, model, self.tokenizer, self.dtype, self.config.export.factorized)
        if "nemo" in self.config.export.formats:
            write_nemo(folder / NEMO_NAME, model, self.tokenizer, self.tokenizer_folder, self.dtype)
        if "gguf" in self.config.export.formats:
            shape, vocab_size = model.model_shape, model.real_vocab_size
            weights = to_llama(model.state_dict(), shape, vocab_size)
            llama = llama_config(shape, vocab_size, self.tokenizer.eos_id, None, self.config.export.dtype)
            where = (self.tokenizer, self.tokenizer_folder)
            write_gguf(folder / GGUF_NAME, weights, llama, *where, self.dtype, shape.name)

    def prove(self, folder: Path, model: YxanulGPT) -> dict[str, Any]:
        """Load what is in `folder` anew and compare it with `model`; raises ParityError.

        Returns:
            Name in the folder -> what `check_parity` measured.
        """
        vocab_size, shape = self.manifest.vocab_size, self.config.model
        device = proof_device(self.config.parallel, parameter_count(shape, 0) + vocab_size * shape.hidden_size)
        logger.info("export: loading what was written and comparing its logits with the checkpoint's (%s)", device.type)
        model.to(device)
        prompts_BT = fixed_prompts(vocab_size, self.manifest.eos_id)
        parity: dict[str, Any] = {}
        formats, factorized = self.config.export.formats, self.config.export.factorized
        own = cache(lambda: expect_weights_rounded(model, prompts_BT, self.dtype))
        # In FP32 nothing is rounded, and both are the same.
        folded = (
            own
            if self.dtype == torch.float32
            else cache(lambda: expect_folded_then_rounded(model, prompts_BT, self.dtype))
        )
        if "hf" in formats:
            expected = own if factorized else folded
            parity[HF_NAME] = check_parity(
                HF_NAME, expected(), moved(load_folder(folder / HF_NAME, factorized), device)
            )
        if "gguf" in formats:
            parity[GGUF_NAME] = check_parity(GGUF_NAME, folded(), moved(load_gguf(folder / GGUF_NAME), device))
        if "nemo" in formats:
            parity[NEMO_NAME] = check_parity(NEMO_NAME, own(), load_nemo(folder / NEMO_NAME).to(device))
        return parity

    def _card(self, parity: dict[str, Any]) -> str:
        return model_card(
            self.config.model,
            vocab_size=self.manifest.vocab_size,
            eos_token=self.tokenizer.eos_token,
            tokens=self.checkpoint.tokens,
            recipe=self.config.run.name,
            checkpoint=self.checkpoint.path.name,
            dtype=self.config.export.dtype,
            factorized=self.config.export.factorized,
            license_name=self.config.export.license,
            datasets=self.config.data.fetched_licenses,
            parity=parity,
            validation=find_result(self.config, self.checkpoint),
        )


def _in_words(result: dict[str, Any]) -> str:
    text = (
        f"largest logit difference {result['max_logit_difference']:.2g} in FP64, {result['fp32_logit_difference']:.2g} in FP32 "
        f"(rounding of the checkpoint itself {result['fp32_rounding']:.2g}), {result['equal_greedy_tokens']} equal greedy tokens"
    )
    if result["rounding_logit_difference"]:
        text += f"; rounding the weights moves logits by up to {result['rounding_logit_difference']:.2g}"
    return text
