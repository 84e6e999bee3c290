"""Whether an update is applied, decided on the device: no host synchronization, and the same on every rank."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from yxanul_nemo.config.training import GuardsConfig


class UpdateGuard:
    """Refuses updates whose loss or gradient norm is not finite and, if asked to, those of spikes.

    A spike is a loss or norm over the mean of the last `spike_window_steps` finite ones by more than `spike_sigma` standard
    deviations. Spikes go into that history too: after a lasting rise the guard gets used to it instead of skipping for ever.
    (OLMo-core's SkipStepOptimizer has the same rule.)

    The history is a ring of tensors that are changed in place, so that it can stand in a checkpoint and in a CUDA graph.
    """

    def __init__(self, config: GuardsConfig, device: torch.device):
        self.sigma, self.window = config.spike_sigma, config.spike_window_steps
        self.least = max(2, self.window // 2)
        self.history_2W = torch.zeros(2, self.window, dtype=torch.float64, device=device)
        """Loss and gradient norm of finite steps."""
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        """Finite steps seen in the phase."""
        self._slots_W = torch.arange(self.window, device=device)

    @torch.no_grad()
    def admits(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to apply the update of this step, bool scalar on the device; remembers the step.

        Args:
            loss: mean over all tokens and ranks, scalar.
            grad_norm: before clipping, over all ranks, scalar.
        """
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if self.sigma is None:
            return finite
        now_2 = torch.stack((loss.double(), grad_norm.double()))
        seen_W = self._slots_W < self.count
        steps = self.count.clamp(max=self.window).double()
        mean_2 = self.history_2W.sum(1) / steps.clamp(min=1)
        squares_2 = ((self.history_2W - mean_2[:, None]).square() * seen_W).sum(1)
        std_2 = (squares_2 / (steps - 1).clamp(min=1)).sqrt()
        spike = (self.count >= self.least) & (now_2 > mean_2 + self.sigma * std_2).any()
        here_W = finite & (self._slots_W == self.count % self.window)
        # Of a step that is not finite nothing may get in, not even multiplied by 0.
        self.history_2W.copy_(torch.where(here_W, now_2[:, None], self.history_2W))
        self.count += finite
        return finite & ~spike[0]

    def reset(self) -> None:
        """Forget everything: another phase has another length and blend, and so another loss."""
        self.history_2W.zero_()
        self.count.zero_()

    def sharded_state(self) -> dict[str, Any]:
        """The history as Megatron-core's sharded tensors, equal on all ranks; nothing where no history is kept."""
        if self.sigma is None:
            return {}
        replica = min(1, dist.get_rank())
        parts = {"guard.history": self.history_2W, "guard.count": self.count}
        return {
            name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica) for name, tensor in parts.items()
        }
