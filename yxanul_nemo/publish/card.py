"""The model card of a publication: the card that the export wrote, with what the ledger and the run's folder say of the training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from yxanul_nemo.export.formats import held_out_lines
from yxanul_nemo.figures import count, duration, size
from yxanul_nemo.publish.publication import Publication
from yxanul_nemo.validation.record import find_result

TAG = "yxanul"
"""Marks the cards that this project wrote."""
PLACE = '"PATH"'
"""What the example in the export's card calls the folder."""


def publication_card(publication: Publication, repo: str) -> ModelCard:
    """Return the card for `repo` (OWNER/NAME); the same publication gives the same card."""
    validation = find_result(publication.run.config, publication.checkpoint)
    card = ModelCard(publication.card_path.read_text(encoding="utf-8"))
    text = card.text.strip().replace(PLACE, f'"{repo}"')
    if validation is not None and (lines := held_out_lines(validation))[0] not in text:
        # It was validated after the export.
        text = "\n".join([text, "", *lines])
    parts = [text, *_sections(publication)]
    data = _metadata(card.data, publication, repo, validation)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _metadata(written: Any, publication: Publication, repo: str, validation: dict[str, Any] | None) -> ModelCardData:
    """The export's metadata with the tag and the results in the form that the hub shows."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=f"held-out text: {name}",
            metric_type="bits_per_byte",
            metric_value=round(score["bits_per_byte"], 4),
        )
        for name, score in (validation["domains"] if validation else {}).items()
    ]
    for task, found in _tasks(publication):
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                metric_type=metric,
                metric_value=round(score["value"], 4),
            )
            for metric, score in found["metrics"].items()
        ]
    values = written.to_dict() | {"tags": [*(written.get("tags") or []), TAG]}
    return ModelCardData(**values, model_name=repo.partition("/")[2], eval_results=results or None)


def _tasks(publication: Publication) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of `stage=evaluate` of this very checkpoint."""
    for result in publication.run.evaluations:
        if Path(str(result["model"])).resolve() == publication.checkpoint.path.resolve():
            yield from ((task, found) for task, found in result["tasks"].items() if "unavailable" not in found)


def _sections(publication: Publication) -> Iterator[str]:
    if tasks := _task_rows(publication):
        note = "Through lm-evaluation-harness; ± is the standard error over questions, chance what guessing gives."
        yield f"## Tasks\n\n{note}\n\n" + _table(["task", "metric", "questions", "value", "chance"], tasks)
    yield "## Data\n\n" + _table(
        ["source", "from", "licence", "documents", "text", "tokens read", "epochs"], list(_source_rows(publication))
    )
    yield "## Curriculum\n\n" + _curriculum(publication)
    yield "## Optimizer\n\n" + _table(["", ""], list(_optimizer_rows(publication)))
    yield "## Hardware and time\n\n" + _table(["", ""], list(_hardware_rows(publication)))
    yield (
        "## Proof of the export\n\nEach export was loaded anew and compared with the checkpoint on fixed prompts.\n\n"
        + _table(
            ["export", "largest logit difference (FP64)", "from rounding the weights", "equal greedy tokens"],
            [
                [
                    name,
                    f"{parity['max_logit_difference']:.2g}",
                    f"{parity['rounding_logit_difference']:.2g}",
                    str(parity["equal_greedy_tokens"]),
                ]
                for name, parity in publication.parity.items()
            ],
        )
    )
    yield "## Provenance\n\n" + _table(["", ""], list(_provenance_rows(publication)))
    yield "## Limits\n\n" + _limits(publication)


def _task_rows(publication: Publication) -> list[list[str]]:
    rows = []
    for task, found in _tasks(publication):
        for metric, score in found["metrics"].items():
            error = score["standard_error"]
            value = f"{score['value']:.3f}" if error is None else f"{score['value']:.3f} ± {error:.3f}"
            rows.append([task, metric, f"{found['questions']:,}", value, f"{found['chance']:.3f}"])
    return rows


def _source_rows(publication: Publication) -> Iterator[list[str]]:
    """Of each source; folders of the machine that trained are nobody's business."""
    data, manifest = publication.run.config.data, publication.run.manifest
    for name in data.source_names:
        configured = data.sources.get(name)
        hub = configured.hub if configured is not None and configured.is_fetched else None
        origin = f"[{hub.repo}](https://huggingface.co/datasets/{hub.repo}), {hub.files}" if hub else "own files"
        read = publication.ledger.tokens_per_source.get(name, 0)
        source = manifest.sources.get(name) if manifest else None
        yield [
            name,
            origin if configured is not None else "documentation of installed Python packages",
            hub.license if hub else "not recorded",
            f"{source.documents('train'):,}" if source else "-",
            size(source.text_bytes("train")) if source else "-",
            f"{read:,}",
            f"{read / max(1, source.tokens('train')):.2f}" if source else "-",
        ]


