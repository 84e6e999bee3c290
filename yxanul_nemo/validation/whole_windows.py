"""The loss of whole windows under a model whose windows are shared by context-parallel ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from yxanul_nemo.config.training import SHORTEST_CONTEXT_CHUNK
from yxanul_nemo.model.context import WindowSlices
from yxanul_nemo.validation.scoring import IGNORE_INDEX


def whole_window_loss(model: torch.nn.Module, group: dist.ProcessGroup, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Loss of each token [B, T], on every rank of `group`, which shares the model's windows; T may be any length.

    Windows are padded to chunks that attention takes; padding comes last, so nothing scored sees it.
    """
    if group.size() == 1:
        return model(ids_BT, labels_BT)
    slices, length = WindowSlices(group), ids_BT.size(1)
    padding = -length % (2 * group.size() * SHORTEST_CONTEXT_CHUNK)
    ids_BT, labels_BT = F.pad(ids_BT, (0, padding)), F.pad(labels_BT, (0, padding), value=IGNORE_INDEX)
    return slices.join(model(slices.take(ids_BT), slices.take(labels_BT)))[:, :length]
