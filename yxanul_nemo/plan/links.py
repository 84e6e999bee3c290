"""How long collectives take over a node's links and the network between nodes: bytes over stated speeds, and a latency for each hop."""

import math
from dataclasses import dataclass

from yxanul_nemo.config.stages import PlanConfig


@dataclass(frozen=True)
class Links:
    """The links of a cluster, each way and for each GPU."""

    gpus_per_node: int
    node_bytes_per_second: float
    """Between GPUs of one node, as collectives reach it."""
    network_bytes_per_second: float
    """Between nodes, for each GPU, as collectives reach it."""
    node_seconds: float
    """Latency of a hop inside a node."""
    network_seconds: float
    """Latency of a hop between nodes."""

    @classmethod
    def of(cls, plan: PlanConfig) -> "Links":
        """Those that the configuration states."""
        return cls(
            gpus_per_node=plan.gpus_per_node,
            node_bytes_per_second=plan.node_gb_per_second * 1e9 * plan.link_efficiency,
            network_bytes_per_second=plan.network_gb_per_second * 1e9 * plan.network_efficiency,
            node_seconds=plan.node_latency_microseconds * 1e-6,
            network_seconds=plan.network_latency_microseconds * 1e-6,
        )

    def all_reduce_seconds(self, size_bytes: float, ranks: int, stride: int = 1) -> float:
        """Sum of `size_bytes` over ranks: a reduce-scatter and an all-gather."""
        return 2 * self.scatter_seconds(size_bytes, ranks, stride)

    def scatter_seconds(self, size_bytes: float, ranks: int, stride: int = 1) -> float:
        """Reduce-scatter or all-gather of `size_bytes` in all over ranks, as NCCL does it over nodes: in each node, and between nodes with
        the share that each GPU then has (each over its own network adapter), one after the other.

        Each part moves (n - 1) / n of its bytes over a rank's link (Patarasuk and Yuan, 2009), and takes log2(n) hops over a tree.

        Args:
            ranks: of the group.
            stride: GPUs from one rank of the group to the next; the ranks between are of other groups at the same work.
        """
        if ranks == 1:
            return 0.0
        here = min(ranks, max(1, self.gpus_per_node // stride))
        nodes = math.ceil(ranks / here)
        # What the other groups of a node send at the same time has network adapters of its own.
        seconds = (here - 1) / here * size_bytes / self.node_bytes_per_second
        seconds += math.log2(here) * self.node_seconds
        if nodes > 1:
            seconds += (nodes - 1) / nodes * size_bytes / here / self.network_bytes_per_second
            seconds += math.log2(nodes) * self.network_seconds
        return seconds
