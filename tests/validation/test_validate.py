"""The same figures whatever batch, padding and number of ranks; and equal to a plain loop over the exported model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import load_manifest
from tests.export.conftest import MakeRun
from tests.ranks import run_ranks
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.validation.record import find_result
from yxanul_nemo.validation.scoring import Document
from yxanul_nemo.validation.stage import validate_checkpoint
from yxanul_nemo.validation.validate import evenly


def with_batch(config: RunConfig, batch_tokens: int) -> RunConfig:
    return config.model_copy(update={"validation": config.validation.model_copy(update={"batch_tokens": batch_tokens})})


def result_on_ranks(config: RunConfig) -> dict:
    """On each of some ranks: what `stage=validate` makes of the run's checkpoint."""
    from megatron.core import parallel_state

    from yxanul_nemo.checkpoint.restore import restore_model
    from yxanul_nemo.validation.stage import validate_model

    manifest = load_manifest(config.data_dir)
    checkpoint = CheckpointStore(config.run.dir / "checkpoints").newest_good()
    model = restore_model(config, checkpoint, manifest.vocab_size, config.precision, config.parallel)
    seq_len = plan_phases(config.curriculum)[checkpoint.phase - 1].seq_len
    result = validate_model(config, manifest, model, seq_len, "cpu")
    return result | {"ranks": parallel_state.get_data_parallel_world_size()}


def test_ranks_batches_and_padding_change_nothing(exported: tuple[RunConfig, Checkpoint]) -> None:
    config, checkpoint = exported
    expected = find_result(config, checkpoint)
    for ranks, batch_tokens in ((1, 1), (3, 300), (2, 100_000)):
        for result in run_ranks(result_on_ranks, ranks, with_batch(config, batch_tokens)):
            assert result["ranks"] == ranks
            for part, expected_part in ((result, expected), (result["at_phase_len"], expected["at_phase_len"])):
                for name, score in expected_part["domains"].items():
                    assert part["domains"][name] == pytest.approx(score, rel=2e-6)


@torch.no_grad()
def plain_nats(model: torch.nn.Module, ids: list[int], bos_id: int, eval_len: int, stride: int) -> float:
    """One document, one window at a time, never padded: Hugging Face's own recipe for perplexity of models with a fixed length."""
    ids_T = torch.tensor([bos_id, *ids])
    total, scored_to = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + eval_len, len(ids))
        logits_TV = model(ids_T[None, begin:end]).logits[0].double()
        new = end + 1 - scored_to
        total += F.cross_entropy(logits_TV[-new:], ids_T[scored_to : end + 1], reduction="sum").item()
        scored_to = end + 1
        if end == len(ids):
            break
    return total


def test_the_figures_are_those_of_a_plain_loop_over_the_exported_folder(exported: tuple[RunConfig, Checkpoint]) -> None:
    config, checkpoint = exported
    result, manifest = find_result(config, checkpoint), load_manifest(config.data_dir)
    folder = config.run.dir / "export" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    eval_len = config.validation.eval_len
    for name in config.validation.domains:
        nats, tokens, size_bytes, longest = 0.0, 0, 0, 0
        for prefix in manifest.prefixes(config.data_dir, name, "heldout"):
            shard = IndexedTokens(Path(prefix))
            for i in range(len(shard)):
                stored = shard.document(i).tolist()
                assert stored[-1] == manifest.eos_id
                text = tokenizer.decode(stored[:-1])
                first, *ids = tokenizer(text).input_ids
                assert first == tokenizer.bos_token_id and ids == stored[:-1]
                nats += plain_nats(model, ids, tokenizer.bos_token_id, eval_len, eval_len // 2)
                tokens, size_bytes, longest = tokens + len(ids), size_bytes + len(text.encode()), max(longest, len(ids))
        score = result["domains"][name]
        assert longest > 2 * eval_len, "documents of several windows are among them"
        assert (score["tokens"], score["text_bytes"]) == (tokens, size_bytes)
        assert score["loss_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
        assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / size_bytes, rel=1e-6)
        assert score["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_the_best_checkpoint_is_chosen_by_the_named_metric(make_run: MakeRun) -> None:
    config, checkpoint = make_run("validation.best_metric=code.perplexity", "validation.at_phase_len=false")
    validate_checkpoint(config)
    best = json.loads((config.run.dir / "checkpoints" / "best").read_text())
    assert best["checkpoint"] == checkpoint.path.name and best["metric"] == "code.perplexity"
    assert best["value"] == find_result(config, checkpoint)["domains"]["code"]["perplexity"]


def test_a_part_of_the_documents_is_spread_evenly() -> None:
    documents = [Document(np.array([i]), 1) for i in range(10)]
    assert [int(d.ids[0]) for d in evenly(documents, 4)] == [0, 2, 5, 7]
    assert evenly(documents, None) == evenly(documents, 10) == evenly(documents, 99) == documents
