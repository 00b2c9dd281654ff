"""Run by test_import.py in each of two processes with four devices: import a checkpoint together, load it onto one mesh."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.piecewise import PiecewiseWriter
from dsv3_jax.cluster.processes import join
from dsv3_jax.interop.hf_files import TensorFiles
from dsv3_jax.interop.hf_import import import_hf


def main() -> None:
    directory, out = Path(sys.argv[1]), Path(sys.argv[2])
    join()
    written, read = [], []
    write, read_one = PiecewiseWriter.write, TensorFiles.read
    PiecewiseWriter.write = lambda self, array, chunk, source: (written.append(array), write(self, array, chunk, source))[1]
    import_hf(directory, out / "ckpt")

    TensorFiles.read = lambda self, name: (read.append(name), read_one(self, name))[1]
    model = dsv3.load_hf(directory, parallel=dsv3.ParallelConfig(expert=8))
    experts = sorted({int(m[1]) for name in read if (m := re.search(r"experts\.(\d+)\.", name))})
    reference = np.load(directory / "reference.npz")
    logits = multihost_utils.process_allgather(model(reference["input_ids_0"]), tiled=True)
    result = {
        "experts": experts, "imported": len(written), "tensors": len(set(TensorFiles(directory).names)),
        "difference": float(np.abs(np.asarray(logits) - reference["logits_0"]).max()),
    }  # fmt: skip
    (out / f"read-{jax.process_index()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
