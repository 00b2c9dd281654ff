"""What a save does beside training once Orbax has written the arrays: the manifest, and the copy on this host."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import jax
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.checkpoint.local import LocalCopies, Snapshot
from dsv3_jax.checkpoint.manifest import MANIFEST, write_manifest_together
from dsv3_jax.checkpoint.storage import reason


@dataclass
class PendingSave:
    """A save that has begun. Its thread ends with the checkpoint complete, or with `error`."""

    step: int
    thread: Thread
    error: Exception | None = None


def finish_beside_training(directory: Path, response: ocp.AsyncResponse, then: Callable[[], None]) -> PendingSave:
    """Wait in a thread until Orbax has written `directory` (a step's), then write its manifest and call `then`."""

    def finish() -> None:
        try:
            response.result()
            write_manifest_together(directory, jax.process_index(), jax.process_count())
            then()
        except Exception as error:  # whatever it is: CheckpointManager.wait raises it
            save.error = error

    save = PendingSave(int(directory.name), Thread(target=finish, daemon=True))
    save.thread.start()
    return save


def copy_to_host(copies: LocalCopies, directory: Path, blocks: Snapshot, local_dir: str | None) -> None:
    """Keep this process's blocks of a complete checkpoint on its host. A run goes on without them where there is no room."""
    step = int(directory.name)
    try:
        copies.write(step, jax.process_index(), blocks, directory / MANIFEST)
    except OSError as error:
        print(f"no copy of step {step} in checkpoint.local_dir={local_dir}: {reason(error)}", file=sys.stderr, flush=True)
