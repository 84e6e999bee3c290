"""Training on GPUs: Transformer Engine layers, forward and backward in a CUDA graph, what ranks say to each other inside graphs too."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.model.context import WindowSlices
from yxanul_nemo.model.documents import TYPICAL_DOCUMENT_TOKENS, DocumentRoom, Documents, count_documents
from yxanul_nemo.model.fp8_state import scaling_state_kept, sharded_fp8_state
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import Backend, StepResult
from yxanul_nemo.training.guard import UpdateGuard
from yxanul_nemo.training.optimizer import MainParamOptimizer

WARMUP_PASSES = 3
"""Passes before capture: lazily made state (FP8 scales, cuBLAS workspaces, compiled kernels) must exist by then."""

TIMED_PASSES = 10


class CudaBackend(Backend):
    """One rank's model and optimizer on its GPU."""

    def __init__(self, model: YxanulGPT, config: RunConfig, documents: Documents | None = None):
        self.model, self.documents, self.precision = model, documents, config.precision
        self.guard = UpdateGuard(config.guards, torch.device("cuda", torch.cuda.current_device()))
        self.is_fp8 = config.precision.is_fp8
        self.fp8_format = model.config.fp8
        self.use_graph = config.parallel.cuda_graph
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.slices = WindowSlices(parallel_state.get_context_parallel_group())
        self.optimizer = MainParamOptimizer(
            model,
            config.optim,
            self.data_group,
            config.parallel.shares_optimizer,
            parallel_state.get_tensor_model_parallel_group(),
        )
        self.flat = self.optimizer.flat
        self.graph: torch.cuda.CUDAGraph | None = None
        """Forward and backward of a micro-batch."""
        self.update_graph: torch.cuda.CUDAGraph | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device="cuda")
        self.loss = torch.zeros((), dtype=torch.float64, device="cuda")
        """Of the step, over all ranks, where a graph can find it."""

    @property
    def uses_graph(self) -> bool:
        """Whether micro-batches are replays of a CUDA graph."""
        return self.graph is not None

    def prepare(self, micro_batch_size: int, accumulation: int, seq_len: int) -> None:
        """Warm up on random tokens, so that lazily made state exists when a checkpoint is loaded; must come before anything else.

        FP8's delayed scales start from these passes, whose gradients have the size of real ones. Raises UserError if this GPU cannot keep
        attention inside documents at this length.
        """
        self.model.train()
        self.prepared_for = micro_batch_size, accumulation, seq_len
        shape = (micro_batch_size, seq_len)
        self.ids_BT, self.labels_BT = (
            self.slices.take(torch.randint(0, self.model.real_vocab_size, shape, device="cuda")) for _ in range(2)
        )
        self.room: DocumentRoom | None = None
        if self.documents is not None:
            self.ids_BT.view(-1)[100::TYPICAL_DOCUMENT_TOKENS] = self.documents.eos_id
            if self.model.lists_documents(seq_len):
                _require_packed_attention(seq_len)
                self.room = DocumentRoom(count_documents(self.ids_BT[None], self.documents.eos_id))
                self.documents = replace(self.documents, room=self.room.size)
        tokens = accumulation * self.ids_BT.numel() * self.data_group.size()
        self.scale = torch.full((), 1.0 / tokens, device="cuda")
        for _ in range(WARMUP_PASSES):
            self._forward_backward()
        torch.cuda.synchronize()

    def make_room(self, ids_ABT: Tensor) -> None:
        """Have room for the documents of a step's micro-batches, whose ids are still on the host; a new size needs a new graph."""
        if self.documents is None or self.room is None:
            return
        if not self.room.changes_for(count_documents(ids_ABT, self.documents.eos_id)):
            return
        logger.info("room for %d documents in a micro-batch, before for %d", self.room.size, self.documents.room)
        self.documents = replace(self.documents, room=self.room.size)
        # Its memory is needed for the next one.
        self.graph = None
        if self.use_graph:
            # cuDNN's plans for this size must exist before capture. The gradients are zeroed next; the scales are not to notice.
            with scaling_state_kept(self.model, self.precision):
                self._forward_backward()

    def train_step(
        self,
        ids_ABT: Tensor,
        labels_ABT: Tensor,
        lr: float,
        grad_clip: float,
        in_bf16: bool = False,
        begins_fp8: bool = False,
    ) -> StepResult:
        """Do one optimizer step; see `Backend.train_step`. The tensors may be on the GPU already, which then waits for the host."""
        self.make_room(ids_ABT)
        ids_ABT, labels_ABT = (x.to(self.ids_BT.device, non_blocking=True) for x in (ids_ABT, labels_ABT))
        if begins_fp8:
            self.calibrate(ids_ABT, labels_ABT)
        self._use_fp8(self.is_fp8 and not in_bf16)
        if self.use_graph and self.graph is None:
            self._capture_micro_batch()
        ids_ABT, labels_ABT = self.slices.take(ids_ABT), self.slices.take(labels_ABT)
        self.flat.zero_grads()
        self.loss_sum.zero_()
        tokens = ids_ABT.numel() * self.data_group.size()
        self.scale.fill_(1.0 / tokens)
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            self.ids_BT.copy_(ids_BT)
            self.labels_BT.copy_(labels_BT)
            self._micro_batch()
        self.loss.copy_(self.loss_sum / tokens)
        self.optimizer.set_rates(lr, grad_clip)
        norm, applied = self._update()
        # The meter keeps these over several steps; a graph writes into the same memory each time.
        return StepResult(loss=self.loss.clone(), grad_norm=norm.clone(), applied=applied.clone())

    def calibrate(self, ids_ABT: Tensor, labels_ABT: Tensor) -> None:
        """Take FP8's delayed scales from a batch, without an update: those from before are of other weights and would overflow."""
        self._use_fp8(self.is_fp8)
        ids_ABT, labels_ABT = self.slices.take(ids_ABT), self.slices.take(labels_ABT)
        self.ids_BT.copy_(ids_ABT[0])
        self.labels_BT.copy_(labels_ABT[0])
        self.scale.fill_(1.0 / (ids_ABT.numel() * self.data_group.size()))
        for _ in range(WARMUP_PASSES):
            self._forward_backward()

    def seconds_per_micro_batch(self, in_bf16: bool) -> float:
        """Median time of forward and backward of the prepared micro-batch, as a graph where training uses one; infinite if memory runs out.

        Gradients and the sum of losses are zeroed by the next step. A graph made here is dropped, as others are not made before the
        first step.
        """
        use_graph = self.use_graph
        with scaling_state_kept(self.model, self.precision):
            try:
                return self._median_seconds(self.is_fp8 and not in_bf16)
            except torch.OutOfMemoryError:
                return math.inf
            finally:
                self._use_fp8(self.is_fp8)
                self.use_graph = use_graph
                # What was held here is no part of the training's peak.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    def _median_seconds(self, in_fp8: bool) -> float:
        self._use_fp8(in_fp8)
        graph = self._captured(self._forward_backward) if self.use_graph else None
        run = self._forward_backward if graph is None else graph.replay
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_PASSES + 1)]
        for _ in range(WARMUP_PASSES):
            run()
        for mark in marks[:-1]:
            mark.record()
            run()
        marks[-1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))

    def sharded_state(self) -> dict[str, Any]:
        """Weights, optimizer, guard and FP8 scales, as views that a checkpoint's tensors can be copied into."""
        state = self.optimizer.sharded_state(self.model.sharded_state_dict()) | self.guard.sharded_state()
        return state | (sharded_fp8_state(self.model) if self.is_fp8 else {})

    def after_load(self, lacks_fp8_scales: bool = False) -> None:
        """Bring what is derived from the loaded state in line with it."""
        self.optimizer.after_load()
        if lacks_fp8_scales:
            self.prepare(*self.prepared_for)

    def close(self) -> None:
        """Give the graphs back: NCCL waits, when ranks part, for those that it is part of."""
        torch.cuda.synchronize()
        for graph in (self.graph, self.update_graph):
            if graph is not None:
                graph.reset()
        self.graph, self.update_graph = None, None

    def _forward_backward(self) -> None:
        loss_BT = self.model(self.ids_BT, self.labels_BT, self.documents)
        (loss_BT.sum() * self.scale).backward()
        self.loss_sum += loss_BT.detach().sum(dtype=torch.float64)

    def _use_fp8(self, wanted: bool) -> None:
        """Have layers compute in FP8 or not from here on. Their scales stay as they are meanwhile."""
        if wanted == bool(self.model.config.fp8) or not self.is_fp8:
            return
        self.model.config.fp8 = self.fp8_format if wanted else None
        self.graph = None
        if not wanted:
            # What BF16 products need must exist before capture; for FP8 `prepare` has seen to it. The gradients are zeroed next.
            self._forward_backward()

    def _micro_batch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._forward_backward()

    def _update(self) -> tuple[Tensor, Tensor]:
        """All that comes after the last micro-batch; returns (norm before clipping, whether the update was applied)."""
        if self.use_graph and self.update_graph is None:
            self.update_graph = self._captured(self._reduce_and_update)
        if self.update_graph is not None:
            self.update_graph.replay()
        else:
            self._reduce_and_update()
        return self.update_results

    def _reduce_and_update(self) -> None:
        self.flat.reduce_grads()
        if self.data_group.size() > 1:
            dist.all_reduce(self.loss, group=self.data_group)
        self.update_results = self.optimizer.update(partial(self.guard.admits, self.loss))

    def _capture_micro_batch(self) -> None:
        """Record forward and backward of a micro-batch.

        It is done at the first step and not before: until then `training.loop` has emptied the allocator's cache, from which a graph
        could take nothing while it is captured, and which must not be emptied of memory that a graph refers to.
        """
        # What is made at its first use, such as ranks' links, cannot be recorded. An update whose loss is no number changes nothing, and
        # the gradients, left over from warming up, are zeroed next.
        self.loss.fill_(float("nan"))
        self._reduce_and_update()
        self.graph = self._captured(self._forward_backward)

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of `work`; if that fails, None, and all that has no graph yet is done eagerly, with the reason in the log."""
        graph = torch.cuda.CUDAGraph()
        # The graphs share memory: they never run at once, and what one leaves in it is copied before the next one runs.
        pool = next((other.pool() for other in (self.graph, self.update_graph) if other is not None), None)
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        try:
            # Autograd's accumulation nodes remember the stream they were made on, so everything since the model's
            # construction runs on one side stream (runtime.init_process_groups), which is also the one captured here.
            # Threads of NCCL, which look at events of theirs, do not disturb.
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            logger.warning("no CUDA graph, training eagerly: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            self.use_graph = False
            return None
        return graph


def _require_packed_attention(seq_len: int) -> None:
    """Refuse to have documents padded to whole windows, as unfused attention would, whose memory no GPU has."""
    capability = torch.cuda.get_device_capability()
    # cuDNN takes packed documents from Hopper on (Transformer Engine 2.20).
    if capability < (9, 0) and find_spec("flash_attn") is None:
        raise UserError(
            "data.document_mask",
            f"is true, but this GPU (compute capability {capability[0]}.{capability[1]}) has no fused attention for documents in windows "
            f"of {seq_len} tokens",
            "a Hopper GPU or newer, or the package flash-attn",
            "Set data.document_mask=false, or train windows of up to 128 tokens.",
        )
