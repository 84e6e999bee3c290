"""The page about one run."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.changes import shown
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.figures import GIB, clock, count, rate, size
from yxanul_nemo.report.gather import Run
from yxanul_nemo.report.page import Card, Section, Table, render
from yxanul_nemo.report.samples import Sample
from yxanul_nemo.report.style import Chart
from yxanul_nemo.report.tasks import tasks_sections
from yxanul_nemo.validation.record import advice

NONE = "-"
UTC = "%Y-%m-%d %H:%M:%S UTC"


def run_page(run: Run, charts: Mapping[str, Chart], samples: list[Sample]) -> str:
    """The page's HTML."""
    by_phase: list[tuple[Phase, list[Sample]]] = [
        (phase, texts) for phase in run.phases if (texts := [s for s in samples if s.phase == phase.number])
    ]
    sections = [
        Section(
            "loss",
            "Loss",
            "Means over the steps between two records. Bits per byte divide by the length of the text and so compare over tokenizers "
            "and lengths; the held-out mean is scored at one length after each phase.",
            _some(charts, "loss"),
        ),
        Section(
            "validation", "Held-out text", _validation_note(run), _some(charts, "validation"), _validation_tables(run)
        ),
        *tasks_sections(run),
        Section(
            "plan",
            "Plan and reality",
            run.plan_note and f"There is no forecast: {run.plan_note}",
            (),
            [plan_table(run)],
        ),
        Section("speed", "Speed", _speed_note(run), _some(charts, "speed")),
        Section("schedule", "Learning rate and clipping", "", _some(charts, "schedule")),
        *(
            [Section("history", "Changes in the life of the run", "", (), [_history_table(run)])]
            if _history(run)
            else []
        ),
        Section("gradients", "Gradients", _gradient_note(run), _some(charts, "gradients")),
        Section("data", "Data", "", _some(charts, "sources"), [_data_table(run, run.manifest)] if run.manifest else []),
        Section(
            "samples",
            "Samples",
            "Written by the model of each phase's end. A prompt is in blue; without one the model begins by itself."
            if by_phase
            else "None yet: they are made from the checkpoints at the ends of phases.",
        ),
        Section("environment", "Environment", "", (), [_checkpoints_table(run.exported)] if run.exported else []),
    ]
    return render(
        "run.html",
        title=f"{run.config.run.name} - report",
        run=run,
        state=state(run),
        cards=_cards(run),
        sections=sections,
        samples=by_phase,
        commands=_commands(run.environment),
        facts=list(_facts(run.environment)),
        config_yaml=to_yaml(run.config),
    )


def state(run: Run) -> str:
    """Where the run stands, in words."""
    if run.is_finished:
        return "finished"
    if not run.done:
        return "not begun"
    share = run.trained_tokens / run.total_tokens
    last = run.records["time_unix"][-1] if len(run.records["time_unix"]) else None
    when = f", last record {time.strftime(UTC, time.gmtime(last))}" if last and last > 0 else ""
    return f"phase {max(run.done)} of {len(run.phases)}, {share:.0%} of the tokens{when}"