def _curriculum(publication: Publication) -> str:
    rows = []
    for phase in publication.ledger.phases:
        blend = phase.adapted_blend or phase.blend
        rows.append(
            [
                str(phase.index),
                f"{phase.seq_len:,}",
                f"{phase.consumed_tokens:,}",
                f"{phase.tokens_per_step:,}",
                f"{phase.lr_scale:g}",
                ", ".join(f"{name} {share:.3g}" for name, share in blend.items()) if blend else "by size",
                phase.precision or publication.run.config.precision.name,
            ]
        )
    header = ["phase", "window (tokens)", "tokens", "tokens per step", "learning-rate factor", "blend", "numbers"]
    lines = [_table(header, rows)]
    lines += [
        f"Begun from the run `{one.run}` after {one.at_tokens:,} tokens (checkpoint `{one.digest[:16]}`)."
        for one in publication.ledger.lineage
    ]
    # Values may be paths of the machine.
    lines += [f"`{one.key}` was changed after {one.at_tokens:,} tokens." for one in publication.ledger.changes]
    return "\n\n".join(lines)


def _optimizer_rows(publication: Publication) -> Iterator[list[str]]:
    optim = publication.run.config.optim
    yield ["optimizer", "Muon for matrices of layers, AdamW for the rest" if optim.muon else "AdamW"]
    yield ["peak learning rate", f"{optim.lr:g}"]
    yield ["schedule", f"{optim.decay}, to {optim.min_lr_ratio:g} of the peak"]
    unit = "of the run" if optim.warmup_tokens < 1 else "tokens"
    yield ["warm-up", f"{optim.warmup_tokens:,g} {unit}" if optim.warmup_tokens else "none"]
    yield ["AdamW's betas, epsilon", f"{optim.beta1:g}, {optim.beta2:g}, {optim.eps:g}"]
    yield ["weight decay", f"{optim.weight_decay:g}"]
    if optim.muon is not None:
        yield ["Muon's momentum", f"{optim.muon.momentum:g}"]
    yield ["steps", f"{publication.ledger.steps_total:,}, of which {publication.ledger.skipped_steps:,} were skipped"]


def _hardware_rows(publication: Publication) -> Iterator[list[str]]:
    environment = publication.run.environment
    machines = [_machine(one) for one in (*environment.get("earlier", []), environment)]
    yield ["machines of the run's commands", "; ".join(dict.fromkeys(machines))]
    yield ["processes", ", ".join(dict.fromkeys(str(phase.world_size) for phase in publication.ledger.phases))]
    seconds = process_seconds = 0.0
    for phase in publication.ledger.phases:
        done = publication.run.done.get(phase.index)
        if done is not None and done.training_seconds and done.tokens:
            # The run may have gone on since the checkpoint.
            spent = done.training_seconds * phase.consumed_tokens / done.tokens
            seconds, process_seconds = seconds + spent, process_seconds + spent * phase.world_size
    if seconds:
        yield ["time in training steps", f"{duration(seconds)} ({process_seconds / 3600:.2f} hours of one process)"]


def _machine(environment: dict[str, Any]) -> str:
    gpus = [str(line).partition(",")[0] for line in environment.get("gpus") or []]
    if gpus:
        return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    return str(environment.get("cpu") or "unknown")


def _provenance_rows(publication: Publication) -> Iterator[list[str]]:
    run, ledger = publication.run, publication.ledger
    changed = " with uncommitted changes" if run.environment.get("uncommitted_changes") else ""
    yield ["commit of the code", f"`{run.environment.get('commit') or 'unknown'}`{changed}"]
    yield ["checkpoint", f"`{publication.checkpoint.path.name}`, `{publication.checkpoint.manifest.digest}`"]
    yield ["corpus", f"`{ledger.corpus_fingerprint}`"]
    yield ["tokenizer", f"`{ledger.tokenizer_fingerprint}`"]
    packages = run.environment.get("packages") or {}
    yield ["packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)]
    for name, digest in publication.hashes.items():
        yield [f"SHA-256 of `{name}`", f"`{digest}`"]


def _limits(publication: Publication) -> str:
    longest = max((phase.seq_len for phase in publication.ledger.phases), default=0)
    context = publication.run.config.model.max_position_embeddings
    beyond = f" Positions from {longest:,} to {context:,} were never trained." if longest < context else ""
    license_name = publication.run.config.export.license
    return (
        "This is a base model: it continues text. It was not taught to follow instructions or to refuse, and it states falsehoods as "
        f"fluently as facts. It has read {count(publication.ledger.tokens_total)} tokens of the sources above and carries their errors "
        f"and leanings; in other languages and subjects it is weaker. It was trained on windows of up to {longest:,} tokens.{beyond}\n\n"
        f"The weights are under {license_name}. The licences of the text are in the table of the data; where one is not recorded, ask "
        "the owner of the model."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
