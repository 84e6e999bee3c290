"""The plan: figures against independent sums, refusals as in training, and a run's folder that stays as it is."""

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.checkpoint.identity import expected_run, phase_plan
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.curriculum.phases import plan_phases, total_tokens
from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.gpu_table import BY_KEY, GPUS, gpu_named
from yxanul_nemo.model.memory import MEASURED_MODEL, forecast_memory_bytes, largest_micro_batch_tokens
from yxanul_nemo.plan.estimates import forecast_speed
from yxanul_nemo.plan.gpu import choose_gpu
from yxanul_nemo.plan.plan import Plan, learning_rates, make_plan
from yxanul_nemo.plan.stage import disk_warnings, print_plan, run_plan_stage

RECIPES = sorted(path.stem for path in (REPO_DIR / "recipes").glob("*.yaml"))
GIB = 1 << 30
H100, H200 = BY_KEY["h100"], BY_KEY["h200"]
MODEL_197M = ModelConfig.model_validate(
    yaml.safe_load((CONF_DIR / "model" / "yxanul_197m.yaml").read_text(encoding="utf-8"))
)


def plan_of(tmp_path: Path, *overrides: str) -> Plan:
    """The plan of a composed run in an empty folder, for one GPU unless `overrides` say otherwise."""
    return make_plan(parse(compose([f"run.dir={tmp_path}", "plan.gpus=1", *overrides])), [])


def text_of(plan: Plan, width: int) -> str:
    """What is printed in a terminal of that width."""
    console = Console(file=io.StringIO(), width=width)
    print_plan(plan, Path("plan.json"), console)
    return console.file.getvalue()


def besides_rates(plan: Plan) -> list[str]:
    """Return a plan's notes without those about learning rates that were not measured, which long runs have."""
    return [note for note in plan.warnings if "learning rate" not in note and "warm-up" not in note]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_plans_and_fits_its_gpu(tmp_path: Path, recipe: str) -> None:
    plan = plan_of(tmp_path, f"recipe={recipe}")
    assert plan.recipe == recipe
    assert besides_rates(plan) == []
    assert plan.total_tokens == sum(phase.steps * phase.tokens_per_step for phase in plan.phases)
    assert plan.total_seconds == pytest.approx(sum(p.tokens / p.tokens_per_second for p in plan.phases))
    for phase in plan.phases:
        assert (
            phase.micro_batch_size * phase.accumulation * phase.data_parallel * phase.seq_len == phase.tokens_per_step
        )
        assert phase.memory_bytes is None or phase.memory_bytes < plan.gpu_memory_bytes
        assert phase.blend is None or sum(phase.blend.values()) == pytest.approx(1)
    assert json.loads(json.dumps(plan.to_json()))["total_tokens"] == plan.total_tokens


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_holds_every_phase_whole_at_any_width(tmp_path: Path, width: int) -> None:
    plan = plan_of(tmp_path, "recipe=yxanul_197m_ultra", "plan.price_per_gpu_hour=2")
    text = text_of(plan, width)
    lines = [line.split() for line in text.splitlines()]
    for phase in plan.phases:
        assert [line[:2] for line in lines].count([str(phase.number), str(phase.seq_len)]) == 1
        assert f"{phase.tokens_per_step:,}" in text
    assert "8,593,408,000 tokens in 200,000 steps" in text
    assert f"{plan.total_seconds / 3600 * 2:,.2f}" in text


def test_the_recipe_of_an_h100_is_planned_at_its_measured_speed(tmp_path: Path) -> None:
    """One H100, 2026-11-26 (BENCHMARKS.md): 389k tokens/s over the ten phases, 391k over the recipe's five; both were timed once more
    where they share a length."""
    timed = ("recipe=yxanul_197m_h100", "optim=adamw", "plan.gpu=h100", "parallel.micro_batch_tokens=65536")
    plan = plan_of(tmp_path, *timed, "curriculum=h100")
    assert {phase.tokens_per_second_basis for phase in plan.phases} == {"measured"}
    measured = [474.2, 475.3, 474.9, 474.8, 451.6, 443.5, 430.1, 400.4, 358.1, 336.3]
    assert [phase.tokens_per_second / 1e3 for phase in plan.phases] == pytest.approx(measured)
    assert plan.total_tokens / plan.total_seconds == pytest.approx(389.2e3, rel=1e-3)
    plan = plan_of(tmp_path, *timed)
    assert plan.total_tokens / plan.total_seconds == pytest.approx(391.2e3, rel=5e-3)
    assert MEASURED_MODEL.model_copy(update={"name": MODEL_197M.name}) == MODEL_197M


