"""Hosts of a supervised run on a Ray cluster of this machine, one per node, so that nodes can be lost."""

import os
import signal
import time

import ray
from ray.cluster_utils import Cluster

from dsv3_jax.elastic.hosts import Host
from dsv3_jax.elastic.ray_engine import RayEngine, RayHost


class RayClusterEngine(RayEngine):
    """A `RayEngine` whose `lose` kills a host's node, which is replaced after `back_after_s`."""

    def __init__(self, count: int, devices: int, back_after_s: float):
        self._back_after_s, self._replace_at = back_after_s, []
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = {node.node_id: node for node in (self._cluster.add_node(num_cpus=1) for _ in range(count))}
        os.environ["RAY_ADDRESS"] = str(self._cluster.address)
        super().__init__(count, devices)

    def lose(self, host: RayHost) -> None:
        node = ray.get(host.actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)
        self._replace_at.append(time.monotonic() + self._back_after_s)

    def hosts(self) -> list[Host]:
        if (
            self._replace_at and time.monotonic() >= self._replace_at[0]
        ):  # here, because Ray starts nodes only in the main thread
            self._replace_at.pop(0)
            handler = signal.getsignal(signal.SIGTERM)  # Ray replaces it
            node = self._cluster.add_node(num_cpus=1)
            self._nodes[node.node_id] = node
            signal.signal(signal.SIGTERM, handler)
        return super().hosts()

    def close(self) -> None:
        super().close()
        self._cluster.shutdown()
