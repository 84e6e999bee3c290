"""Does it pay: the runs behind the claims about curriculum, FP8 and SuperBPE, each by the product's own command, and what they came to.

    python -m benchmarks.evidence --suite main --out OUT [--gpus 0 1] [--per-gpu 3] [--only NAME ...] \
        --tokenizer t80k=tokenizer.path=TOKENIZER -- data.sources.text.path=CORPUS validation.dir=VALIDATION ...

Every run is `python launcher.py --config-dir benchmarks/conf recipe=evidence_...` with the overrides after `--`, stage=data and then
stage=train. Several share a GPU, which hides their start-ups; so speeds in a shared run mean nothing, and times are computed from
`stage=bench` at the same shapes (`benchmarks.evidence_tables`). What a run came to is added to OUT/evidence.json when it ends; runs
that are there already are not repeated. A finished run's checkpoints are removed, except with --keep. Exit code 1 if a run that was
asked for has no result.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.launch.arms import Arm as LaunchedArm
from yxanul_nemo.launch.arms import run_arms
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.report.gather import Run, read_run
from yxanul_nemo.validation.record import in_phase_results

RESULTS_NAME = "evidence.json"
CONF_DIR = REPO_DIR / "benchmarks" / "conf"
CURVE_POINTS = 200


@dataclass(frozen=True)
class Arm:
    """One run."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    tokenizer: str = "t80k"
    """Whose tokens: names the folder in OUT that is shared by the runs with it, and the overrides given as `--tokenizer NAME=...`."""


CURRICULA = ("ultra", "h100", "from_64", "fixed_2048", "from_128")
"""Those with most phases first, because they take longest."""


def _main(suffix: str = "", *overrides: str) -> list[Arm]:
    return [Arm(f"{name}{suffix}", f"evidence_{name}", overrides) for name in CURRICULA]


def _seeded(seed: int) -> tuple[str, ...]:
    """Overrides: other first weights and another order of documents."""
    return f"run.seed={seed}", f"data.seed={seed}"


def _tuning() -> list[Arm]:
    short = ("curriculum.total_tokens=8e6", "validation.every_tokens=4e6")
    return [
        Arm(
            f"fixed-std{std}-lr{lr}",
            "evidence_fixed_2048",
            (*short, f"model.embedding_init_std={std}", f"optim.lr={lr}"),
        )
        for std in ("0.02", "0.1")
        for lr in ("6e-4", "1.2e-3", "2.4e-3")
    ]


SUITES: dict[str, list[Arm]] = {
    "tuning": _tuning(),
    "main": _main(),
    "seed2": _main("-seed2", *_seeded(2)),
    "seed3": _main("-seed3", *_seeded(3)),
    "high_lr": _main("-lr2.4e-3", "optim.lr=2.4e-3"),
    "precision": [
        Arm("fixed_2048-bf16", "evidence_fixed_2048", ("precision=bf16",)),
        Arm("fixed_2048-bf16-seed2", "evidence_fixed_2048", ("precision=bf16", *_seeded(2))),
    ],
    "init": [
        Arm("fixed_2048-std0.02", "evidence_fixed_2048", ("model.embedding_init_std=0.02",)),
        Arm("fixed_2048-std0.05", "evidence_fixed_2048", ("model.embedding_init_std=0.05",)),
    ],
    "tokenizers": [
        Arm("fixed_2048-t180k", "evidence_fixed_2048", tokenizer="t180k"),
        Arm("fixed_2048-bpe", "evidence_fixed_2048", tokenizer="bpe"),
        Arm("fixed_2048-t180k-seed2", "evidence_fixed_2048", _seeded(2), tokenizer="t180k"),
        Arm("fixed_2048-bpe-seed2", "evidence_fixed_2048", _seeded(2), tokenizer="bpe"),
    ],
}


def as_arm(arm: Arm, out: Path, common: tuple[str, ...], tokenizers: dict[str, tuple[str, ...]]) -> LaunchedArm:
    """Return the command of a run; those with one tokenizer share its tokens."""
    arguments = [
        f"--config-dir={CONF_DIR}", f"recipe={arm.recipe}", f"data.dir={out / ('tokens-' + arm.tokenizer)}",
        *common, *tokenizers.get(arm.tokenizer, ()), *arm.overrides,
    ]  # fmt: skip
    return LaunchedArm(arm.name, out / arm.name, tuple(arguments), ("data", "train"))