def plan_table(run: Run) -> Table:
    """Each phase as it was forecast and as it went."""
    has_memory = bool(run.plan and run.plan.gpu_memory_bytes)
    has_mfu = any(run.median(phase.number, "mfu") is not None for phase in run.phases)
    header = ["phase", "seq len", "tokens", "done", "tokens/s plan", "real", "time plan", "real"]
    header += ["memory plan", "real"] if has_memory else []
    header += ["MFU"] if has_mfu else []
    header += ["learning rate", "last loss", "bits/byte held out"]
    rows = []
    for i, phase in enumerate(run.phases):
        forecast = run.plan.phases[i] if run.plan else None
        done = run.done.get(phase.number)
        estimated = "" if forecast is None or forecast.tokens_per_second_basis == "measured" else "~"
        row = [
            f"{phase.number} {phase.description}".strip(),
            str(phase.seq_len),
            count(phase.tokens),
            f"{done.tokens / phase.tokens:.0%}" if done else NONE,
            f"{estimated}{count(forecast.tokens_per_second, 3)}" if forecast else NONE,
            count(done.tokens_per_second_median, 3) if done and done.tokens_per_second_median else NONE,
            clock(forecast.seconds) if forecast else NONE,
            clock(done.training_seconds) if done and done.training_seconds else NONE,
        ]
        if has_memory:
            planned, real = forecast and forecast.memory_bytes, run.of_phase(phase.number, "peak_memory_bytes")
            row.append(f"{planned / GIB:.1f} GiB" if planned else NONE)
            row.append(f"{real.max() / GIB:.1f} GiB" if len(real) else NONE)
        if has_mfu:
            mfu = run.median(phase.number, "mfu")
            row.append(f"{mfu:.1%}" if mfu is not None else NONE)
        rates = (
            f"{rate(forecast.learning_rate_first)} > {rate(forecast.learning_rate_peak)} > {rate(forecast.learning_rate_last)}"
            if forecast
            else NONE
        )
        loss = done.loss_nats_per_token if done else None
        held_out = run.validations.get(phase.number)
        row += [
            rates,
            f"{loss:.3f}" if loss is not None else NONE,
            f"{held_out['mean_bits_per_byte']:.4f}" if held_out else NONE,
        ]
        rows.append(row)
    total = ["all", "", count(run.total_tokens), f"{run.trained_tokens / run.total_tokens:.0%}", "", ""]
    total += [clock(run.plan.total_seconds) if run.plan else NONE, clock(run.training_seconds)]
    return Table(header, rows, [*total, *[""] * (len(header) - len(total))], wrap=(0,))


def _cards(run: Run) -> list[Card]:
    last = run.last_validation
    skipped = int(sum(v for v in run.records["skipped_steps"] if v > 0))
    newest = max((phase.number for phase in run.phases if run.median(phase.number, "tokens_per_second")), default=0)
    speed, mfu = run.median(newest, "tokens_per_second"), run.median(newest, "mfu")
    reached = f"phase {newest}, {mfu:.1%} MFU" if mfu is not None else f"median of phase {newest}"
    gpus = f", {run.plan.gpus} x {run.plan.gpu}" if run.plan else ""
    return [
        Card("tokens trained", count(run.trained_tokens), f"of {count(run.total_tokens)} in {len(run.phases)} phases"),
        Card(
            "held-out bits per byte",
            f"{last['mean_bits_per_byte']:.4f}" if last else NONE,
            f"mean of {len(last['domains'])} domains" if last else "after the first phase",
        ),
        Card(
            "time in training steps",
            clock(run.training_seconds) if run.training_seconds else NONE,
            "without saving, validation",
        ),
        Card("tokens per second", count(speed, 3) if speed else NONE, reached if speed else ""),
        Card("parameters", count(run.plan.parameters, 4) if run.plan else NONE, f"{trained_formats(run)}{gpus}"),
        Card("skipped steps", f"{skipped:,}", "gradient was not finite"),
    ]


def trained_formats(run: Run) -> str:
    """Number formats that phases were trained in, in the order of first use; as configured where none is recorded."""
    recorded = [record.precision for record in run.ledger.phases if record.precision] if run.ledger else []
    return ", ".join(dict.fromkeys(recorded)) or run.config.precision.name


def _some(charts: Mapping[str, Chart], *names: str) -> list[Chart]:
    return [charts[name] for name in names if name in charts]


def _validation_note(run: Run) -> str:
    last = run.last_validation
    if last is None:
        return "Not validated yet: that is done at the end of each phase."
    return (
        f"Scored in windows of {last['eval_len_tokens']} tokens that move by {last['stride_tokens']}, the same after every phase. "
        "The surprise ratio is a domain's bits per byte over the mean of all."
    )


def _validation_tables(run: Run) -> list[Table]:
    if run.last_validation is None:
        return []
    rows = []
    for name, score in run.last_validation["domains"].items():
        ratio = run.last_validation["surprise_ratio_bits_per_byte"][name]
        rows.append(
            [
                name,
                f"{score['documents']:,}",
                f"{score['tokens']:,}",
                f"{score['bits_per_byte']:.4f} ± {score['bits_per_byte_standard_error']:.4f}",
                f"{score['perplexity']:,.2f}",
                f"{ratio:.3f}",
                advice(ratio) or NONE,
            ]
        )
    header = ["domain", "documents", "tokens", "bits per byte", "perplexity per token", "surprise ratio", "its blend"]
    title = f"After phase {max(run.validations)}"
    mean = ["mean", "", "", f"{run.last_validation['mean_bits_per_byte']:.4f}", "", "", ""]
    return [Table(header, rows, mean, title, left=(0, 6))]


