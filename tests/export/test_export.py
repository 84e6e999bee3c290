"""`stage=export`: what it writes, that it is the model, and that nothing is lost where it is not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import TEXTS, Fresh, MakeRun
from tests.export.nemo_files import change_weights, repack
from tests.model.plain_gpt import PlainGPT
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.identity import phase_plan
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import Exporter, export_checkpoint
from yxanul_nemo.export.llama import load_folder
from yxanul_nemo.export.parity import ParityError, check_parity, expect_weights_rounded, fixed_prompts
from yxanul_nemo.export.record import is_exported
from yxanul_nemo.files import sha256_file
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.model.build import reference_precision
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.nemo_archive import open_archive


def model_of(config: RunConfig, checkpoint: Checkpoint) -> YxanulGPT:
    return restore_model(config, checkpoint, load_manifest(config.data_dir).vocab_size, *reference_precision())


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns) for path in files}


@torch.no_grad()
def test_a_fresh_process_loads_the_hf_folder_with_transformers_alone(
    exported: tuple[RunConfig, Checkpoint], fresh: dict[str, Fresh]
) -> None:
    config, checkpoint = exported
    model, manifest, ids_BT = model_of(config, checkpoint), load_manifest(config.data_dir), fresh["hf"].ids_BT
    told = fresh["hf"].results("told")
    assert told["ours"] == [], "nothing of the project, of Megatron or of NeMo is needed"
    assert (told["class"], told["dtype"], told["tied"]) == ("LlamaForCausalLM", "torch.float32", True)
    logits = torch.from_numpy(fresh["hf"].results("logits"))
    assert logits.shape == (3, 50, manifest.vocab_size)
    assert (logits - model(ids_BT)).abs().max() < 1e-4
    assert model(ids_BT).abs().max() > 10, "logits large enough to differ"
    # Greedy text of Megatron's model, each token by a forward over all before it. The end of a document cannot be chosen,
    # as min_new_tokens has it.
    ours = ids_BT[:1]
    for _ in range(64):
        last_BV = model(ours)[:, -1]
        last_BV[:, manifest.eos_id] = -torch.inf
        ours = torch.cat([ours, last_BV.argmax(-1, keepdim=True)], dim=1)
    assert np.array_equal(fresh["hf"].results("greedy"), ours.numpy())
    tokenizer = Tokenizer.load(config.run.dir / "tokenizer")
    ours = [tokenizer.encode(text).tolist() for text in TEXTS]
    eos_id = tokenizer.eos_id
    assert told["ids"] == [[eos_id, *ids] for ids in ours], "a prompt stands behind EOS, as every document in training"
    assert told["pair"] == [eos_id, *ours[0], eos_id, *ours[1]]
    assert told["inputs"] == ["attention_mask", "input_ids"], "what generate(**tokenizer(...)) takes"
    assert told["padded"][0] == tokenizer.pad_id and told["padded"][-1] == tokenizer.encode("a")[-1], (
        "padding at the left"
    )
    assert told["specials"] == [manifest.eos_id, manifest.eos_id, tokenizer.pad_id]
    assert told["max_length"] == config.model.max_position_embeddings


def test_the_record_names_every_file_and_what_was_measured(exported: tuple[RunConfig, Checkpoint]) -> None:
    config, checkpoint = exported
    folder = config.run.dir / "export"
    record = json.loads((folder / "export.json").read_text())
    assert record["checkpoint_digest"] == checkpoint.manifest.digest
    assert record["tokens_total"] == checkpoint.tokens
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present == {*record["files"], "export.json"}
    for name, entry in record["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        assert (folder / name).stat().st_mode & 0o777 == 0o644, name
    of_nemo, of_hf = record["parity"]["model.nemo"], record["parity"]["hf"]
    assert of_nemo == {
        "max_logit_difference": 0.0, "fp32_logit_difference": 0.0, "fp32_rounding": of_hf["fp32_rounding"],
        "equal_greedy_tokens": 64, "rounding_logit_difference": 0.0,
    }  # fmt: skip
    assert 0 < of_hf["max_logit_difference"] < of_hf["fp32_logit_difference"] < 1e-4
    assert 0 < of_hf["fp32_rounding"] < 1e-4
    assert record["parity"]["hf"]["equal_greedy_tokens"] == 64
    standard = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"
    }  # fmt: skip
    assert standard <= {name.removeprefix("hf/") for name in present}


def test_the_model_card_has_the_runs_figures(exported: tuple[RunConfig, Checkpoint]) -> None:
    config, checkpoint = exported
    card = (config.run.dir / "export" / "hf" / "README.md").read_text()
    result = json.loads(next((config.run.dir / "validation").glob("*.json")).read_text())
    assert set(result["domains"]) == {"prose", "reference", "code"}
    for name, score in result["domains"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert f"{score['bits_per_byte']:.4f}" in row
        assert f"{score['perplexity']:.2f}" in row
    assert f"| {checkpoint.tokens:,} |" in card
    real_parameters = sum(p.numel() for p in model_of(config, checkpoint).parameters()) - 16 * (768 - 700)
    assert f"| {real_parameters:,} |" in card
    assert card.startswith("---\nlibrary_name: transformers")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == config.export.license


def test_repeating_the_stage_touches_nothing(exported: tuple[RunConfig, Checkpoint]) -> None:
    config, _ = exported
    before = snapshot(config.run.dir / "export")
    run_stages(config.model_copy(update={"stage": "export"}))
    assert snapshot(config.run.dir / "export") == before


def test_an_export_counts_only_while_it_is_whole_and_of_this_checkpoint(make_run: MakeRun) -> None:
    config, checkpoint = make_run("export.formats=[hf]")
    assert not is_exported(config, checkpoint)
    export_checkpoint(config)
    assert is_exported(config, checkpoint)
    other = config.model_copy(update={"export": config.export.model_copy(update={"dtype": "bfloat16"})})
    assert not is_exported(other, checkpoint)
    weights = config.run.dir / "export" / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-1]), weights.unlink):
        damage()
        assert not is_exported(config, checkpoint)
    weights.write_bytes(whole)
    for record in ('{"checkpoint_digest": 1}', "[]", "not JSON"):
        (config.run.dir / "export" / "export.json").write_text(record)
        assert not is_exported(config, checkpoint)


def flip(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name].view(-1)[5] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def flip_hf(folder: Path) -> None:
    flip(folder / "hf" / "model.safetensors", "model.layers.1.mlp.down_proj.weight")


def turn_hf(folder: Path) -> None:
    path = folder / "hf" / "config.json"
    changed = json.loads(path.read_text())
    changed["rope_theta"] = changed["rope_parameters"]["rope_theta"] = 9000.0
    path.write_text(json.dumps(changed))


def poison_hf(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def flip_nemo(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["gpt.decoder.layers.0.mlp.linear_fc2.weight"].view(-1)[5] += 0.5

    repack(folder / "model.nemo", folder / "model.nemo", change_weights(change))


def load_from_nemo(path: Path) -> dict[str, torch.Tensor]:
    with open_archive(path) as archive:
        return archive.weights()


def damaging(damage: Callable[[Path], None]) -> type[Exporter]:
    """An exporter whose files change between writing and proof, as a bad disk or a wrong writer would change them."""

    class Damaging(Exporter):
        def write(self, folder: Path, model: YxanulGPT) -> None:
            super().write(folder, model)
            damage(folder)

    return Damaging


@pytest.mark.parametrize("damage", [flip_hf, turn_hf, poison_hf])
def test_a_failed_proof_leaves_no_export(make_run: MakeRun, damage: Callable[[Path], None]) -> None:
    config, _ = make_run("export.formats=[hf]")
    with pytest.raises(ParityError, match="hf: logits differ by"):
        damaging(damage)(config).run()
    assert sorted(path.name for path in config.run.dir.iterdir()) == ["checkpoints", "tokenizer"]


def test_a_failed_proof_keeps_the_older_export(make_run: MakeRun) -> None:
    config, _ = make_run("export.formats=[nemo]")
    export_checkpoint(config)
    before = snapshot(config.run.dir / "export")
    with pytest.raises(ParityError, match=r"model\.nemo: logits differ by"):
        damaging(flip_nemo)(config).run()
    assert snapshot(config.run.dir / "export") == before
    assert not (config.run.dir / ".export.tmp").exists()
    # An export that was killed between its two renames: the old one comes back, and stays if the next one fails.
    (config.run.dir / "export").rename(config.run.dir / "export.old")
    with pytest.raises(ParityError, match=r"model\.nemo: logits differ by"):
        damaging(flip_nemo)(config).run()
    assert snapshot(config.run.dir / "export") == before
    assert not (config.run.dir / "export.old").exists()


@torch.no_grad()
def test_an_export_that_is_right_but_poor_in_fp32_fails(exported: tuple[RunConfig, Checkpoint]) -> None:
    """Exact in FP64; in FP32 its logits come out of a detour over large numbers, as a badly ordered sum would make them."""
    model = model_of(*exported)
    ids_BT = fixed_prompts(model.real_vocab_size, eos_id=0)
    expected = expect_weights_rounded(model, ids_BT, torch.float32)
    check_parity("it", expected, model)

    class Poor(torch.nn.Module):
        def __init__(self, detour: float):
            super().__init__()
            self.model, self.detour = model, detour

        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            logits = self.model(ids_BT).to(next(self.model.parameters()).dtype)
            return (logits + self.detour) - self.detour

    assert check_parity("it", expected, Poor(10.0))["max_logit_difference"] < 1e-5
    with pytest.raises(ParityError, match=r"it in FP32: logits differ by .*allowed are 0\.0001"):
        check_parity("it", expected, Poor(1e5))


def rounded(model: YxanulGPT) -> dict[str, torch.Tensor]:
    return {name: weight.detach().bfloat16().float() for name, weight in model.named_parameters()}


@torch.no_grad()
def test_bf16_exports_are_the_rounded_model_to_fp32_accuracy(make_run: MakeRun) -> None:
    """The tolerance of the proof is that of FP32: a plain reference with rounded weights confirms what it compares with."""
    config, checkpoint = make_run("export.dtype=bfloat16")
    export_checkpoint(config)
    folder = config.run.dir / "export"
    parity = json.loads((folder / "export.json").read_text())["parity"]
    for result in parity.values():
        assert result["max_logit_difference"] < 1e-4
        assert result["equal_greedy_tokens"] == 64
        assert result["rounding_logit_difference"] > 1e-3
    model = model_of(config, checkpoint)
    vocab_size, ids_BT = model.real_vocab_size, fixed_prompts(model.real_vocab_size, eos_id=0)
    # `.nemo`: every matrix of the model rounded.
    plain = PlainGPT(model.model_shape, rounded(model)).double()
    stored = load_from_nemo(folder / "model.nemo")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert (
        PlainGPT(model.model_shape, stored).double()(ids_BT, vocab_size) - plain(ids_BT, vocab_size)
    ).abs().max() == 0
    expected = expect_weights_rounded(model, ids_BT, torch.bfloat16)
    assert (expected.logits_BTV - plain(expected.ids_BT, vocab_size)).abs().max() < 1e-4
    assert expected.rounding_difference == pytest.approx(
        (expected.logits_BTV - model(expected.ids_BT)).abs().max().item(), rel=1e-3
    ), "the weights are back in FP32"
    # `hf`: the table is rounded after it was multiplied out.
    state = rounded(model)
    table = model.embedding.word_embeddings.weight.double() @ model.embedding.projection.weight.double().T
    state["embedding.word_embeddings.weight"] = table.float().bfloat16().float()
    state["embedding.projection.weight"] = torch.eye(config.model.hidden_size)
    plain = PlainGPT(model.model_shape, state).double()
    difference = load_folder(folder / "hf")(ids_BT).logits - plain(ids_BT, vocab_size)
    assert difference.abs().max() < 1e-4
    config_json = json.loads((folder / "hf" / "config.json").read_text())
    assert config_json["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(folder / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_folder_has_the_names_and_shapes_that_serving_engines_look_for(
    exported: tuple[RunConfig, Checkpoint],
) -> None:
    """vLLM and others read config.json and the tensors by transformers' names, without transformers' own leniency."""
    folder = exported[0].run.dir / "export" / "hf"
    described = LlamaConfig.from_pretrained(folder)
    assert described.architectures == ["LlamaForCausalLM"] and described.tie_word_embeddings
    with torch.device("meta"):
        expected = LlamaForCausalLM(described).state_dict()
    # A tied head is not stored a second time.
    del expected["lm_head.weight"]
    stored = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in expected.items()}


@torch.no_grad()
def test_the_factorized_folder_keeps_the_small_matrices(make_run: MakeRun) -> None:
    config, checkpoint = make_run("export.formats=[hf]", "export.factorized=true")
    export_checkpoint(config)
    folder, model = config.run.dir / "export" / "hf", model_of(config, checkpoint)
    weights = load_file(folder / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == (
        sum(p.numel() for p in model.parameters()) - 16 * (768 - 700)
    )
    ids_BT = fixed_prompts(model.real_vocab_size, eos_id=0)
    theirs = load_folder(folder, trust_own_code=True)
    assert type(theirs).__module__.startswith("transformers_modules"), "the code comes from the folder"
    assert (theirs(ids_BT).logits - model(ids_BT)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_folder(folder)


def chosen_checkpoint(config: RunConfig) -> Checkpoint:
    return CheckpointStore.of_run(config).choose(config.export.checkpoint, "export.checkpoint")


def test_the_checkpoint_to_export_is_the_one_that_is_named(make_run: MakeRun) -> None:
    config, first = make_run("export.formats=[hf]", "export.checkpoint=best")
    store = CheckpointStore(config.run.dir / "checkpoints")
    with pytest.raises(
        UserError, match=r"export\.checkpoint: is best, but .* names no good checkpoint; expected latest"
    ):
        chosen_checkpoint(config)
    assert not is_exported(config, first)
    store.mark_best(first, "bits", 1.0)
    export_checkpoint(config)
    assert is_exported(config, first)
    # Another checkpoint that is newest, but not best.
    second_phase = phase_plan(plan_phases(config.curriculum)[1])
    ledger = first.read_ledger().start_phase(second_phase, 1, 1)
    source = next(iter(ledger.tokens_per_source))
    place = store.begin(ledger.tokens_total + second_phase.tokens_per_step)
    newer = store.commit(
        place, ledger.consume(second_phase.tokens_per_step, {source: second_phase.tokens_per_step}), False
    )
    assert store.newest_good() == newer
    assert is_exported(config, newer), "the best one still is the first"
    latest = config.model_copy(update={"export": config.export.model_copy(update={"checkpoint": "latest"})})
    assert not is_exported(latest, newer)
    assert chosen_checkpoint(latest) == newer
    by_name = config.model_copy(update={"export": config.export.model_copy(update={"checkpoint": first.path.name})})
    assert chosen_checkpoint(by_name) == first
    assert not is_exported(by_name, newer), "the settings are part of the record"
    absent = config.model_copy(update={"export": config.export.model_copy(update={"checkpoint": "tokens_" + "9" * 15})})
    with pytest.raises(UserError, match="is no complete checkpoint"):
        chosen_checkpoint(absent)
    assert not is_exported(absent, newer)
    assert chosen_checkpoint(config) == first


def test_what_cannot_be_exported_is_refused_with_the_reason(make_run: MakeRun, tmp_path: Path) -> None:
    config, _ = make_run("export.formats=[hf]")
    short = config.model_copy(update={"model": config.model.model_copy(update={"max_position_embeddings": 64})})
    with pytest.raises(UserError, match=r"max_position_embeddings: is 64; expected at least 112"):
        Exporter(short)
    odd = config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 34})})
    with pytest.raises(UserError, match=r"34 is not a multiple of num_attention_heads=4"):
        Exporter(odd)
    with pytest.raises(UserError, match="is of another model"):
        larger = config.model.model_copy(update={"ffn_hidden_size": 96})
        Exporter(config.model_copy(update={"model": larger})).run()
    empty = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    with pytest.raises(UserError, match="holds no checkpoint"):
        Exporter(empty)


def test_a_model_that_diverged_is_named_as_such(make_run: MakeRun) -> None:
    config, checkpoint = make_run()
    model = model_of(config, checkpoint)
    with torch.no_grad():
        model.decoder.final_layernorm.weight[0] = torch.inf
    prompts_BT = fixed_prompts(model.real_vocab_size, eos_id=0)
    with pytest.raises(UserError, match=r"weights: has 1 of 32 values of 'model.norm.weight' that are NaN or infinite"):
        expect_weights_rounded(model, prompts_BT, torch.float32)