def summarize(run: Run) -> dict[str, Any]:
    """What is kept of a run: its curves, thinned, and what it ended with."""
    config = run.config
    assert run.manifest is not None, "a run that was trained has its corpus"
    vocab_size, sources = run.manifest.vocab_size, run.manifest.sources.values()
    validations = [
        {"tokens": tokens} | _bits(json.loads(path.read_text(encoding="utf-8")))
        for tokens, path in in_phase_results(run.run_dir)
    ]
    ends = [
        {"tokens": run.phases[number - 1].first_token + run.phases[number - 1].tokens, "phase": number} | _bits(result)
        for number, result in sorted(run.validations.items())
    ]
    records, last = run.records, run.validations[max(run.validations)]
    every = max(1, len(records["tokens_total"]) // CURVE_POINTS)
    restarts = np.diff(records["time_unix"])[np.diff(records["phase"]) != 0].tolist()
    return {
        "description": config.run.description,
        "precision": config.precision.name,
        "learning_rate": config.optim.lr,
        "embedding_init_std": config.model.embedding_init_std,
        "seed": config.run.seed,
        "vocab_size": vocab_size,
        "bytes_per_token": sum(s.text_bytes("train") for s in sources) / sum(s.tokens("train") for s in sources),
        "phases": [
            {
                "seq_len": phase.seq_len,
                "tokens": phase.tokens,
                "flops_per_token": training_flops_per_token(config.model, vocab_size, phase.seq_len),
                "tokens_per_second": run.median(phase.number, "tokens_per_second"),
            }
            for phase in run.phases
        ],
        "in_phase": validations,
        "phase_ends": ends,
        "final": _bits(last),
        "validated": {
            name: {"tokens": score["tokens"], "bytes": score["text_bytes"]} for name, score in last["domains"].items()
        },
        "train_loss": [
            [int(t), round(float(loss), 4)]
            for t, loss in zip(records["tokens_total"][::every], records["loss_nats_per_token"][::every], strict=True)
        ],
        "between_phases_seconds": restarts,
        "skipped_steps": int(records["skipped_steps"].sum()),
    }


def _bits(result: dict[str, Any]) -> dict[str, float]:
    return {name: round(score["bits_per_byte"], 5) for name, score in result["domains"].items()}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), required=True)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted({arm.name for suite in SUITES.values() for arm in suite}),
        metavar="NAME",
        help="of the suites, in this order",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", nargs="+", default=["0"], help="none: a CPU")
    parser.add_argument("--per-gpu", type=int, default=1)
    parser.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="NAME=OVERRIDE",
        help="t80k, t180k, bpe: an override for its runs",
    )
    parser.add_argument("--keep", action="store_true", help="keep checkpoints")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results_path = arguments.out / RESULTS_NAME
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    tokenizers: dict[str, tuple[str, ...]] = {}
    for given in arguments.tokenizer:
        name, _, override = given.partition("=")
        tokenizers[name] = (*tokenizers.get(name, ()), override)
    known = {arm.name: arm for suite in arguments.suite for arm in SUITES[suite]}
    asked_for = arguments.only or list(known)
    began = time.time()
    common = tuple(arguments.overrides)
    arms = [as_arm(known[name], arguments.out, common, tokenizers) for name in asked_for if name not in results]

    def ended(arm: LaunchedArm, code: int) -> None:
        if code:
            print(f"{arm.name}: exit code {code}, see {arm.folder / 'sweep.log'}", flush=True)
            return
        summary = summarize(read_run(arm.folder)) | {"recipe": known[arm.name].recipe}
        results[arm.name] = summary
        write_json_atomic(results_path, results)
        print(f"{arm.name}: {summary['final']} {time.time() - began:.0f} s after the first began", flush=True)
        if not arguments.keep:
            shutil.rmtree(arm.folder / "checkpoints")

    places = ["" if gpu == "none" else gpu for gpu in arguments.gpus] * arguments.per_gpu
    run_arms(arms, places, ended)
    return 0 if results.keys() >= set(asked_for) else 1


if __name__ == "__main__":
    sys.exit(main())
