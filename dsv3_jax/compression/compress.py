"""`dsv3 compress`: a trained model's linear layers in few bits, one layer at a time.

In memory are one layer, the moments of what its linear layers read, and the calibration set on its way through the model.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.integers import INTEGERS, integer_arrays
from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.manifest import content_digest
from dsv3_jax.checkpoint.storage import check_path, read_metadata
from dsv3_jax.compression.blocks import BlockReader, Place, make_block, places
from dsv3_jax.compression.calibration import batches, calibration_windows
from dsv3_jax.compression.container import CompressedWriter, integer_arrays_of
from dsv3_jax.compression.fp8 import round_to_fp8
from dsv3_jax.compression.held_out import held_out_batches, measured
from dsv3_jax.compression.layer import LayerCompressor, Stream, run_attention, run_ffn
from dsv3_jax.compression.parts import sizes_by_part
from dsv3_jax.compression.profile import Profile, load_profile
from dsv3_jax.compression.prune import kept_experts, prune_layer, pruned_config
from dsv3_jax.compression.report import LAYERS, REPORT, LayerLog, report_json
from dsv3_jax.compression.targets import known_targets
from dsv3_jax.config import config_to_dict, config_to_yaml
from dsv3_jax.data.companions import DIRECTORY, TOKENIZER
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_import import SCALES
from dsv3_jax.interop.safetensors_file import write_safetensors
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Block, MTPModule
from dsv3_jax.progress import BytesProgress


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
    if (device := known_targets().get(checked.name)) is not None and device.leaves and checked.experts is None:
        print(f"{device.name}: {' '.join(device.leaves.split())}", file=sys.stderr, flush=True)
    return _Compression(source, metadata, target, checked).run()


class _Compression:
    """One model on its way through a profile, with the original beside it if experts are dropped."""

    def __init__(self, source: Checkpoint, metadata: dict[str, Any], target: Path, profile: Profile):
        self._source, self._profile, self._target = source, profile, target
        original = source.config.model
        self._experts = kept_experts(original, profile.prune.fraction)
        self._prunes = self._experts < original.n_routed_experts
        self._config = replace(source.config, model=pruned_config(original, self._experts))
        self._reader = BlockReader(source)
        self._windows = calibration_windows(source, profile.calibration)
        self._integers = integer_arrays_of(self._config.model, profile)
        kept = {key: metadata[key] for key in ("corpus", "hf_config") if key in metadata}
        described = kept | {
            "config": config_to_dict(self._config),
            INTEGERS: {name: array.to_json() for name, array in self._integers.items()},
            "compression": {"profile": _decisive(profile), "source": content_digest(source.path)},
        }
        identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        identity.update(np.ascontiguousarray(self._windows.tokens).tobytes())
        self._writer = CompressedWriter(target, identity.hexdigest(), self._config.model, self._integers, described)
        self._compress = LayerCompressor(self._config.model, profile)
        self._scales: dict[str, np.ndarray] = {}  # of 8-bit floats
        self._log = LayerLog(self._writer.path_of(LAYERS))
        self._held_out = held_out_batches(source, profile.measure)

    def run(self) -> Path:
        inputs = self._windows.inputs(self._config.model.num_nextn_predict_layers)
        parts = batches(self._windows, self._profile.calibration.batch)
        embed_VD = self._reader.array("embed_VD")
        self._write_dense("embed_VD", embed_VD)
        segments = [jnp.asarray(inputs.segments[part]) for part in parts]
        stream = original = Stream([jnp.asarray(embed_VD[inputs.tokens[part]]) for part in parts], segments)
        norm = RMSNorm(self._config.model.hidden_size, self._config.model.rms_norm_eps)
        norm.scale.set_value(jnp.asarray(self._reader.array("norm/scale")))
        report: list[dict[str, Any]] = []
        sizes = {place: self._reader.size(place) for place in places(self._source.config.model)}
        with BytesProgress("compress", sum(sizes.values())) as progress:
            for place, size in sizes.items():
                module = self._reader.block(place)
                if isinstance(module, MTPModule):
                    embedded = self._embedded_ahead(place.layer + 1, embed_VD, parts)
                    stream, original = (_joined(module, norm, s, embedded) for s in (stream, original))
                stream, original, said = self._pass(place, module, stream, original)
                report.append(said)
                norm = module.norm if isinstance(module, MTPModule) else norm
                progress.advance(size)
        for name in ("norm/scale", *(() if self._config.model.tie_word_embeddings else ("head_DV",))):
            self._write_dense(name, self._reader.array(name))
        self._add_files(report, self._measured())
        self._writer.commit()
        return self._target

    def _write_dense(self, name: str, array: np.ndarray) -> None:
        """An array that belongs to no block."""
        if not self._writer.done(name, ()):
            self._writer.write(name, (), {"": array})

    def _embedded_ahead(self, k: int, embed_VD: np.ndarray, parts: list[slice]) -> list[np.ndarray]:
        """Embeddings of the tokens k places on, for each batch."""
        ahead = self._windows.tokens_ahead(k, self._config.model.num_nextn_predict_layers)
        return [embed_VD[ahead[part]] for part in parts]

    def _pass(
        self, place: Place, module: Block | MTPModule, stream: Stream, original: Stream
    ) -> tuple[Stream, Stream, dict[str, Any]]:
        """Compress a block, or take what an earlier process made of it; returns both streams after it, and its report."""
        block = module.block if isinstance(module, MTPModule) else module
        inner = "block/" if isinstance(module, MTPModule) else ""
        original_middle = run_attention(block, original) if self._prunes else original
        original = run_ffn(block, original_middle) if self._prunes else original
        self._scales |= round_to_fp8(module, place, self._config.model, self._profile)
        if self._writer.done(place.prefix, place.lead) and (said := self._log.said_of(place)):
            done = make_block(self._config.model, place, lambda name: self._writer.read(name, place.lead))
            block = done.block if isinstance(done, MTPModule) else done
            return run_ffn(block, run_attention(block, stream)), original, said
        pruning: dict[str, Any] = {}

        def pruned(block: Block, middle: Stream) -> Block:
            if not self._prunes or not place.moe:
                return block
            streams = original_middle.tokens(), middle.tokens(), middle.real()
            found = prune_layer(block, self._experts, self._profile.prune, *streams)
            pruning.update(found.report)
            return found.block

        result, after = self._compress(block, stream, place.name, pruned)
        said = self._log.say(place, result, pruning)
        values = {name: variable.get_value() for name, variable in variables_by_name(nnx.state(module)).items()}
        for name, variable in variables_by_name(nnx.state(result.block)).items():
            values[inner + name] = result.weights.get(name, variable.get_value())
        self._writer.write(place.prefix, place.lead, jax.device_get(values))
        return after, original, said

    def _measured(self) -> dict[str, Any]:
        """What compression did to the model, on text that it did not see."""
        if isinstance(self._held_out, str):
            return {"skipped": self._held_out}
        return measured(self._source, self._writer.path_of(""), self._config, self._held_out)

    def _add_files(self, layers: list[dict[str, Any]], measured: dict[str, Any]) -> None:
        self._log.remove()
        if self._scales:
            tensors = {name: (scale.dtype, scale.shape) for name, scale in self._scales.items()}
            write_safetensors(self._writer.path_of(SCALES), tensors, self._scales.__getitem__)
        sizes = sizes_by_part(self._source.config.model, self._config.model, self._integers)
        self._writer.add_file(REPORT, report_json(self._profile, self._windows, layers, measured, sizes))
        self._writer.add_file("config.yaml", config_to_yaml(self._config).encode())
        for name, content in self._source.companions().items():
            self._writer.add_file(f"{DIRECTORY}/{name}", content)
        if tokenizer := self._source.tokenizer_file():
            self._writer.add_file(TOKENIZER, tokenizer.read_bytes())


def _decisive(profile: Profile) -> dict[str, Any]:
    """What of a profile decides over the weights."""
    return {key: value for key, value in dataclasses.asdict(profile).items() if key != "measure"}


def _joined(module: MTPModule, norm: RMSNorm, stream: Stream, embedded: list[np.ndarray]) -> Stream:
    """What enters the block of an MTP module: the normalised state of the model, or of the module before, and embeddings."""
    x = [module.joined(norm(x_BLD), jnp.asarray(ahead)) for x_BLD, ahead in zip(stream.x, embedded, strict=True)]
    return Stream(x, stream.segments)
