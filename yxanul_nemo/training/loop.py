"""The training loop: one phase from its first step to its validation."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from megatron.core import parallel_state

from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.data.windows import Batch, PhaseBatches
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import any_rank, any_rank_each
from yxanul_nemo.training.prepare import PreparedPhase
from yxanul_nemo.training.records import Show, log_line, make_recorder
from yxanul_nemo.training.saving import CheckpointSaver
from yxanul_nemo.training.signals import StopRequest
from yxanul_nemo.training.sinks import make_sinks
from yxanul_nemo.training.state import TrainingState
from yxanul_nemo.training.validating import InPhaseValidation, validate_phase
from yxanul_nemo.training.watchdog import Watchdog


def train_phase(
    prepared: PreparedPhase, stop: StopRequest, show: Show = log_line, callbacks: Sequence[object] = ()
) -> bool:
    """Train a phase to its end and validate it.

    A checkpoint is saved every `checkpoint.every_tokens` tokens, at the end of the phase and on a request to stop, with a record before
    it: so the records of a resumed run are about each step exactly once.

    Args:
        stop: asked after each step.
        show: what shows the first rank's records to people.
        callbacks: objects with some of `user_callbacks.HOOKS`.

    Returns:
        True if all of that is done, False if it was stopped on request.
    """
    config, phase, backend = prepared.config, prepared.phase, prepared.backend
    state = TrainingState(prepared, stop, callbacks)
    meter = state.meter
    if state.is_finished:
        # Of a run that ended before the validation did.
        return _ended(state, validate_phase(state, lambda: prepared.checkpoint))
    saver = CheckpointSaver(prepared.store, prepared.sharded_state, to_yaml(config), config.checkpoint.asynchronous)
    validation, recorder = InPhaseValidation(state), make_recorder(prepared, show if state.is_global_zero else log_line)
    with _training(state, saver) as (batches, watchdog):
        state.call("on_train_start")
        validation.begin()
        meter.restart()
        saved_at_tokens, step_ended = state.tokens_total, time.perf_counter()
        for batch_index, (ids_ABT, labels_ABT) in enumerate(batches):
            # Read. The batch comes from a thread; the time since the last step was spent waiting for it.
            meter.data_wait_seconds += time.perf_counter() - step_ended
            state.call("on_train_batch_start", (ids_ABT, labels_ABT), batch_index)

            # Compute and update.
            lr = state.next_learning_rate()
            result = backend.train_step(
                ids_ABT, labels_ABT, lr, phase.grad_clip, in_bf16=state.is_in_bf16, begins_fp8=state.begins_fp8
            )
            state.count_step(lr, result)
            state.call("on_train_batch_end", result, (ids_ABT, labels_ABT), batch_index)

            # Validate. A checkpoint at the same step comes after the result: a run that is killed in between validates again.
            if validation.is_due() and not any_rank(bool(stop)):
                validation.run()

            # Record. Before anything waits: a GPU goes on with its queue meanwhile, and that time is training.
            is_stopping, save_failed = any_rank_each(bool(stop), saver.failed)
            if save_failed:
                saver.wait()
            tokens_since_save = state.tokens_total - saved_at_tokens
            saves = state.is_finished or is_stopping or tokens_since_save >= config.checkpoint.every_tokens
            if saves or state.steps_done % config.logging.every_steps == 0:
                recorder.record(state)
            if saves:
                with meter.waiting_for_save():
                    saver.wait()
            meter.save_seconds += saver.written_seconds()
            state.check_skips()

            # Save: training waits for a copy of the state; a thread writes it.
            if saves:
                with meter.waiting_for_save():
                    saver.start(ledger := state.ledger(), phase_end=state.is_finished)
                saved_at_tokens = state.tokens_total
                state.call("on_save_checkpoint", ledger.model_dump())

            # Stop, where a rank was asked to.
            watchdog.step_done()
            if is_stopping:
                break
            step_ended = time.perf_counter()
        state.call("on_train_end")
    if not state.is_finished or any_rank(bool(stop)):
        saver.wait()
        logger.info("stopped by %s at %s tokens, saved", stop.reason or "a rank", f"{state.tokens_total:,}")
        return _ended(state, False)
    return _ended(state, validate_phase(state, saver.wait))


@contextmanager
def _training(state: TrainingState, saver: CheckpointSaver) -> Iterator[tuple[Iterator[Batch], Watchdog]]:
    """What the loop runs in: a thread that reads batches, loggers, a watchdog; all are ended with the block, however it ends."""
    prepared, config = state.prepared, state.config
    _log_begin(state)
    if prepared.device == "cuda":
        # What was held while the micro-batch was tried; a CUDA graph cannot take it while it is captured.
        torch.cuda.empty_cache()
    batches = PhaseBatches(
        prepared.windows,
        prepared.layout,
        parallel_state.get_data_parallel_rank(),
        prepared.first_step,
        prepared.phase.steps,
        pinned=prepared.device == "cuda",
    )
    watchdog = Watchdog(
        config.guards.hang_seconds,
        f"rank {torch.distributed.get_rank()}",
        others=torch.distributed.get_world_size() > 1,
    )
    state.loggers = make_sinks(config, state.tokens_total) if state.is_global_zero else []
    status = "failed"
    try:
        with watchdog, closing(iter(batches)) as read:
            yield read, watchdog
        status = "success"
    except Exception as error:
        try:
            # What is being saved is good, whatever happened to training since.
            saver.wait()
        finally:
            state.call("on_exception", error)
        raise
    finally:
        for sink in state.loggers:
            sink.finalize(status)


def _log_begin(state: TrainingState) -> None:
    phase, layout, bf16_tokens = state.phase, state.prepared.layout, state.config.precision.bf16_first_tokens
    logger.info(
        "phase %d: seq_len %d, %d steps of %s tokens = %d ranks x %d x micro-batch %d, from step %d",
        phase.number,
        phase.seq_len,
        phase.steps,
        f"{phase.tokens_per_step:,}",
        layout.data_parallel,
        layout.accumulation,
        layout.micro_batch_size,
        state.steps_done,
    )
    if state.tokens_total < bf16_tokens:
        logger.info("in BF16 up to %s tokens of the run, then in FP8", f"{bf16_tokens:,}")


def _ended(state: TrainingState, done: bool) -> bool:
    """Part from the other ranks. Not after an error: they may never come to where this one would wait for them."""
    state.prepared.backend.close()
    return done
