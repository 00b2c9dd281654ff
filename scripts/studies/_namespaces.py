"""Hosts of a supervised run, each in its own network namespace, so that its network can be cut. Needs root and `ip`."""

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path

from dsv3_jax.cluster.processes import free_port
from dsv3_jax.elastic.hosts import Host, HostProcess, LocalEngine

_BRIDGE, _NET = "dsv3-br", "10.77.0"
_ANSWER_S = 1.0


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


class _NamespaceHost(HostProcess):
    def __init__(self, name: str, environ: dict[str, str], ip: str):
        self.ip = ip
        super().__init__(name, environ, ["ip", "netns", "exec", f"dsv3-{name}"])

    def address(self) -> str:
        return f"{self.ip}:{free_port()}"

    def answers(self) -> bool:
        """Whether the host can be reached over the network: one that refuses a connection can."""
        try:
            socket.create_connection((self.ip, 9), _ANSWER_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True


class NamespaceEngine(LocalEngine):
    """A `LocalEngine` whose `cut` takes a host's network away for `back_after_s`."""

    def __post_init__(self) -> None:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_NET}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        super().__post_init__()

    def _host(self, name: str) -> HostProcess:
        number, namespace = name.removeprefix("host-"), f"dsv3-{name}"
        ip = f"{_NET}.{10 + int(number)}"
        if not Path("/run/netns", namespace).exists():
            _ip("netns", "add", namespace)
            _ip("link", "add", f"dsv3-v{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", f"dsv3-v{number}", "master", _BRIDGE, "up")
            for command in (
                ("addr", "add", f"{ip}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", namespace, *command)
            # Gloo listens at the address of the machine's name; `ip netns exec` mounts this over /etc/hosts
            Path("/etc/netns", namespace).mkdir(parents=True, exist_ok=True)
            Path("/etc/netns", namespace, "hosts").write_text(f"127.0.0.1 localhost\n{ip} {socket.gethostname()}\n")
        return _NamespaceHost(name, self._environ, ip)

    def cut(self, name: str) -> None:
        link = f"dsv3-v{name.removeprefix('host-')}"
        _ip("link", "set", link, "down")
        threading.Timer(self.back_after_s, lambda: _ip("link", "set", link, "up")).start()

    def hosts(self) -> list[Host]:
        return [h for h in super().hosts() if isinstance(h, _NamespaceHost) and h.answers()]

    def close(self) -> None:
        super().close()
        for name in self.slots:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", f"dsv3-{name}")
            Path("/etc/netns", f"dsv3-{name}", "hosts").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.rmdir(f"/etc/netns/dsv3-{name}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", _BRIDGE)
