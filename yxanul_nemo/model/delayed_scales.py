"""Delayed scaling of the fused layers: one scale per matrix that is rounded to FP8, made from its largest values in the passes before.

The recipe is Transformer Engine's (`DelayedScaling`, margin 0): scale = largest number of the format / largest value of the history. All
scales of a model lie in a few tensors, so that an update is a few launches, ranks agree in one reduction, and a checkpoint holds plain
tensors.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from yxanul_nemo.kernels.layer_ops import Slot

FORWARD = ("normed_1", "qkv", "attended", "proj", "normed_2", "fc1", "activated", "fc2")
"""Matrices of a layer that forward products take: what goes in and, by name of the projection, its weight."""
BACKWARD = ("d_qkv", "d_proj", "d_fc1", "d_fc2")
"""Gradients of what its projections give."""
SPACING = 4
"""FP32 numbers from one reciprocal scale to the next: cuBLAS takes none that does not begin at a multiple of 16 bytes."""
LARGEST_SCALE = 2.0**100
"""Of matrices of nothing but tiny numbers: finite, and so is its product with any of them."""


class DelayedScales:
    """The scales of all layers.

    Args:
        history_len: passes whose largest values count.
        uses_max: the largest of them makes the scale, else the last.
        gradient_dtype: float8_e5m2, or float8_e4m3fn as forward.
        group: ranks that see parts of the same batch, or None: they agree on largest values.
    """

    def __init__(
        self,
        num_layers: int,
        history_len: int,
        uses_max: bool,
        gradient_dtype: torch.dtype,
        device: torch.device | str,
        group: ProcessGroup | None = None,
    ):
        self.uses_max, self.group = uses_max, group
        names = (*FORWARD, *BACKWARD)
        dtypes = {name: torch.float8_e4m3fn if name in FORWARD else gradient_dtype for name in names}
        places = [(layer, name) for layer in range(num_layers) for name in names]
        self.format_max = torch.tensor([torch.finfo(dtypes[name]).max for _, name in places], device=device)
        count = len(places)
        self.scale = torch.ones(count, device=device)
        self.amax = torch.zeros(count, device=device)
        """Largest values since the last update."""
        self.history = torch.zeros(history_len, count, device=device)
        """Those of the passes before, the last one first."""
        self.scale_inv = torch.ones(count, SPACING, device=device)
        unseen = torch.zeros(count, device=device)

        def slots(amax: Tensor) -> list[dict[str, Slot]]:
            made: list[dict[str, Slot]] = [{} for _ in range(num_layers)]
            for i, (layer, name) in enumerate(places):
                one = slice(i, i + 1)
                made[layer][name] = Slot(dtypes[name], self.scale[one], self.scale_inv[i, :1], amax[one])
            return made

        self._noting, self._silent = slots(self.amax), slots(unseen)

    def begin_pass(self, is_training: bool) -> list[dict[str, Slot]]:
        """Slots by name for each layer, for a forward pass and its backward pass. One without gradients leaves the state as it is."""
        if is_training:
            self._update()
        self.scale_inv[:, 0] = self.scale.reciprocal()
        return self._noting if is_training else self._silent

    def tensors(self) -> dict[str, Tensor]:
        """The state, live, by name."""
        return {"scale": self.scale, "amax": self.amax, "amax_history": self.history}

    def _update(self) -> None:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(self.amax, op=dist.ReduceOp.MAX, group=self.group)
        # A pass that overflowed says nothing about the next one's scale.
        last = torch.where(self.amax.isfinite(), self.amax, 0.0)
        self.history.copy_(torch.cat((last[None], self.history[:-1])))
        top = self.history.amax(dim=0) if self.uses_max else last
        self.scale.copy_(torch.where(top > 0, (self.format_max / top).clamp(max=LARGEST_SCALE), self.scale))
        self.amax.zero_()