def _speed_note(run: Run) -> str:
    waits = run.records["data_wait_share"]
    wait = f" Waiting for data took {waits.mean():.1%} of it on average." if len(waits) else ""
    return f"Of training steps: saving and validation are left out.{wait}"


def _gradient_note(run: Run) -> str:
    steps = sum(v for v in run.records["steps"] if v > 0)
    skipped = sum(v for v in run.records["skipped_steps"] if v > 0)
    norms = "Norms of the last step before each record."
    return f"{norms} {skipped:,.0f} of {steps:,.0f} steps were skipped because a gradient was not finite."


def _origin(source: SourceConfig) -> str:
    """Where a source's text is from."""
    if source.path is None and source.hub is not None:
        return f"{source.hub.repo}, {source.hub.files}"
    return source.files


def _data_table(run: Run, manifest: CorpusManifest) -> Table:
    read = run.ledger.tokens_per_source if run.ledger else {}
    rows = []
    for name in run.config.data.source_names:
        source = manifest.sources.get(name)
        if source is None:
            continue
        there, taken = source.tokens("train"), read.get(name, 0)
        configured = run.config.data.sources.get(name)
        rows.append(
            [
                name,
                _origin(configured) if configured else "demo corpus",
                f"{source.documents('train'):,}",
                f"{source.documents('heldout'):,}",
                size(source.text_bytes("train")),
                count(there),
                f"{source.text_bytes('train') / max(1, there):.2f}",
                count(taken),
                f"{taken / max(1, there):.2f}",
            ]
        )
    header = ["source", "from", "documents", "held out", "text", "tokens", "bytes/token", "tokens read", "epochs"]
    return Table(header, rows, left=(0, 1), wrap=(1,))


def _checkpoints_table(exported: Mapping[str, Any]) -> Table:
    rows = [
        [name, f"{parity['max_logit_difference']:.2g}", f"{parity['equal_greedy_tokens']}"]
        for name, parity in (exported.get("parity") or {}).items()
    ]
    title = f"Exports of {exported.get('checkpoint', '')}, compared with the checkpoint"
    return Table(["export", "largest logit difference", "equal greedy tokens"], rows, title=title)


def _history(run: Run) -> list[tuple[int, list[str]]]:
    """Return rows of what was changed and where the run came from, with the tokens from which it holds."""
    if run.ledger is None:
        return []
    begun = [
        (one.at_tokens, ["branched from", f"{one.run}, checkpoint {one.digest[:16]}", ""]) for one in run.ledger.lineage
    ]
    changed = [(one.at_tokens, [one.key, shown(one.before), shown(one.now)]) for one in run.ledger.changes]
    return sorted(begun + changed, key=lambda row: row[0])


def _history_table(run: Run) -> Table:
    rows = [[f"{at_tokens:,}", *cells] for at_tokens, cells in _history(run)]
    return Table(["from token", "what", "before", "since then"], rows, left=(1, 2, 3), wrap=(2, 3))


def _commands(environment: Mapping[str, Any]) -> list[str]:
    return [str(one["command"]) for one in (*environment.get("earlier", []), environment) if one.get("command")]


def _facts(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Of the newest command."""
    changed = " with uncommitted changes" if environment.get("uncommitted_changes") else ""
    gpus = environment.get("gpus") or []
    packages = ", ".join(
        f"{name} {version}" for name, version in (environment.get("packages") or {}).items() if version
    )
    memory = environment.get("memory_bytes")
    facts = {
        "started": environment.get("started"),
        "host": environment.get("host"),
        "commit": f"{environment['commit']}{changed}" if environment.get("commit") else None,
        "GPUs": "; ".join(gpus) or "none",
        "CPU": f"{environment.get('cpu')}, {environment.get('cpu_cores')} cores, {memory / GIB:.0f} GiB"
        if memory
        else None,
        "system": environment.get("system"),
        "Python": environment.get("python"),
        "packages": packages,
    }
    return ((name, str(value)) for name, value in facts.items() if value)
