"""The end of a run: report.json (held-out loss, and bits per byte beside those of gzip and xz), loss.png and sample.txt."""

import gzip
import itertools
import json
import lzma

import numpy as np
from flax import nnx

from dsv3_jax.cluster.processes import is_first
from dsv3_jax.config import Config
from dsv3_jax.data.split import held_out_documents
from dsv3_jax.data.store import TokenStore
from dsv3_jax.errors import UserError
from dsv3_jax.progress import printable
from dsv3_jax.runs.loss_curve import plot_loss
from dsv3_jax.serve.generate import generate
from dsv3_jax.state.train_state import serving_graph
from dsv3_jax.streams import say
from dsv3_jax.training.evaluate import evaluate_store
from dsv3_jax.training.loop import TrainResult
from dsv3_jax.training.step import make_eval_step

_MAX_BYTES = 2**21  # held-out text to evaluate: enough for a stable figure, and takes seconds
_SAMPLE_TOKENS = 120


def first_documents(store: TokenStore, max_bytes: int) -> TokenStore:
    """The longest prefix of the store within `max_bytes` of text; at least one document."""
    count = max(1, int(np.searchsorted(np.cumsum(store.text_bytes), max_bytes, side="right")))
    end = int(store.offsets[count])
    return TokenStore(store.tokens[:end], store.offsets[: count + 1], store.ids[:count], store.text_bytes[:count])


def held_out_text(config: Config, count: int) -> bytes:
    """The text of the first `count` validation documents, in the store's order, in UTF-8."""
    return "".join(document.text for document in itertools.islice(held_out_documents(config.data), count)).encode()


def compression(result: TrainResult) -> dict[str, float]:
    """Evaluate on held-out text: loss, accuracy, load, and bits per byte of the model, `gzip -9` and `xz -9`."""
    config = result.config
    store = first_documents(result.corpus.validation, _MAX_BYTES)
    text = held_out_text(config, len(store))
    if len(text) != int(store.text_bytes.sum()):
        raise UserError("data.path: files were changed while the run was going on: there is no report; checkpoints are intact")
    evaluation = evaluate_store(
        make_eval_step(config, result.layout), result.state.params, result.state.router_bias, store, config.data.seq_len,
        config.data.batch_size, layout=result.layout,
    )  # fmt: skip
    return {
        "held_out_bytes": len(text),
        "held_out_loss": evaluation.loss,
        "held_out_accuracy": evaluation.accuracy,
        "held_out_max_load": evaluation.max_load,
        "bits_per_byte": evaluation.bits_per_byte(len(text)),
        "gzip_9_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_9_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def sample(result: TrainResult) -> str:
    """The beginning of the first held-out document, continued by the model."""
    config = result.config
    model = nnx.merge(serving_graph(config, result.layout), result.state.params, result.state.router_bias)
    tokenizer, store = result.corpus.tokenizer, result.corpus.validation
    room = config.model.max_position_embeddings - _SAMPLE_TOKENS
    prompt = np.asarray(store.tokens[: min(32, int(store.offsets[1]) - 1, max(room, 1))])
    new = min(_SAMPLE_TOKENS, config.model.max_position_embeddings - len(prompt))
    ids = generate(
        model, prompt[None], new, temperature=0.7, top_p=0.95, seed=config.train.seed, eos_id=result.corpus.special.ends
    )
    return tokenizer.decode(np.asarray(ids)[0].tolist())


def finish(result: TrainResult) -> None:
    """Write report.json, loss.png and sample.txt into the run's directory, and print them. Every process has to call this."""
    run, figures = result.run, compression(result)  # all processes' devices take part, as in the sample
    if is_first():  # before the sample: it is the least of the three, and may fail
        (run.path / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
        plot_loss(run.metrics_file, run.path / "loss.png", f"{result.config.name}: step {int(result.state.step)}")
    text = sample(result)
    if not is_first():
        return
    (run.path / "sample.txt").write_text(text + "\n")
    say(f"held-out text, {figures['held_out_bytes']:,} bytes:")
    for name, key in (("model", "bits_per_byte"), ("gzip -9", "gzip_9_bits_per_byte"), ("xz -9", "xz_9_bits_per_byte")):
        say(f"  {name:8s} {figures[key]:.3f} bits per byte")
    say(f"loss curve: {run.path / 'loss.png'}\nsample:\n{printable(text)}")
