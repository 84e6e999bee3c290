"""AdamW on main parameters, with clipping and the skip decided on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.training.flat_parameters import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


class _ScalingAdamW(torch.optim.AdamW):
    """torch's fused optimizers divide gradients by `grad_scale` and do nothing where `found_inf` is 1 (the contract that
    torch.amp.GradScaler uses with them), so clipping and skipping cost no pass over the gradients of their own."""

    grad_scale: Tensor
    found_inf: Tensor


class AdamW:
    """torch's fused AdamW (decoupled weight decay, arXiv:1711.05101) over some parts of a model.

    Args:
        lr_factor: on the learning rate.
    """

    def __init__(self, parts: Sequence[Part], optim: OptimConfig, device: torch.device, lr_factor: float = 1.0):
        self.parts, self.lr_factor = parts, lr_factor
        self.lr = torch.zeros((), device=device)
        mains = [part.main for part in parts]
        # Matrices are decayed, vectors (the norms) are not: Megatron-core's rule, by shape and not by name.
        groups = [
            {"params": [m for m in mains if m.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [m for m in mains if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = _ScalingAdamW(
            groups,
            lr=self.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        # torch creates the state at the first step; a checkpoint needs it to be there before.
        for main in mains:
            self.adamw.state[main] = {
                "step": torch.zeros((), device=device),
                **{moment: torch.zeros_like(main) for moment in MOMENTS},
            }

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next update, before the factor."""
        self.lr.fill_(lr * self.lr_factor)

    def update(self, grad_scale: Tensor, applied: Tensor) -> None:
        """One update by the gradients over `grad_scale`; nothing where not `applied`. Both are scalars on the device."""
        self.adamw.grad_scale, self.adamw.found_inf = grad_scale, (~applied).float()
        for part in self.parts:
            part.main.grad = part.grad
        self.adamw.step()
        for part in self.parts:
            part.main.grad = None

    def moments(self) -> list[tuple[Part, dict[str, Tensor]]]:
        """Each part with its moments by name, all of the part's shape."""
        return [(part, {name: self.adamw.state[part.main][name] for name in MOMENTS}) for part in self.parts]

    def set_count(self, updates: Tensor) -> None:
        """Take over how many updates were made [1]: torch counts them for each parameter; they are all equal."""
        for state in self.adamw.state.values():
            state["step"].copy_(updates[0])
