"""`dsv3 bench`: open-loop loads on a server or on an engine in this process, as a table and as JSON."""

import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.bench.figures import Limits, report
from dsv3_jax.bench.in_process import Served, serve_in_batches, serve_load
from dsv3_jax.bench.over_http import Server
from dsv3_jax.bench.workload import Lengths, Prompts, Request, arriving, draw_requests, read_trace
from dsv3_jax.checkpoint.load import load_with_config, open_checkpoint
from dsv3_jax.checks import require
from dsv3_jax.errors import UserError
from dsv3_jax.files import write_atomically
from dsv3_jax.interop.hf_load import load_hf
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.engine import Engine
from dsv3_jax.streams import say

_WARM_UP = 8  # requests before the first load
_ANY_VOCABULARY = 256  # ids that every tokenizer here has


@dataclass(frozen=True)
class Options:
    """Options of the command, as it describes them."""

    requests: int
    load: tuple[float, ...]
    rate: tuple[float, ...]
    trace: Path | None
    prompts: Path | None
    prompt_lengths: Lengths
    output_lengths: Lengths
    limits: Limits
    seed: int
    slots: int
    prompt_rows: int
    exact: bool
    batch: int
    single: int

    def __post_init__(self):
        for name, values in (("load", self.load), ("rate", self.rate)):
            for value in values:
                require(value > 0, f"--{name} {value}: use numbers above 0, or inf")
        for name, least in (("requests", 1), ("batch", 0), ("single", 0), ("seed", 0)):
            value = getattr(self, name)
            require(least <= value < 2**31, f"--{name} {value} is out of range; use {least} or more")


def bench(target: str, key: str | None, options: Options, out: Path | None, console: Console) -> None:
    """Run the loads on a server (`target` is its address) or on the model of a run, and print what was measured."""
    if target.startswith(("http://", "https://")):
        server = Server(target, key)
        prompts = Prompts(_ANY_VOCABULARY) if options.prompts is None else _held_out(options.prompts)
        result = _loads(options, prompts, lambda requests, _: server.serve_load(requests))
    else:
        result = _in_process(Path(target), options)
    result = {"target": target, "processor": processor(), "load_average": os.getloadavg()} | result
    show(result, console)
    if out is not None:
        write_atomically(out, json.dumps(result, indent=2) + "\n")


def _in_process(path: Path, options: Options) -> dict[str, Any]:
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        model = load_hf(path)
        prompts = Prompts(model.config.vocab_size) if options.prompts is None else _held_out(options.prompts)
    else:
        prompts, model = _held_out(options.prompts or path), load_with_config(path, keep_integers=True).model
    at_once = _at_once(options, prompts)
    _require_ids(at_once, options.trace)
    context = max(len(request.prompt) + request.max_tokens for request in at_once)
    shape = {"slots": options.slots, "prompt_rows": options.prompt_rows, "exact": options.exact}
    say("compiling the engine's programs")
    with Engine(model, context=context, most_waiting=len(at_once), **shape) as engine:
        serve_load(engine, at_once[:_WARM_UP], "warm-up")
        result = _loads(options, prompts, lambda requests, name: serve_load(engine, requests, name))
    return result | {"engine": shape} | _older_ways(model, at_once, options, result)


def _require_ids(requests: Sequence[Request], trace: Path | str | None) -> None:
    texts = any(isinstance(request.prompt, str) for request in requests)
    require(not texts, f"{trace} has texts, which need a server; give prompt_tokens")


def _older_ways(model: Transformer, at_once: Sequence[Request], options: Options, result: dict[str, Any]) -> dict[str, Any]:
    """The requests that came all at once, in batches and singly, and how much faster the engine was."""
    reference = next((f for name, f in result["loads"].items() if name in ("at once", "trace")), None)
    ways = {"static": (options.batch, len(at_once)), "one at a time": (1, options.single)}
    found, ratios = {}, {}
    for name, (batch, count) in ways.items():
        if batch and count:
            say(f"{name}: {count} requests, twice")
            served = serve_in_batches(model, at_once[:count], batch)
            rates = {"tokens_per_s": served.tokens / served.wall_s, "tokens_per_cpu_s": served.tokens / served.cpu_s}
            found[name] = asdict(served) | {"batch": batch, "requests": count} | rates
            if reference is not None:
                ratios[name] = {rate: reference[rate] / value for rate, value in rates.items()}
    return {"older_ways": found, "ratios": ratios}