@pytest.mark.parametrize(
    ("precision", "seq_len", "micro_batch_tokens", "accumulation", "measured", "within"),
    [
        ("fp8_hybrid", 8, 32768, 1, 454.0e3, 0.02),
        ("fp8_hybrid", 16, 16384, 1, 415.7e3, 0.02),
        ("fp8_hybrid", 128, 16384, 1, 392.4e3, 0.02),
        ("fp8_hybrid", 256, 16384, 1, 382.8e3, 0.02),
        ("fp8_hybrid", 512, 16384, 1, 369.1e3, 0.02),
        ("fp8_hybrid", 768, 36864, 1, 395.1e3, 0.02),
        ("fp8_hybrid", 1024, 65536, 1, 396.4e3, 0.02),
        ("fp8_hybrid", 2048, 16384, 2, 309.5e3, 0.02),
        ("fp8_hybrid", 2048, 32768, 2, 330.3e3, 0.02),
        ("fp8_hybrid", 2048, 65536, 1, 345.1e3, 0.02),
        ("bf16", 128, 32768, 2, 345.5e3, 0.03),
        ("bf16", 2048, 16384, 2, 261.9e3, 0.03),
        ("bf16", 2048, 32768, 2, 277.3e3, 0.03),
    ],
)
def test_other_steps_are_forecast_from_it(
    precision: str, seq_len: int, micro_batch_tokens: int, accumulation: int, measured: float, within: float
) -> None:
    """What else was timed on an H100 (BENCHMARKS.md)."""
    name = PrecisionConfig(name=precision)
    step = seq_len, micro_batch_tokens, accumulation
    speed = forecast_speed(MODEL_197M, 200_005, name, ParallelConfig(), H100, *step)
    assert speed.basis == "interpolated"
    assert speed.tokens_per_second == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(("seq_len", "measured"), [(128, 434.4e3), (512, 411.4e3), (1024, 381.7e3), (2048, 330.7e3)])
def test_muon_is_forecast_from_it(seq_len: int, measured: float) -> None:
    """Steps of 65,536 tokens with Muon, timed on an H100 (BENCHMARKS.md)."""
    fp8, step = PrecisionConfig(name="fp8_hybrid"), (seq_len, 65_536, 1)
    speed = forecast_speed(MODEL_197M, 200_005, fp8, ParallelConfig(), H100, *step, muon_share=1.0)
    assert speed.basis == "interpolated"
    assert speed.tokens_per_second == pytest.approx(measured, rel=0.02)


def test_speed_elsewhere_is_marked_and_ordered_by_physics() -> None:
    fp8 = PrecisionConfig(name="fp8_hybrid")

    def rate(model: ModelConfig, gpu: str, seq_len: int, tokens: int = 40960) -> float:
        speed = forecast_speed(model, 200_005, fp8, ParallelConfig(), BY_KEY[gpu], seq_len, tokens, 2)
        assert speed.basis != "measured"
        return speed.tokens_per_second

    larger = MODEL_197M.model_copy(update={"num_layers": 56})
    assert 336.3e3 < rate(MODEL_197M, "h100", 1792) < 358.1e3
    assert rate(MODEL_197M, "h100", 4096) < 336.3e3
    assert rate(MODEL_197M, "h100", 2048, 4096) < rate(MODEL_197M, "h100", 2048, 8192) < 309.5e3
    assert rate(larger, "h100", 2048) == pytest.approx(336.3e3 / 1.85, rel=0.03)  # layers are 85-90% of the FLOPs
    assert rate(MODEL_197M, "h200", 2048) > 336.3e3
    # A smaller GPU is full with less; it has cuDNN's attention.
    slower = 317.1e3 * 165.2 / 989.4
    assert (
        rate(MODEL_197M, "rtx_4090", 2048)
        == rate(MODEL_197M, "rtx_4090", 2048, 4096)
        == pytest.approx(slower, rel=0.01)
    )


@pytest.mark.parametrize(
    "changed",
    [{"fused_layers": False}, {"tensor_parallel": 2}, {"context_parallel": 2}],
)
def test_speed_and_memory_are_those_of_the_layers_that_a_layout_has(changed: dict[str, object]) -> None:
    fp8, parallel = PrecisionConfig(name="fp8_hybrid"), ParallelConfig(**changed)
    fused = forecast_speed(MODEL_197M, 200_005, fp8, ParallelConfig(), H100, 2048, 40960, 2)
    modules = forecast_speed(MODEL_197M, 200_005, fp8, parallel, H100, 2048, 40960, 2)
    assert 0.9 * fused.tokens_per_second < modules.tokens_per_second < 0.96 * fused.tokens_per_second
    assert (fused.basis, modules.basis) == ("measured", "roofline") and "0.945" in modules.source
    assert ("less what attention by tiles gains" in modules.source) == ("context_parallel" in changed)


