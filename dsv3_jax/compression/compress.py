"""`dsv3 compress`: a trained model's linear layers in few bits, one layer at a time.

In memory are one layer, the moments of what its linear layers read, and the calibration set on its way through the model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.integers import INTEGERS, integer_arrays
from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.manifest import MANIFEST
from dsv3_jax.checkpoint.storage import check_path, read_metadata
from dsv3_jax.compression.blocks import BlockReader, Place, places
from dsv3_jax.compression.calibration import batches, calibration_windows
from dsv3_jax.compression.container import CompressedWriter, integer_arrays_of
from dsv3_jax.compression.layer import LayerCompressor, Stream, run_block
from dsv3_jax.compression.profile import Profile, load_profile
from dsv3_jax.compression.report import LAYERS, REPORT, LayerLog, report_json
from dsv3_jax.config import config_to_dict, config_to_yaml
from dsv3_jax.data.companions import DIRECTORY, TOKENIZER
from dsv3_jax.errors import UserError
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import MTPModule
from dsv3_jax.progress import BytesProgress
from pallas_kernels.integer_weight import dequantize


def compress(
    run_or_checkpoint: str | Path, directory: str | Path, profile: str | Profile = "w4", overrides: Iterable[str] = ()
) -> Path:
    """Write a compressed checkpoint, which `load`, `evaluate`, `generate` and `export` take as any other.

    Args:
        run_or_checkpoint: A run (its latest checkpoint), a checkpoint, or an imported checkpoint.
        directory: The new checkpoint, which exists only once it is complete. An interrupted call goes on when repeated.
        profile: A name in compression/profiles.yaml, or a profile.
        overrides: `key=value` for a named profile, e.g. `experts.bits=2`, `calibration.tokens=8192`.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: The profile is not valid or does not fit the model; the checkpoint is compressed already; there is no text to
            calibrate with; a layer's weights are not finite.
    """
    if jax.process_count() > 1:
        raise UserError("compress runs in one process, with all its devices")
    target = Path(directory)
    check_path(target.absolute())
    source = open_checkpoint(run_or_checkpoint)
    metadata = read_metadata(source.path)
    if integer_arrays(metadata, str(source.path)):
        raise UserError(f"{source.path} is compressed already; compress the checkpoint that it was made from")
    checked = load_profile(profile, overrides) if isinstance(profile, str) else profile
    checked.check_fits(source.config.model)
    return _Compression(source, metadata, target, checked).run()


class _Compression:
    """One model on its way through a profile."""

    def __init__(self, source: Checkpoint, metadata: dict[str, Any], target: Path, profile: Profile):
        self._source, self._config, self._profile, self._target = source, source.config.model, profile, target
        self._reader = BlockReader(source)
        self._windows = calibration_windows(source, profile.calibration)
        self._integers = integer_arrays_of(self._config, profile)
        kept = {key: metadata[key] for key in ("corpus", "hf_config") if key in metadata}
        self._metadata = kept | {
            "config": config_to_dict(source.config),
            INTEGERS: {name: array.to_json() for name, array in self._integers.items()},
            "compression": {"profile": dataclasses.asdict(profile), "source": self._source_digest()},
        }
        identity = hashlib.sha256(json.dumps(self._metadata, sort_keys=True).encode())
        identity.update(np.ascontiguousarray(self._windows.tokens).tobytes())
        self._writer = CompressedWriter(target, identity.hexdigest(), self._config, self._integers, self._metadata)
        self._compress = LayerCompressor(self._config, profile)
        self._log = LayerLog(self._writer.path_of(LAYERS))

    def _source_digest(self) -> str:
        return hashlib.sha256((self._source.path / MANIFEST).read_bytes()).hexdigest()

    def run(self) -> Path:
        depth = self._config.num_nextn_predict_layers
        inputs = self._windows.inputs(depth)
        parts = batches(self._windows, self._profile.calibration.batch)
        embed_VD = self._reader.array("embed_VD")
        if not self._writer.done("embed_VD", ()):
            self._writer.write("embed_VD", (), {"": embed_VD})
        segments = [jnp.asarray(inputs.segments[part]) for part in parts]
        stream = Stream([jnp.asarray(embed_VD[inputs.tokens[part]]) for part in parts], segments)
        hidden: list[jax.Array] | None = None
        report: list[dict[str, Any]] = []
        sizes = {place: self._reader.size(place) for place in places(self._config)}
        with BytesProgress("compress", sum(sizes.values())) as progress:
            for place, size in sizes.items():
                module = self._reader.block(place)
                if place.stack == "mtp":
                    hidden = self._final(stream) if hidden is None else hidden
                    stream = self._mtp_stream(module, place.layer, hidden, embed_VD, segments, parts)
                stream, said = self._pass(place, module, stream)
                report.append(said)
                if isinstance(module, MTPModule):
                    hidden = [module.norm(x_BLD) for x_BLD in stream.x]
                progress.advance(size)
        for name in ("norm/scale", *(() if self._config.tie_word_embeddings else ("head_DV",))):
            if not self._writer.done(name, ()):
                self._writer.write(name, (), {"": self._reader.array(name)})
        self._add_files(report)
        self._writer.commit()
        return self._target

    def _final(self, stream: Stream) -> list[jax.Array]:
        """What the head reads."""
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.scale.set_value(jnp.asarray(self._reader.array("norm/scale")))
        return [norm(x_BLD) for x_BLD in stream.x]

    def _mtp_stream(
        self, module: Any, k: int, hidden: list, embed_VD: np.ndarray, segments: list, parts: list[slice]
    ) -> Stream:
        """What enters the block of MTP module k, from the hidden states of the module before it, or of the model."""
        ahead = self._windows.tokens_ahead(k + 1, self._config.num_nextn_predict_layers)
        joined = [module.joined(h, jnp.asarray(embed_VD[ahead[part]])) for h, part in zip(hidden, parts, strict=True)]
        return Stream(joined, segments)

    def _pass(self, place: Place, module: Any, stream: Stream) -> tuple[Stream, dict[str, Any]]:
        """Compress a block, or take what an earlier process made of it; returns the stream after it, and its report."""
        block = module.block if isinstance(module, MTPModule) else module
        inner = "block/" if isinstance(module, MTPModule) else ""
        if self._writer.done(place.prefix, place.lead) and (said := self._log.said_of(place)):
            for name, variable in variables_by_name(nnx.state(block)).items():
                if (array := f"{place.prefix}{inner}{name}") in self._integers:
                    variable.set_value(dequantize(jax.tree.map(jnp.asarray, self._writer.read(array, place.lead))))
            return run_block(block, stream), said
        result, after = self._compress(block, stream, place.name)
        said = self._log.say(place, result)
        values = {name: variable.get_value() for name, variable in variables_by_name(nnx.state(module)).items()}
        values |= {f"{inner}{name}": jax.device_get(weight) for name, weight in result.weights.items()}
        self._writer.write(place.prefix, place.lead, values)
        return after, said

    def _add_files(self, layers: list[dict[str, Any]]) -> None:
        self._log.remove()
        self._writer.add_file(REPORT, report_json(self._profile, self._windows, layers))
        self._writer.add_file("config.yaml", config_to_yaml(self._source.config).encode())
        for name, content in self._source.companions().items():
            self._writer.add_file(f"{DIRECTORY}/{name}", content)
        if tokenizer := self._source.tokenizer_file():
            self._writer.add_file(TOKENIZER, tokenizer.read_bytes())
