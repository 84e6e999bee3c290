"""Training on GPUs: Megatron-core's gradient buffers, Transformer Engine layers, and forward and backward in a CUDA graph."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.model.documents import TYPICAL_DOCUMENT_TOKENS, Documents, count_documents
from yxanul_nemo.model.fp8_state import scaling_state_kept, sharded_fp8_state
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import StepResult
from yxanul_nemo.training.document_room import DocumentRoom
from yxanul_nemo.training.guard import UpdateGuard
from yxanul_nemo.training.optimizer import MainParamAdamW

WARMUP_PASSES = 3
"""Passes before capture: lazily made state (FP8 scales, cuBLAS workspaces, compiled kernels) must exist by then."""


class CudaBackend:
    """One rank's model and optimizer; see `training.backend.Backend` for the contract."""

    def __init__(self, model: YxanulGPT, config: RunConfig, documents: Documents | None = None):
        self.model, self.documents, self.precision = model, documents, config.precision
        self.guard = UpdateGuard(config.guards, torch.device("cuda", torch.cuda.current_device()))
        self.is_fp8 = config.precision.is_fp8
        self.fp8_format = model.config.fp8
        self.use_graph = config.parallel.cuda_graph
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # Gradients are reduced once per step, after the last micro-batch, so that a graph holds no communication.
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.ddp = DistributedDataParallel(model.config, ddp_config, model)
        self.optimizer = MainParamAdamW(model, config.optim, parallel_state.get_tensor_model_parallel_group())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.update_graph: torch.cuda.CUDAGraph | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device="cuda")
        self.loss = torch.zeros((), dtype=torch.float64, device="cuda")
        """Of the step, over all ranks, where a graph can find it."""

    def prepare(self, micro_batch_size: int, accumulation: int, seq_len: int) -> None:
        """Warm up on random tokens, so that lazily made state exists when a checkpoint is loaded.

        FP8's delayed scales start from these passes, whose gradients have the size of real ones. Raises UserError if this GPU cannot keep
        attention inside documents at this length.
        """
        self.model.train()
        shape = (micro_batch_size, seq_len)
        self.ids_BT = torch.randint(0, self.model.real_vocab_size, shape, device="cuda")
        self.labels_BT = torch.randint(0, self.model.real_vocab_size, shape, device="cuda")
        self.room: DocumentRoom | None = None
        if self.documents is not None:
            self.ids_BT.view(-1)[100::TYPICAL_DOCUMENT_TOKENS] = self.documents.eos_id
            if self.model.lists_documents(seq_len):
                _require_packed_attention(seq_len)
                self.room = DocumentRoom(count_documents(self.ids_BT[None], self.documents.eos_id))
                self.documents = replace(self.documents, room=self.room.size)
        self.scale = torch.full((), 1.0 / (micro_batch_size * accumulation * seq_len), device="cuda")
        for _ in range(WARMUP_PASSES):
            self._forward_backward()
        torch.cuda.synchronize()

    def make_room(self, ids_ABT: Tensor) -> None:
        """Have room for the documents of a step's micro-batches, whose ids are still on the host; a new size needs a new graph."""
        if self.room is None or not self.room.changes_for(count_documents(ids_ABT, self.documents.eos_id)):
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
        self, ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float, in_bf16: bool = False
    ) -> StepResult:
        """One optimizer step over the accumulated micro-batches of this rank [accumulation, micro_batch_size, seq_len]."""
        self._use_fp8(self.is_fp8 and not in_bf16)
        if self.use_graph and self.graph is None:
            self._capture()
        self.ddp.zero_grad_buffer()
        self.loss_sum.zero_()
        # Megatron's wrapper averages gradients over data-parallel ranks.
        self.scale.fill_(1.0 / ids_ABT.numel())
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            self.ids_BT.copy_(ids_BT)
            self.labels_BT.copy_(labels_BT)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._forward_backward()
        self.ddp.start_grad_sync()
        self.ddp.finish_grad_sync()
        loss = self.loss_sum / (ids_ABT.numel() * self.data_group.size())
        if self.data_group.size() > 1:
            dist.all_reduce(loss, group=self.data_group)
        norm, applied = self._update(loss, lr, grad_clip)
        return StepResult(loss=loss, grad_norm=norm, applied=applied)

    def calibrate(self, ids_ABT: Tensor, labels_ABT: Tensor) -> None:
        """Take FP8's delayed scales from a batch, without an update: those from before are of other weights and would overflow."""
        self._use_fp8(self.is_fp8)
        self.ids_BT.copy_(ids_ABT[0])
        self.labels_BT.copy_(labels_ABT[0])
        self.scale.fill_(1.0 / ids_ABT.numel())
        for _ in range(WARMUP_PASSES):
            self._forward_backward()

    def sharded_state(self) -> dict[str, Any]:
        """Weights, optimizer, guard and FP8 scales, as views that a checkpoint's tensors can be copied into."""
        state = self.optimizer.sharded_state(self.model.sharded_state_dict()) | self.guard.sharded_state()
        return state | (sharded_fp8_state(self.model) if self.is_fp8 else {})

    def after_load(self) -> None:
        """Bring what is derived from the loaded state in line with it."""
        self.optimizer.after_load()

    def _forward_backward(self) -> None:
        with self.ddp.no_sync():
            loss_BT = self.ddp(self.ids_BT, self.labels_BT, self.documents)
            (loss_BT.sum() * self.scale).backward()
        self.loss_sum += loss_BT.detach().sum(dtype=torch.float64)

    def _use_fp8(self, wanted: bool) -> None:
        """Have layers compute in FP8 or not from here on. Their scales stay as they are meanwhile."""
        if wanted == bool(self.model.config.fp8) or not self.is_fp8:
            return
        self.model.config.fp8 = self.fp8_format if wanted else None
        logger.info("layers compute in %s from here on", "FP8" if wanted else "BF16")
        self.graph = None
        if not wanted:
            # What BF16 products need must exist before capture; for FP8 `prepare` has seen to it. The gradients are zeroed next.
            self._forward_backward()

    def _update(self, loss: Tensor, lr: float, grad_clip: float) -> tuple[Tensor, Tensor]:
        """One update of the optimizer; returns (norm before clipping, whether it was applied)."""
        self.optimizer.set_rates(lr, grad_clip)
        self.loss.copy_(loss)
        grads = [param.main_grad for param in self.optimizer.params]
        admits = partial(self.guard.admits, self.loss)
        if self.graph is None or self.optimizer.tensor_group.size() > 1:
            return self.optimizer.update(grads, admits)
        if self.update_graph is None:
            self.update_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.update_graph, stream=torch.cuda.current_stream()):
                self.update_results = self.optimizer.update(grads, admits)
        self.update_graph.replay()
        norm, applied = self.update_results
        # The meter keeps these over several steps; the graph writes into the same memory each time.
        return norm.clone(), applied.clone()

    def _capture(self) -> None:
        """Record forward and backward of a micro-batch; if that fails, train eagerly, with the reason in the log.

        It is done at the first step and not before: whoever empties the allocator's cache in between (Lightning does at the
        start of fit) must not meet memory that a graph refers to.
        """
        graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        try:
            # Autograd's accumulation nodes remember the stream they were made on, so everything since the model's
            # construction runs on one side stream (runtime.init_process_groups), which is also the one captured here.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._forward_backward()
        except RuntimeError as error:
            logger.warning("no CUDA graph, training eagerly: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            self.use_graph = False
            return
        self.graph = graph


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