@pytest.mark.parametrize(
    ("seq_len", "measured"), [(64, 474.8e3), (128, 444.4e3), (256, 402.4e3), (512, 392.6e3), (2048, 327.4e3)]
)
def test_other_attention_has_the_speed_that_it_was_measured_at(seq_len: int, measured: float) -> None:
    fp8, others = PrecisionConfig(name="fp8_hybrid"), ParallelConfig(tiled_attention=False)
    speed = forecast_speed(MODEL_197M, 200_005, fp8, others, H100, seq_len, 65536, 1)
    assert speed.tokens_per_second == pytest.approx(measured, rel=0.025)


def test_memory_returns_the_measurements_and_grows_with_the_model() -> None:
    one = ParallelConfig()
    for name, fused, tokens, gib in [
        ("fp8_hybrid", True, 32768, 19.1),
        ("fp8_hybrid", True, 65536, 34.5),
        ("fp8_hybrid", False, 32768, 20.5),
        ("fp8_hybrid", False, 65536, 37.3),
        ("bf16", True, 32768, 22.7),
        ("bf16", True, 65536, 41.8),
    ]:
        parallel = ParallelConfig(fused_layers=fused)
        needed = forecast_memory_bytes(MODEL_197M, 200_064, PrecisionConfig(name=name), parallel, tokens)
        assert needed == pytest.approx(gib * GIB, rel=1e-9)
    bf16 = PrecisionConfig(name="bf16")
    most = largest_micro_batch_tokens(MODEL_197M, 200_064, bf16, one, 24 * GIB)
    assert forecast_memory_bytes(MODEL_197M, 200_064, bf16, one, most) <= 24 * GIB
    assert forecast_memory_bytes(MODEL_197M, 200_064, bf16, one, most + 1) > 24 * GIB
    # 28 layers of 0.79, 0.59, 3.1 and 1.6 million numbers in matrices, one FP32 moment less each.
    less = forecast_memory_bytes(MODEL_197M, 200_064, bf16, one, 32768, with_muon=True)
    assert 22.7 * GIB - less == pytest.approx(28 * 768 * (1024 + 768 + 4096 + 2048) * 4)
    assert largest_micro_batch_tokens(MODEL_197M, 200_064, bf16, one, less + 1, True) == 32768
    deeper = MODEL_197M.model_copy(update={"num_layers": 56})
    assert forecast_memory_bytes(deeper, 200_064, bf16, one, 32768) > 40 * GIB
    # A wider feed-forward block keeps its two inputs and its product in BF16 for the backward pass, and has three larger matrices.
    wider = MODEL_197M.model_copy(update={"ffn_hidden_size": 4096})
    more = forecast_memory_bytes(wider, 200_064, bf16, one, 32768) - 22.7 * GIB
    assert more == pytest.approx(28 * 3 * 2048 * (2 * 32768 + 18 * 768), rel=0.03)


def test_the_peak_learning_rate_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for decay in ("cosine", "linear", "wsd", "constant"):
        for warmup in ("0", "0.03", "0.4", "200000"):
            config = parse(compose([f"optim.decay={decay}", f"optim.warmup_tokens={warmup}"]))
            phases = plan_phases(config.curriculum)
            total = total_tokens(phases)
            for phase in phases:
                rates = [
                    learning_rate(config.optim, phase.first_token + step * phase.tokens_per_step, total, phase.lr_scale)
                    for step in range(1, phase.steps + 1)
                ]
                assert learning_rates(config, phase, total) == (rates[0], max(rates), rates[-1])


def test_too_much_memory_is_refused_with_a_micro_batch_that_fits(tmp_path: Path) -> None:
    overrides = ("recipe=yxanul_197m_fixed_2048", "plan.gpu=rtx_4090")
    with pytest.raises(
        UserError, match=r"^parallel\.micro_batch_tokens: is 65,536, .*phase 1 needs about 34.5 of 24.0 GiB"
    ) as caught:
        plan_of(tmp_path, *overrides, "parallel.micro_batch_tokens=65536")
    remedy = next(word for word in caught.value.fix.split() if word.startswith("parallel.micro_batch_tokens="))
    assert besides_rates(plan_of(tmp_path, *overrides, remedy)) == []