def _held_out(path: Path) -> Prompts:
    """Prompts from documents that a run held out, or of random ids where there are none, which is said."""
    checkpoint = open_checkpoint(path)
    vocab_size = checkpoint.config.model.vocab_size
    try:
        return Prompts(vocab_size, checkpoint.corpus().validation.tokens)
    except UserError as error:
        say(f"prompts are of random ids, as the documents that {path} held out cannot be read: {error}")
        return Prompts(vocab_size)


def _at_once(options: Options, prompts: Prompts, seed: int = 0) -> list[Request]:
    if options.trace is not None:
        return read_trace(options.trace)
    return draw_requests(prompts, options.prompt_lengths, options.output_lengths, options.requests, options.seed + seed)


def _loads(options: Options, prompts: Prompts, serve: Callable[[list[Request], str], Served]) -> dict[str, Any]:
    """The figures of each load by its name. All requests at once come first: they give the capacity that shares are of."""
    loads: dict[str, Any] = {}

    def run(name: str, requests: list[Request]) -> dict[str, Any]:
        say(f"{name}: {len(requests)} requests")
        served = serve(requests, name)
        for error in sorted({outcome.error for outcome in served.outcomes if outcome.error})[:3]:
            say(f"{name}: requests failed: {error}")
        loads[name] = report(served.outcomes, served.counts or None, options.limits, served.wall_s)
        if served.cpu_s is not None:
            loads[name]["tokens_per_cpu_s"] = sum(outcome.tokens for outcome in served.outcomes) / served.cpu_s
        return loads[name]

    if options.trace is not None:
        run("trace", _at_once(options, prompts))
        return {"loads": loads}
    capacity = math.nan
    if options.load:
        capacity = run("at once", _at_once(options, prompts))["requests_per_s"]
        require(capacity > 0, "no request was served, so that there is no capacity to take shares of")
    rates = {f"{share:.0%}": share * capacity for share in sorted(options.load) if share < math.inf}
    rates |= {f"{rate:g}/s": rate for rate in sorted(options.rate)}
    for number, (name, rate) in enumerate(rates.items(), 1):  # other prompts each: a cached one would flatter
        requests = _at_once(options, prompts, number)
        loads[name] = {"rate_per_s": rate} | run(name, arriving(requests, rate, options.seed + number))
    return {"loads": loads}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as a table."""
    columns = {
        "tokens/s": "tokens_per_s", "a CPU s": "tokens_per_cpu_s", "requests/s": "requests_per_s", "goodput": "goodput_per_s",
        "rows": "row_utilisation", "decode": "decode_fill", "slots": "slot_occupancy_while_waiting", "busy": "busy",
        "drafts": "drafts_accepted",
    }  # fmt: skip
    table = Table("load", *columns, "first token", "gap", "failed", title="ms: p50 / p90 / p99")
    for name, figures in result["loads"].items():
        cells = [_number(figures.get(key)) for key in columns.values()]
        spans = [_milliseconds(figures.get(key)) for key in ("first_token_s", "gap_s")]
        table.add_row(name, *cells, *spans, str(figures["failed"]))
    for name, figures in result.get("older_ways", {}).items():
        cells = [_number(figures.get(key)) for key in columns.values()]
        table.add_row(f"{name} ({figures['batch']})", *cells)
    console.print(table)
    for name, ratio in result.get("ratios", {}).items():
        of_cpu = ratio["tokens_per_cpu_s"]  # other processes that want the same cores don't change it much
        console.print(
            f"over {name}: {ratio['tokens_per_s']:.2f}x the tokens a second, {of_cpu:.2f}x a second of this process's CPU"
        )
    console.print(f"{result['processor']}, load average {result['load_average'][0]:.1f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _milliseconds(values: dict[str, float] | None) -> str:
    return "" if values is None else " / ".join(f"{1000 * value:.1f}" for value in values.values())


def processor() -> str:
    """The name of this machine's processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
