"""What a save does beside training once Orbax has written the arrays: the manifest, and the copy on this host."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import jax
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.checkpoint.local import LocalCopies, Snapshot, index_of
from dsv3_jax.checkpoint.manifest import write_manifest_together
from dsv3_jax.checkpoint.retention import TEMPORARY
from dsv3_jax.checkpoint.storage import reason
from dsv3_jax.streams import say


@dataclass
class PendingSave:
    """A save that has begun. Its thread ends with the checkpoint complete, or with `error`."""

    step: int
    thread: Thread
    error: Exception | None = None


def check_writable(directory: Path, step: int) -> None:
    """Raise `OSError` if no directory can be made beside those of the checkpoints.

    Orbax finds that out in the background, where its threads then wait for the directory for ten minutes.
    """
    probe = directory / f"{step}{TEMPORARY}-probe"
    probe.mkdir()
    probe.rmdir()


def finish_beside_training(
    directory: Path, response: ocp.AsyncResponse, blocks: Snapshot | None, then: Callable[[bytes], None]
) -> PendingSave:
    """Wait in a thread until Orbax has written `directory` (a step's), then write its manifest and call `then`.

    `blocks` are this process's, if it keeps a copy on its host: the manifest gets the digest of their index, and `then` the
    index.
    """

    def finish() -> None:
        try:
            index = index_of(blocks) if blocks is not None else b""
            response.result()
            local = hashlib.sha256(index).hexdigest() if index else None
            write_manifest_together(directory, jax.process_index(), jax.process_count(), local)
            then(index)
        except Exception as error:  # whatever it is: CheckpointManager.wait raises it
            save.error = error

    save = PendingSave(int(directory.name), Thread(target=finish, daemon=True))
    save.thread.start()
    return save


def copy_to_host(copies: LocalCopies, directory: Path, blocks: Snapshot, index: bytes, local_dir: str | None) -> None:
    """Keep this process's blocks of a complete checkpoint on its host. A run goes on without them where there is no room."""
    step = int(directory.name)
    try:
        copies.write(step, jax.process_index(), blocks, index)
    except OSError as error:
        say(f"no copy of step {step} in checkpoint.local_dir={local_dir}: {reason(error)}", sys.stderr)