def test_a_micro_batch_over_the_memory_of_the_machine_is_refused_on_a_cpu(tmp_path: Path) -> None:
    over = ("curriculum.phases.2.tokens_per_step=256000000", "curriculum.phases.2.tokens=256000000")
    with pytest.raises(UserError, match=r"^parallel\.micro_batch_tokens: is 100,000,000, .*this machine has"):
        plan_of(tmp_path, *over, "parallel.micro_batch_tokens=1e8", "data.max_epochs=1e6")
    assert plan_of(tmp_path, "parallel.micro_batch_tokens=1e8").total_tokens == 737_280


def test_a_document_mask_is_noted_and_changes_no_figure(tmp_path: Path) -> None:
    whole = plan_of(tmp_path, "recipe=yxanul_197m_h100")
    masked = plan_of(tmp_path, "recipe=yxanul_197m_h100", "data.document_mask=true")
    (warning,) = besides_rates(masked)
    assert "data.document_mask" in warning and "whole windows" in warning
    assert (masked.total_seconds, masked.total_flops) == (whole.total_seconds, whole.total_flops)


def test_cost_is_hours_times_gpus_times_price(tmp_path: Path) -> None:
    overrides = ("recipe=yxanul_197m_h100", "plan.price_per_gpu_hour=3")
    one, eight = plan_of(tmp_path, *overrides), plan_of(tmp_path, *overrides, "plan.gpus=8")
    assert one.total_cost == pytest.approx(3 * one.total_seconds / 3600)
    assert eight.total_cost == pytest.approx(8 * 3 * eight.total_seconds / 3600)
    assert {phase.data_parallel for phase in eight.phases} == {8}
    assert any("8 GPUs" in warning for warning in eight.warnings)


def test_too_little_disk_is_noted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "recipe=yxanul_197m_h100")
    needed = math.ceil(plan.checkpoints_disk_bytes + plan.tokens_disk_bytes)
    assert disk_warnings(plan, needed) == []
    (warning,) = disk_warnings(plan, needed - 2)
    assert "run.dir" in warning and str(tmp_path) in warning


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (("recipe=yxanul_197m_h100", "plan.gpu=a100"), "precision.name"),
        (("recipe=yxanul_197m_h100", "plan.gpu=cpu"), "precision.name"),
        (("recipe=yxanul_197m_h100", "precision=mxfp8"), "precision.name"),
        (("recipe=yxanul_197m_h100", "plan.gpus=3"), "phase 1: tokens_per_step"),
        (("recipe=yxanul_197m_h100", "plan.gpus=3", "parallel.tensor_parallel=2"), "plan.gpus"),
        (("recipe=yxanul_197m_h100", "plan.gpus=0"), "plan.gpus"),
        (("recipe=yxanul_197m_h100", "plan.gpu=h1000"), "plan.gpu"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, overrides: tuple[str, ...], where: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, *overrides)
    assert where in str(caught.value)


