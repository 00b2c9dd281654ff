"""The checkpoints of one run: saved beside training, kept or removed, and restored.

A checkpoint is `checkpoints/STEP/` with three sets of arrays (names.py) and JSON metadata (config, data position), written by
Orbax (storage.py). After Orbax has committed it, a manifest with every file's size and sha256 is written (manifest.py); only
directories with a manifest count, and a manifest is verified before loading, because damaged array files can load silently.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.local import LocalCopies, Snapshot, snapshot
from dsv3_jax.checkpoint.names import joined, state_to_arrays
from dsv3_jax.checkpoint.restore import restore
from dsv3_jax.checkpoint.retention import complete_steps, correct_names, remove_failed, remove_incomplete, remove_old
from dsv3_jax.checkpoint.save import PendingSave, check_writable, copy_to_host, finish_beside_training
from dsv3_jax.checkpoint.storage import begin_save, check_path, read_metadata, reason
from dsv3_jax.cluster.processes import is_first, on_first
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import FailedElsewhere, UserError
from dsv3_jax.files import expand_home
from dsv3_jax.state.train_state import TrainState
from dsv3_jax.streams import say


class CheckpointManager:
    """Saves and restores the training state of one run.

    At its start it removes what interrupted saves left, and sets aside what is named by another step than its own.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        """`directory` is made if it does not exist."""
        self._directory = directory.absolute()  # Orbax takes no other
        check_path(self._directory)
        self._config = config
        self._save: PendingSave | None = None
        local = config.local_dir and expand_home(os.path.expandvars(config.local_dir))
        self._local = LocalCopies(local, self._directory) if local else None
        self._snapshot: Snapshot = {}  # of the pending save, for the copy on this host
        self.read_locally = 0.0  # of what was restored, the share that came from copies on this process's host
        on_first(lambda: directory.mkdir(parents=True, exist_ok=True))
        on_first(lambda: remove_incomplete(self._directory, say))
        on_first(lambda: correct_names(self._directory, say))
        self.newest = 0  # step of the last save that has begun, or of what was restored
        steps = complete_steps(self._directory) if config.keep_best else []
        self._loss = {step: _held_out_loss(self._directory / str(step)) for step in steps}

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        steps = complete_steps(self._directory)
        return steps[-1] if steps else None

    @property
    def failed(self) -> bool:
        """Whether the pending save has failed: `wait` says how."""
        return self._save is not None and self._save.error is not None

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Begin the checkpoint of `state.step`, every process its shards; returns once the state is copied and may change.

        Only one save is pending at a time. Raises `UserError` if this one can't begin or the one before has failed.
        """
        self.wait()
        step = int(state.step)
        self.newest, self._loss[step] = step, metadata.get("held_out_loss")
        if step in complete_steps(self._directory):
            return
        directory, arrays = self._directory / str(step), state_to_arrays(state)
        try:
            on_first(lambda: check_writable(self._directory, step))
            response = begin_save(directory, arrays, metadata | {"step": step})
        except FailedElsewhere:
            raise
        except Exception as error:  # TensorStore raises what it likes; none of it may lose the previous checkpoint
            raise self._failure(step, error) from error
        if self._local is not None:
            self._snapshot = snapshot(joined(arrays), self._snapshot)
        blocks = self._snapshot if self._local is not None else None
        self._save = finish_beside_training(directory, response, blocks, then=lambda index: self._complete(directory, index))

    def _complete(self, directory: Path, index: bytes) -> None:
        """What follows a complete checkpoint, in the save's thread."""
        if self._local is not None:
            copy_to_host(self._local, directory, self._snapshot, index, self._config.local_dir)
        if is_first():
            remove_old(self._directory, self._config, self._loss)

    def wait(self) -> None:
        """Return once the pending save is complete on all processes. Raises `UserError` if it fails."""
        save, self._save = self._save, None
        if save is None:
            return
        save.thread.join()

        def check() -> None:
            if save.error is not None:
                raise self._failure(save.step, save.error) from save.error

        if not is_first():
            check()
        on_first(check)  # the others hear of it; where nothing failed, all wait for the manifest

    def _failure(self, step: int, error: Exception) -> UserError:
        remove_failed(self._directory, step)
        latest = self.latest()
        kept = f"the checkpoint of step {latest} is intact" if latest is not None else "there is no earlier one"
        return UserError(f"cannot save the checkpoint of step {step}: {reason(error)}; {kept}")

    def close(self) -> None:
        """Let the pending save come to its end, also where training has failed."""
        if self._save is not None:
            self._save.thread.join()

    def free_host(self) -> None:
        """Remove the copies on this host, once the run is finished."""
        if self._local is not None:
            self._local.remove()

    def restore(self, template: TrainState, report: Callable[[str], None] = print) -> tuple[TrainState, dict[str, Any]]:
        """The latest undamaged checkpoint in the shapes and shardings of `template`, and its metadata.

        See `restore.restore` for what may differ from the run that wrote it, and what it raises. What `checkpoint.local_dir`
        has of it is read from there.
        """
        restored = restore(self._directory, template, self._local, report)
        self.newest, self.read_locally = restored.step, restored.local_share
        return restored.state, restored.metadata


def _held_out_loss(directory: Path) -> float | None:
    try:
        return read_metadata(directory).get("held_out_loss")
    except Exception:  # a damaged one is found out before it is loaded
        return None
