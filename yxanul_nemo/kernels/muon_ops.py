"""What Muon does before and after orthogonalization, one pass over memory each: in Triton on GPUs, in plain torch elsewhere.

Letters: N matrices, R rows, C columns. A parameter's rows may lie in another order in the matrices it is made of: `places_R` says where
(None: in the same). Rates and decisions are scalars on the device, so that a CUDA graph can hold all of it.
"""

import torch
from torch import Tensor


def mix_momentum(
    grads_NRC: Tensor,
    momentum_NRC: Tensor,
    out_NRC: Tensor,
    squares_NR: Tensor,
    places_R: Tensor | None,
    grad_scale: Tensor,
    applied: Tensor,
    momentum: float,
    nesterov: bool,
) -> None:
    """Take gradients over `grad_scale` into the running average, and write what is to be orthogonalized into `out_NRC`, with its rows'
    sums of squares.

    Args:
        momentum_NRC: FP32, changed in place; where not `applied` it stays, and what is written has no meaning.
    """
    if grads_NRC.is_cuda:
        from yxanul_nemo.kernels.muon_kernels import launch_mix

        launch_mix(grads_NRC, momentum_NRC, out_NRC, squares_NR, places_R, grad_scale, applied, momentum, nesterov)
        return
    if not applied:
        return
    scaled_NRC = grads_NRC / grad_scale
    momentum_NRC.lerp_(scaled_NRC, 1 - momentum)
    mixed_NRC = scaled_NRC.lerp(momentum_NRC, momentum) if nesterov else momentum_NRC
    at_R = slice(None) if places_R is None else places_R.long()
    out_NRC[:, at_R] = mixed_NRC.to(out_NRC.dtype)
    squares_NR[:, at_R] = mixed_NRC.square().sum(-1)


def apply_update(
    mains_NRC: Tensor,
    values_NRC: Tensor | None,
    updates_NRC: Tensor,
    factors_NR: Tensor,
    places_R: Tensor | None,
    lr: Tensor,
    applied: Tensor,
    weight_decay: float,
    cautious: bool,
) -> None:
    """Subtract lr x (update x its row's factor + decay) from the weights; nothing where not `applied`.

    Args:
        values_NRC: gets the weights in its dtype; None: nobody needs them.
        factors_NR: in the order of the updates' rows, as those are.
        cautious: decay a weight only where the update does not move it away from zero.
    """
    if mains_NRC.is_cuda:
        from yxanul_nemo.kernels.muon_kernels import launch_apply

        launch_apply(mains_NRC, values_NRC, updates_NRC, factors_NR, places_R, lr, applied, weight_decay, cautious)
        return
    if not applied:
        return
    at_R = slice(None) if places_R is None else places_R.long()
    scaled_NRC = updates_NRC[:, at_R].float() * factors_NR[:, at_R, None]
    decay_NRC = weight_decay * mains_NRC
    if cautious:
        decay_NRC = torch.where(mains_NRC * scaled_NRC >= 0, decay_NRC, 0.0)
    mains_NRC.sub_(lr * (scaled_NRC + decay_NRC))
    if values_NRC is not None:
        values_NRC.copy_(mains_NRC)