def test_the_gpu_found_here_is_planned_for() -> None:
    reported = {
        "h100": "NVIDIA H100 80GB HBM3",
        "h200": "NVIDIA H200",
        "a100": "NVIDIA A100-SXM4-80GB",
        "rtx_4090": "NVIDIA GeForce RTX 4090",
        "rtx_5090": "NVIDIA GeForce RTX 5090",
    }
    assert {gpu.key: gpu_named(reported[gpu.key]) for gpu in GPUS} == BY_KEY
    for other in ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40S"):
        assert gpu_named(other) is None
    config = parse(compose(["recipe=yxanul_197m_h100", "plan.gpu=auto"]))
    assert choose_gpu(config, ["NVIDIA GeForce RTX 4090"])[0] == BY_KEY["rtx_4090"]
    assert choose_gpu(config, [])[0] == H100
    with pytest.raises(UserError, match=r"plan\.gpu.*L40S"):
        choose_gpu(config, ["NVIDIA L40S"])
    assert choose_gpu(parse(compose()), ["NVIDIA H200"])[0] is None  # the demo asks for a CPU


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]) -> Path:
    """A run with a corpus, the end of phase 1 and half of phase 2 in a checkpoint, and the metrics of both."""
    shutil.copytree(prepared / "data", tmp_path / "run" / "data")
    run = tmp_path / "run"
    config = make_config(f"run.dir={run}")
    manifest = load_manifest(run / "data")
    first, second, _ = plan_phases(config.curriculum)
    ledger = Ledger.fresh(expected_run(config, manifest, plan_phases(config.curriculum)))
    ledger = ledger.start_phase(phase_plan(first), 32, 1).consume(first.tokens, {"prose": first.tokens})
    half = second.tokens_per_step * (second.steps // 2)
    ledger = ledger.start_phase(phase_plan(second), 16, 1).consume(half, {"code": half})
    store = CheckpointStore(run / "checkpoints")
    temporary = store.begin(ledger.tokens_total)
    (temporary / "weights").write_bytes(b"w")
    store.commit(temporary, ledger, phase_end=False)
    speeds = [(1, first.tokens // 2, 100.0), (1, first.tokens, 300.0), (2, first.tokens + half, 500.0)]
    records = [
        {"tokens_total": tokens, "phase": phase, "tokens_per_second": speed, "loss_nats_per_token": 5.0}
        for phase, tokens, speed in speeds
    ]
    half_written = '{"tokens_total": 99'
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + half_written, encoding="utf-8")
    return run


def test_beside_a_run_the_plan_says_what_is_done(run_dir: Path, make_config: Callable[..., RunConfig]) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    plan = run_plan_stage(make_config(f"run.dir={run_dir}"))
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    written = after.pop(run_dir / "plan.json")
    assert after == before
    assert json.loads(written) == plan.to_json()

    first, second, third = plan.phases
    assert (first.done.tokens, first.done.saved_tokens) == (first.tokens, first.tokens)
    assert first.done.tokens_per_second_median == 200
    assert first.done.training_seconds == pytest.approx(first.tokens / 2 / 100 + first.tokens / 2 / 300)
    assert second.done.tokens == second.tokens // 2
    assert third.done is None
    done = text_of(plan, 220).splitlines()
    assert any(line.split()[:2] == ["2", "64"] and "50%" in line for line in done)


def test_a_prepared_corpus_gives_epochs_text_and_vocabulary(
    run_dir: Path, make_config: Callable[..., RunConfig]
) -> None:
    plan = make_plan(make_config(f"run.dir={run_dir}"), [])
    manifest = load_manifest(run_dir / "data")
    assert plan.vocab_size == manifest.vocab_size
    tokens = sum(source.tokens("train") for source in manifest.sources.values())
    text_bytes = sum(source.text_bytes("train") for source in manifest.sources.values())
    assert plan.sources["prose"].epochs == pytest.approx(plan.total_tokens / tokens)
    # A blend in proportion to the sizes has the corpus's own bytes per token.
    assert plan.phases[0].text_chars == pytest.approx(16 * text_bytes / tokens)


def test_an_edited_curriculum_and_too_little_text_are_refused(
    run_dir: Path, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(UserError, match=r"phase_1\.lr_scale|phase 1 is finished"):
        make_plan(make_config(f"run.dir={run_dir}", "curriculum.phases.0.lr_scale=0.9"), [])
    with pytest.raises(UserError, match=r"data\.max_epochs"):
        make_plan(make_config(f"run.dir={run_dir}", "data.max_epochs=0.01"), [])
    assert not (run_dir / "plan.json").exists()


@pytest.mark.parametrize("keep_phase_ends", [True, False])
def test_no_more_checkpoints_lie_on_disk_than_planned(
    prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig], keep_phase_ends: bool
) -> None:
    """The store itself, saving whenever training would, with the first checkpoint as the best."""
    config = make_config(
        f"run.dir={tmp_path / 'run'}", "checkpoint.every_tokens=1024", "checkpoint.keep_latest=2",
        f"checkpoint.keep_phase_ends={keep_phase_ends}",
    )  # fmt: skip
    phases = plan_phases(config.curriculum)
    store = CheckpointStore.of_run(config)
    ledger = Ledger.fresh(expected_run(config, load_manifest(prepared / "data"), phases))
    most = 0
    for phase in phases:
        ledger = ledger.start_phase(phase_plan(phase), 1, 1)
        for step in range(1, phase.steps + 1):
            ledger = ledger.consume(phase.tokens_per_step, {"prose": phase.tokens_per_step})
            if step < phase.steps and step * phase.tokens_per_step % 1024:
                continue
            temporary = store.begin(ledger.tokens_total)
            (temporary / "weights").write_bytes(b"w")
            most = max(most, sum(path.is_dir() for path in store.root.iterdir()))
            committed = store.commit(temporary, ledger, phase_end=step == phase.steps)
            if phase.number == 1 and step == phase.steps:
                store.mark_best(committed, "mean_bits_per_byte", 1.0)
    assert make_plan(config, []).checkpoints_kept == most
