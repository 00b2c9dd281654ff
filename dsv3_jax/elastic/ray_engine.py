"""Hosts on a Ray cluster: each is an actor, which Ray schedules on a node with room for it.

Ray knows the nodes, notices when one dies and starts the actors; the supervisor decides what runs. Ray Train's `JaxTrainer` is
not used: it starts a whole group of new interpreters for every attempt, and waits out its start timeout for the dead among
them (see docs/elastic.md).
"""

import contextlib
import logging
import os
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from dsv3_jax.cluster.processes import free_port
from dsv3_jax.elastic.hosts import Host, HostProcess, Start, host_environment
from dsv3_jax.errors import UserError

_ANSWER_S = 2.0  # a healthy host answers within this
_ACCELERATORS = ("GPU", "TPU")
_PASSED_ON = ("JAX_", "XLA_", "DSV3_", "XDG_", "LIBTPU_", "NCCL_")  # prefixes of environment variables that hosts get


@ray.remote(max_concurrency=4)  # type: ignore[call-overload]
class _Actor:
    """On a node: one host process, started in the supervisor's directory and with its paths."""

    def __init__(self, name: str, directory: str, environ: dict[str, str], devices: int):
        os.chdir(directory)
        os.environ.update(environ)
        on_accelerator = any(ray.get_runtime_context().get_accelerator_ids().values())
        self._host = HostProcess(name, host_environment(None if on_accelerator else devices))

    def wait(self, known: tuple) -> tuple:
        """(ready, lost, pid, reason, code), as soon as they differ from `known`."""
        host = self._host
        while (now := (host.ready, host.lost, host.pid, host.reason, host.code)) == known:
            time.sleep(0.02)
        return now

    def answer(self) -> bool:
        return True

    def address(self) -> str:
        return f"{ray.util.get_node_ip_address()}:{free_port()}"

    def start(self, start: Start) -> None:
        self._host.start(start)

    def signal(self, number: int) -> None:
        self._host.signal(number)


class RayHost:
    """A `Host` that is an actor. A thread keeps its attributes up to date."""

    def __init__(self, name: str, options: dict[str, Any], devices: int):
        self.name, self.ready, self.lost = name, False, False
        self.pid: int | None = None
        self.code: int | None = None
        self.reason = ""
        environ = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) or k in ("PYTHONPATH", "PATH")}
        self.actor = _Actor.options(**options).remote(name, os.getcwd(), environ, devices)  # type: ignore[attr-defined]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        known = (False, False, None, "", None)
        while not self.lost:
            try:
                known = ray.get(self.actor.wait.remote(known))
            except Exception:  # the actor's node, its process, or the whole cluster: whatever is gone, the host is
                break
            self.ready, self.lost, self.pid, self.reason, self.code = known
        self.ready, self.lost, self.pid = False, True, None

    def address(self) -> str:
        try:
            return ray.get(self.actor.address.remote(), timeout=_ANSWER_S)
        except RayError as error:
            raise OSError(str(error)) from error

    def start(self, start: Start) -> None:
        self.code = None
        self.actor.start.remote(start)

    def signal(self, number: int) -> None:
        self.actor.signal.remote(number)


class RayEngine:
    """At most `count` hosts on the cluster of RAY_ADDRESS, or else on one of this machine alone.

    A worker takes all accelerators of a node, or one CPU where there are none; it then has `devices` virtual devices.
    """

    def __init__(self, count: int, devices: int):
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                address="auto" if os.environ.get("RAY_ADDRESS") else None, log_to_driver=False, logging_level=logging.ERROR
            )
        except Exception as error:
            raise UserError(f"--engine ray: cannot connect to a cluster: {' '.join(str(error).split())[:300]}") from error
        self._devices, self._options = devices, _resources() | {"scheduling_strategy": "SPREAD"}
        self._made = 0
        self._hosts = [self._host() for _ in range(count)]

    def _host(self) -> RayHost:
        self._made += 1
        return RayHost(f"host-{self._made}", self._options, self._devices)

    def hosts(self) -> list[Host]:
        for i, host in enumerate(self._hosts):
            if host.lost:
                with contextlib.suppress(Exception):  # it may be cut off rather than gone, and must free its devices
                    ray.kill(host.actor)
                self._hosts[i] = self._host()
        ready = [host for host in self._hosts if host.ready]
        asked = {host.actor.answer.remote(): host for host in ready}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
        return [asked[a] for a in answered if _is_true(a)]

    def close(self) -> None:
        for host in self._hosts:
            with contextlib.suppress(Exception):
                ray.kill(host.actor)
        ray.shutdown()


def _is_true(answer: Any) -> bool:
    try:
        return ray.get(answer)
    except Exception:  # it died before it answered
        return False


def _resources() -> dict[str, Any]:
    """Options of an actor that takes all accelerators of a node, as many as the first node with some has."""
    for node in ray.nodes():
        for kind in _ACCELERATORS:
            if node["Alive"] and (number := int(node["Resources"].get(kind, 0))):
                return {"num_cpus": 1, "num_gpus": number} if kind == "GPU" else {"num_cpus": 1, "resources": {kind: number}}
    return {"num_cpus": 1}
