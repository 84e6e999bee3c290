"""The shape of grouped-query attention that the attention kernels are compiled for."""

from typing import NamedTuple


class Heads(NamedTuple):
    """Shape of grouped-query attention in this process."""

    groups: int
    """Key/value heads."""
    heads_per_group: int
    """Query heads that share one of them."""
    head_dim: int
    """Width of a head."""

    @property
    def qkv_width(self) -> int:
        """Width of the mixed projection."""
        return self.groups * (self.heads_per_group + 2) * self.head_dim

    @property
    def out_width(self) -> int:
        """Width of the attention's output."""
        return self.groups * self.heads_per_group * self.head_dim
