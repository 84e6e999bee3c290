"""Training with attention inside documents: through training, over a stop, and the room that a GPU's lists of documents have."""

import json
import signal

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import PHASES, MakeRun, assert_equal_runs, assert_matches, ledger, records
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.model.documents import REMEMBERED_STEPS, DocumentRoom
from yxanul_nemo.validation.record import phase_result_path

MASK = "data.document_mask=true"


def first_losses(config: RunConfig) -> tuple[float, float, float]:
    """Loss of the first step that has several documents in a window: as training takes it, of the documents alone, of whole windows."""
    import torch

    from yxanul_nemo.data.windows import PhaseBatches
    from yxanul_nemo.training.prepare import prepare_phase

    prepared = prepare_phase(config, 1)
    model, eos_id = prepared.backend.model, prepared.manifest.eos_id
    batches = PhaseBatches(prepared.windows, prepared.layout, 0, 0, prepared.phase.steps)
    ids_ABT, labels_ABT = next(batch for batch in batches if (batch[0][..., 1:] == eos_id).any())
    with torch.no_grad():
        whole = model(ids_ABT.flatten(0, 1), labels_ABT.flatten(0, 1)).mean()
        alone = sum(
            model(ids_T[None, first:end], labels_T[None, first:end]).sum()
            for ids_T, labels_T in zip(ids_ABT.flatten(0, 1), labels_ABT.flatten(0, 1), strict=True)
            for first, end in spans(ids_T.tolist(), eos_id)
        )
    result = prepared.backend.train_step(ids_ABT, labels_ABT, 1e-3, 1.0)
    return float(result.loss), float(alone / ids_ABT.numel()), float(whole)


def spans(row: list[int], eos_id: int) -> list[tuple[int, int]]:
    begins = [place for place, token in enumerate(row) if place == 0 or token == eos_id]
    return list(zip(begins, [*begins[1:], len(row)], strict=True))


def test_a_step_is_one_on_documents_alone(make_run: MakeRun) -> None:
    trained, alone, whole = run_ranks(first_losses, 1, make_run(MASK, "model.init_std=0.5"))[0]
    assert abs(trained - alone) < 1e-5 * alone < abs(trained - whole)
    trained, _, whole = run_ranks(first_losses, 1, make_run("model.init_std=0.5"))[0]
    assert abs(trained - whole) < 1e-5 * whole


def test_a_masked_run_goes_on_bit_by_bit_and_is_no_other_run(
    make_run: MakeRun, make_config: MakeRun, straight: RunConfig
) -> None:
    through, stopped = make_run(MASK), make_run(MASK)
    assert run_ranks(sessions.train, 1, through, PHASES) == [[True] * 3]
    run_ranks(sessions.train_until, 1, stopped, PHASES, 7168, signal.SIGTERM)
    other = make_config(f"run.dir={stopped.run.dir}", "logging.every_steps=3")
    error = run_ranks(sessions.refusals, 1, [other], PHASES)[0][0]
    assert_matches(
        error,
        r"data\.document_mask: true there, false here.*allow=\[data\.document_mask\]",
    )
    assert run_ranks(sessions.train, 1, stopped, PHASES) == [[True, True]]
    assert_equal_runs(stopped, through)
    assert ledger(through).document_mask and not ledger(straight).document_mask
    assert records(through)[-1]["loss_nats_per_token"] < records(through)[0]["loss_nats_per_token"] - 0.3
    scores = [json.loads(phase_result_path(run.run.dir, 3).read_text())["domains"] for run in (through, straight)]
    assert scores[0] != scores[1]


def test_room_grows_at_once_and_shrinks_when_little_was_needed_for_long() -> None:
    room = DocumentRoom(80)
    assert room.size == 128
    assert not any(room.changes_for(n) for n in (1, 100, 128))
    assert room.changes_for(1000) and room.size == 1024
    changed_at = [step for step in range(2 * REMEMBERED_STEPS) if room.changes_for(100)]
    assert changed_at == [REMEMBERED_STEPS - 1] and room.size == 128
    # One size too large is kept: needs around a power of two would change it again and again.
    assert room.changes_for(129) and room.size == 256
    assert not any(room.changes_for(100) for _ in range(2 * REMEMBERED_STEPS))
