"""The `dsv3` command: one thin function a verb. Bad input gets one line on stderr and exit code 2."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

from dsv3_jax.cluster.huge_pages import use_huge_pages
from dsv3_jax.config import Config, load_config
from dsv3_jax.errors import EXIT_BAD_INPUT, EXIT_STOPPED, FailedElsewhere, Refused, UserError, os_error_line
from dsv3_jax.progress import make_console, one_line
from dsv3_jax.streams import forgiving_streams

if TYPE_CHECKING:
    from dsv3_jax.runs.directory import RunDirectory

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]
ConfigPath = Annotated[Path, tyro.conf.Positional]
RunPath = Annotated[Path, tyro.conf.Positional]


def _join() -> None:
    """Join a run's other processes, if the environment names some (see cluster/processes.py)."""
    from dsv3_jax.cluster.processes import join

    join()


def _train_and_finish(config: Config, run: "RunDirectory", elastic: bool = False) -> None:
    from dsv3_jax.training.finish import finish
    from dsv3_jax.training.loop import train_in

    result = train_in(run, config, elastic)
    if result.interrupted:
        raise SystemExit(EXIT_STOPPED)
    finish(result)


def train(
    config: ConfigPath,
    overrides: Overrides = (),
    workers: str | None = None,
    engine: Literal["none", "local", "ray"] = "none",
    devices: int | None = None,
    rehearse: bool = False,
) -> None:
    """Train a configuration, going on from the run's latest checkpoint if it has one.

    Writes runs/NAME/: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, and at the end report.json, loss.png and
    sample.txt. Ctrl-C saves a checkpoint; the same command goes on from it. With --workers the mesh follows the number of
    workers; with --engine a supervisor starts them, and when one fails starts again with those that are left.

    Example: dsv3 train configs/tiny.yaml train.steps=100 name=short

    Example: dsv3 train configs/tiny.yaml parallel.fsdp=8 --engine local --workers 2:4 --devices 2

    Args:
        config: A YAML file such as configs/tiny.yaml.
        overrides: key=value, e.g. train.steps=100 optim.lr=1e-3 data.path="texts/*.txt".
        workers: MIN:MAX, the smallest and the largest number of worker processes; `dsv3 plan --workers` lists the feasible
            numbers between them.
        engine: Who starts workers: none (SLURM, JobSet, `dsv3 launch`), local (on this machine's CPU) or ray (on its cluster).
        devices: Devices per worker (virtual on CPU). Required with --engine; without, workers beyond the largest feasible
            number end at once.
        rehearse: First compile for every feasible number of workers below MAX, so that nothing is compiled when hosts are
            lost; without --engine, compile for the devices that there are, and end.
    """
    checked = load_config(config, overrides)  # before anything heavy is imported
    if engine != "none":
        from dsv3_jax.elastic.command import supervise

        code = supervise(checked, ["train", str(config), *overrides], engine, workers, devices, rehearse)
        if code:
            raise SystemExit(code)
        return
    use_huge_pages()
    if workers is not None and devices is not None:
        from dsv3_jax.elastic.command import leave_spares

        leave_spares(checked, devices)
    _join()
    if rehearse:
        from dsv3_jax.training.resolve import compile_only

        compile_only(checked, elastic=workers is not None)
    else:
        from dsv3_jax.runs.directory import run_directory

        _train_and_finish(checked, run_directory(checked), elastic=workers is not None)


def resume(run: RunPath, overrides: Overrides = ()) -> None:
    """Go on with a run from its latest checkpoint, with its own config.

    Example: dsv3 resume runs/tiny train.steps=1000

    Args:
        run: The run's directory.
        overrides: key=value for what may change: train.steps, train.eval_every, checkpoint.*, and the mesh, parallel.*.
    """
    from dsv3_jax.runs.directory import RunDirectory

    directory = RunDirectory(run.resolve())
    checked = directory.config(overrides)
    with contextlib.suppress(UserError):  # a copy that somebody gave a name that none can be keeps the old one
        checked = replace(checked, name=directory.path.name)
    use_huge_pages()
    _join()
    _train_and_finish(checked, directory)


def evaluate(run: RunPath, data: str | None = None) -> None:
    """Evaluate a run or checkpoint on its held-out documents, or on other text; prints one JSON line.

    Uses the run's mesh if this machine has the devices for it, and one device otherwise.

    Example: dsv3 eval runs/tiny --data notes.txt

    Args:
        run: A run (its latest checkpoint) or a checkpoint directory.
        data: A file, folder or glob of .txt, .jsonl or .parquet, also as .gz or .zst; the run's held-out documents if not
            given.
    """
    _join()
    from dsv3_jax.cluster.processes import is_first
    from dsv3_jax.training.evaluate import evaluate as run_evaluation

    figures = run_evaluation(run, data)
    if is_first():
        print(json.dumps(figures))


def generate(
    run: RunPath, prompt: str, max_new_tokens: int = 100, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> None:
    """Continue a text with a run or checkpoint; prints prompt and continuation.

    Uses the run's mesh if this machine has the devices for it, and one device otherwise.

    Example: dsv3 generate runs/tiny --prompt "def main(" --max-new-tokens 50 --temperature 0.8

    Args:
        run: A run (its latest checkpoint) or a checkpoint directory.
        prompt: The text to continue.
        max_new_tokens: The number of tokens to add; fewer if the text ends.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that has this probability.
        seed: Seed of the sampling.
    """
    _join()
    from dsv3_jax.checkpoint.load import load_with_config
    from dsv3_jax.cluster.processes import is_first
    from dsv3_jax.serve.generate import continue_text

    loaded = load_with_config(run, keep_integers=True)
    text = continue_text(
        loaded.model, loaded.tokenizer(), loaded.special_tokens(), prompt, max_new_tokens, temperature, top_p, seed
    )
    if is_first():
        print(text)


def import_(
    hf_dir: Annotated[Path, tyro.conf.Positional],
    ckpt_dir: Annotated[Path | None, tyro.conf.Positional] = None,
    overrides: Overrides = (),
    plan: bool = False,
    dtype: Literal["exact", "bfloat16"] = "exact",
) -> None:
    """Import a Hugging Face checkpoint of DeepSeek-V3's architecture: float32, bfloat16 or DeepSeek's block-FP8.

    The result is a checkpoint for eval, generate, export and train.init_from, on any mesh. An import that was interrupted goes
    on where it stopped when called again.

    Example: dsv3 import path/to/DeepSeek-V3 checkpoints/v3 parallel.expert=8 && dsv3 import --plan path/to/DeepSeek-V3

    Args:
        hf_dir: A directory with config.json and safetensors; for --plan, config.json and the index are enough.
        ckpt_dir: The checkpoint's directory, which appears once all of it is written.
        overrides: key=value for sections that config.json does not have: parallel.*, data.*, precision.*, ...
        plan: Only print which tensor fills which array, which are left over, and how much disk it takes; reads no weights.
        dtype: exact keeps every number (8 bits become float32); bfloat16 rounds matrices.
    """
    if plan:
        from dsv3_jax.interop.hf_plan import plan_import, show_plan

        show_plan(plan_import(hf_dir), make_console())
        return
    if ckpt_dir is None:
        raise UserError("import needs CKPT_DIR, where the checkpoint goes; or --plan")
    _join()
    from dsv3_jax.cluster.processes import is_first
    from dsv3_jax.interop.hf_import import import_hf

    written = import_hf(hf_dir, ckpt_dir, overrides, dtype == "bfloat16")
    if is_first():
        print(f"imported {hf_dir} as {written}")


def export(
    run: RunPath,
    out_dir: Annotated[Path, tyro.conf.Positional],
    format: Literal["hf-f32", "hf-bf16", "hf-fp8", "hf-w4", "hf-gptq", "gguf", "gguf-f32", "gguf-f16", "gguf-q8_0"] = "hf-bf16",
    shard_gb: float = 5.0,
) -> None:
    """Export a run or checkpoint as a Hugging Face checkpoint that transformers, vLLM and SGLang load, or for llama.cpp.

    Weights are read from disk one tensor at a time: it needs no device and little memory, whatever mesh wrote them.

    Example: dsv3 export runs/tiny exported/tiny --format hf-fp8

    Example: dsv3 export compressed/tiny-w4 exported/tiny-gguf --format gguf

    Args:
        run: A run (its latest checkpoint) or a checkpoint directory.
        out_dir: The export's directory, which appears once all of it is written.
        format: hf-f32, hf-bf16, or hf-fp8 (DeepSeek's block-FP8); of a compressed checkpoint, with its integers, hf-w4
            (compressed-tensors), hf-gptq (gptqmodel, vLLM) or gguf (llama.cpp); of any, gguf-f32, gguf-f16 or gguf-q8_0.
        shard_gb: Largest size of a safetensors file, in 10^9 bytes; inf makes one file. GGUF is always one file.
    """
    from dsv3_jax.interop.hf_export import export as write

    print(f"exported {run} as {write(run, out_dir, format, shard_gb * 1e9)}")


def compress(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    out_dir: Annotated[Path | None, tyro.conf.Positional] = None,
    overrides: Overrides = (),
    profile: str = "w4",
    plan: bool = False,
    topology: str = "h100:1x8",
    bandwidth: float | None = None,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> None:
    """Compress a run or checkpoint: linear layers in few bits, by GPTQ, one layer at a time.

    The result is a checkpoint that eval, generate and export take. A call that was interrupted goes on when repeated.

    Example: dsv3 compress runs/tiny compressed/tiny-w4 --profile w4

    Example: dsv3 compress runs/tiny compressed/tiny-w2 --profile bits experts.group=32 calibration.tokens=8192

    Example: dsv3 compress configs/v3_671b.yaml --plan --topology h100:1x8 --profile arm-i8mm

    Args:
        run: A run (its latest checkpoint), a checkpoint, or an imported checkpoint; for --plan also a YAML file.
        out_dir: The compressed checkpoint's directory, which appears once all of it is written.
        overrides: key=value for the profile: linears.bits, experts.group, method, damping, calibration.tokens, ...
        profile: Which numbers each part of the model gets, or the edge device that it is for; see --list.
        plan: Only print memory, work and hours of compressing on --topology, and sizes by profile; reads no weights.
        topology: For --plan: KIND:SHAPE as for dsv3 plan.
        bandwidth: For --plan: memory bandwidth in GB/s, for decode rates; the target's if not given.
        list_: Only print the profiles.
    """
    if list_:
        from dsv3_jax.compression.tables import list_profiles

        return list_profiles(make_console())
    if plan and run is not None:
        from dsv3_jax.compression.tables import show_plan

        given = (*(() if out_dir is None else (str(out_dir),)), *overrides)  # there is no OUT_DIR
        return show_plan(run, profile, given, topology, bandwidth, make_console())
    if run is None or out_dir is None:
        raise UserError("compress needs RUN and OUT_DIR, or RUN (or a YAML file) and --plan; --list prints profiles")
    from dsv3_jax.compression.compress import compress as write

    print(f"compressed {run} as {write(run, out_dir, profile, overrides)}")


def report(run: RunPath) -> None:
    """Print where a run's time went: steps that count, saving, and what each failure cost (detection, restart, restore,
    compiling, steps done again); of a compressed checkpoint, what compression did, and write a page with plots, compress.html.

    Example: dsv3 report runs/tiny

    Example: dsv3 report compressed/tiny-w4

    Args:
        run: The run's directory, or a compressed checkpoint's.
    """
    from dsv3_jax.compression.report import REPORT

    if (run / REPORT).is_file():
        from dsv3_jax.compression.command import report as report_compression

        print(f"wrote {report_compression(run, make_console())}")
        return
    from dsv3_jax.runs.directory import RunDirectory
    from dsv3_jax.runs.report import show

    show(RunDirectory(run), make_console())


def describe(config: ConfigPath, overrides: Overrides = ()) -> None:
    """Print a configuration's parameters, bytes, cache and FLOPs. Needs no device.

    Example: dsv3 describe configs/v3_671b.yaml

    Args:
        config: A YAML file.
        overrides: key=value, e.g. model.num_hidden_layers=30.
    """
    checked = load_config(config, overrides)
    from dsv3_jax.describe import describe as show

    show(checked, make_console())


def platforms() -> None:
    """Print which formats each platform multiplies natively, and which recipe precision.recipe=auto chooses on each and why.

    Example: dsv3 platforms
    """
    import jax

    from dsv3_jax.describe import describe_platforms

    describe_platforms(jax.devices()[0], make_console())


def plan(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    overrides: Overrides = (),
    topology: tuple[str, ...] = (),
    out: Path | None = None,
    imbalance: str = "1",
    price: float | None = None,
    memory_gb: float = 16.0,
    timeout_s: float = 3600.0,
    xla: tuple[str, ...] = (),
    search: bool = False,
    compile_best: int = 3,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
    workers: str | None = None,
    devices: int = 8,
    serve: bool = False,
    batch: int = 64,
    context: int = 4096,
    drafts: bool = False,
) -> None:
    """Compile a configuration's training step for devices that are not here: does it fit, what is sent, how fast will it be?

    Writes plan.json and plan.html into --out. Needs the targets' compilers, not their devices: scripts/tools/setup_aot.sh
    installs them into .venv-aot. Compiled programs are kept; the same plan again takes seconds.

    Example: dsv3 plan configs/v3_671b.yaml data.batch_size=512 train.grad_accum_steps=1 --topology v5p:8x8x8 tpu7x:4x4x8

    Example: dsv3 plan configs/v3_671b.yaml --serve --topology v6e:8x8 --batch 64 --context 4096

    Args:
        config: A YAML file.
        overrides: key=value, e.g. parallel.expert=64 remat.policy=full.
        topology: One or more of KIND:SHAPE, such as v5p:8x8x8 or h100:128x8 (hosts x GPUs); several are compared.
        out: Directory for plan.json and plan.html; plans/NAME if not given.
        imbalance: Rows that the fullest device's experts get over the mean; or a run, to take what its router did.
        price: Price of a device for one hour, for the cost of the run.
        memory_gb: Stop the compiler if it takes more memory than this.
        timeout_s: Stop the compiler after this many seconds.
        xla: Compiler options, NAME=VALUE, e.g. xla_tpu_enable_latency_hiding_scheduler=true.
        search: Rank meshes, remat policies, microbatches and precisions for the batch, and compile the best few.
        compile_best: How many candidates of the search to compile.
        list_: Only print the known topologies.
        workers: MIN:MAX; only print the feasible numbers of workers between them, and the mesh of each.
        devices: Devices per worker, for --workers.
        serve: Compile the engine's steps (decode, and prompts into the cache) in place of the training step.
        batch: Sequences at once, for --serve.
        context: Tokens of each sequence, for --serve.
        drafts: Compile the step with the MTP module's drafts as well, for --serve.
    """
    checked = None if config is None else load_config(config, overrides)  # before anything heavy is imported
    if checked is not None and workers is not None:
        from dsv3_jax.cost.division import check_divisible
        from dsv3_jax.elastic.options import check_devices, parse_workers

        least, most = parse_workers(workers)
        check_divisible(checked, range(least, most + 1), check_devices(devices))
        from dsv3_jax.plan.command import list_worker_counts

        return list_worker_counts(checked, range(least, most + 1), devices, make_console())
    from dsv3_jax.plan.command import Request, list_topologies, run_plan, run_search
    from dsv3_jax.plan.compile import Limits
    from dsv3_jax.plan.figures import Assumptions
    from dsv3_jax.plan.imbalance import read_imbalance

    console = make_console()
    if list_:
        return list_topologies(console)
    if config is None or not topology:
        raise UserError("plan needs CONFIG and --topology; dsv3 plan --list prints topologies")
    if serve:
        from dsv3_jax.plan.command import compiler_options
        from dsv3_jax.plan.serving import Load, run_serving

        load, limits = Load(batch, context, drafts), Limits(memory_gb, timeout_s)
        return run_serving(config, overrides, topology, out, load, limits, compiler_options(xla), console)
    assume, limits = Assumptions(read_imbalance(imbalance), price), Limits(memory_gb, timeout_s)
    request = Request(config, overrides, topology, out, assume, limits, xla)
    if search:
        run_search(request, compile_best, console)
    else:
        run_plan(request, console)


def overlap(trace: Annotated[Path, tyro.conf.Positional], plan: Path | None = None) -> None:
    """Print how much of a run's communication was hidden behind computation, from a trace of jax.profiler (TPU, GPU or CPU).

    Trace a few steps after the first one with jax.profiler.start_trace(DIR) and stop_trace(). Several processes on a host write
    into subdirectories of their own.

    Example: dsv3 overlap traces/run --plan plans/v3_671b/plan.json

    Args:
        trace: The directory given to jax.profiler, or one .xplane.pb.
        plan: A plan.json to compare with.
    """
    from dsv3_jax.plan.command import show_overlap

    show_overlap(trace, plan, make_console())


def bench(
    target: Annotated[str, tyro.conf.Positional],
    requests: int = 200,
    load: tuple[float, ...] = (0.5, 0.7, 0.85, 0.95, float("inf")),
    rate: tuple[float, ...] = (),
    trace: Path | None = None,
    prompts: Path | None = None,
    prompt_lengths: str = "8:50:128",
    output_lengths: str = "4:40:120",
    ttft_ms: float = 1000.0,
    gap_ms: float = 100.0,
    seed: int = 0,
    slots: int = 64,
    prompt_rows: int = 64,
    exact: bool = False,
    batch: int = 64,
    single: int = 50,
    api_key_file: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure serving under an open load: requests that arrive by chance, however far behind the server is.

    Prints, for each load, tokens and requests a second, goodput, row utilisation, decode fill, slot occupancy while somebody
    waits, busy, accepted drafts, and percentiles of the time to the first token and of the gaps between tokens (docs/serving.md
    says what each is). With a run instead of an address, the engine is in this process, and static batches and one request at
    a time are measured beside it.

    Example: dsv3 bench runs/tiny --out bench.json

    Example: dsv3 bench http://127.0.0.1:8000 --rate 2 4 8 --prompts runs/tiny

    Example: dsv3 bench http://127.0.0.1:8000 --trace trace.jsonl --ttft-ms 500 --gap-ms 50

    Args:
        target: A server's address, or a run, a checkpoint or a Hugging Face checkpoint's directory.
        requests: The number of requests of each load.
        load: Shares of the capacity, which is what all requests at once are served at, and which is measured first.
        rate: Requests a second, beside or (with --load alone) instead of shares.
        trace: A JSONL file with arrival_s, prompt or prompt_tokens, and max_tokens in each line, instead of random requests.
        prompts: A run whose held-out documents the prompts are of; TARGET's if it is a run, random token ids otherwise.
        prompt_lengths: LOW:MEDIAN:HIGH in tokens, lognormal.
        output_lengths: The same of outputs.
        ttft_ms: For goodput, the longest time to the first token.
        gap_ms: For goodput, the most of a request's 99th percentile of gaps.
        seed: Of lengths, prompts and arrivals.
        slots: The engine's, as for `dsv3 serve`.
        prompt_rows: The engine's, as for `dsv3 serve`.
        exact: The engine's, as for `dsv3 serve`.
        batch: The size of static batches; 0 for none.
        single: How many requests are served one at a time; 0 for none.
        api_key_file: A file whose first line is the server's key.
        out: A JSON file for all figures.
    """
    from dsv3_jax.bench.command import Options
    from dsv3_jax.bench.command import bench as run
    from dsv3_jax.bench.figures import Limits
    from dsv3_jax.bench.workload import Lengths

    options = Options(
        requests, load, rate, trace, prompts, Lengths.parse("--prompt-lengths", prompt_lengths),
        Lengths.parse("--output-lengths", output_lengths), Limits(ttft_ms / 1000, gap_ms / 1000), seed, slots, prompt_rows,
        exact, batch, single,
    )  # fmt: skip
    key = None if api_key_file is None else api_key_file.read_text().partition("\n")[0].strip()
    run(target, key, options, out, make_console())


def launch(command: Annotated[tuple[str, ...], tyro.conf.Positional], processes: int = 2, devices: int = 4) -> None:
    """Run another verb in several processes on this machine's CPU, as on a cluster; the first failure ends them all.

    Options of launch go before the verb.

    Example: dsv3 launch --processes 2 --devices 4 train configs/tiny.yaml parallel.fsdp=4 parallel.expert=2

    Args:
        command: A verb with its arguments.
        processes: Number of processes.
        devices: Virtual CPU devices per process.
    """
    from dsv3_jax.cluster.launch import launch as start

    if not command or command[0] not in _VERBS or command[0] == "launch":
        raise UserError(f"launch {' '.join(command)}: give a verb to run, such as train or eval")
    code = start(list(command), processes, devices)
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def _serving_packages() -> Iterator[None]:
    """Turns the lack of an optional package into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "jinja2"):
            raise
        raise UserError(f"{package} is not installed; pip install 'dsv3-jax[serve]'") from None


def serve(
    model: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    slots: int = 64,
    context: int | None = None,
    cache_tokens: int | None = None,
    prompt_rows: int = 64,
    drafts: bool | None = None,
    exact: bool = False,
) -> None:
    """Serve a model: OpenAI's HTTP API (completions, chat, streams), metrics for Prometheus, and a page to try it by.

    The port opens once all programs are compiled, and then the address is printed. SIGTERM and Ctrl-C let running requests end
    first. Needs the packages of dsv3-jax[serve].

    Example: dsv3 serve runs/tiny --port 8000

    Args:
        model: A run (its latest checkpoint), a checkpoint, also a compressed one, or a Hugging Face checkpoint's directory.
        host: The address to listen at; one that others can reach needs --api-key-file.
        port: The port; 0 for a free one.
        api_key_file: A file with one key on each line. Every path but /health then takes one, as `Authorization: Bearer KEY`.
        slots: The number of sequences that are computed together.
        context: The longest prompt with its output, in tokens; the model's if not given.
        cache_tokens: Tokens that the cache has room for; if not given, --slots contexts or 1 GiB, if that is less.
        prompt_rows: Tokens of prompts that are computed beside the running sequences in a step: more for throughput, fewer for
            even gaps between tokens.
        drafts: Let the MTP module draft a token ahead; if not given, while that is measured to pay.
        exact: A request's text depends on nothing but the request, to the bit; slower.
    """
    with _serving_packages():
        from dsv3_jax.http_api.server import serve as run

    engine = {"slots": slots, "context": context, "cache_tokens": cache_tokens, "prompt_rows": prompt_rows}
    run(model, host, port, api_key_file, **engine, drafts=drafts, exact=exact)


def chat(
    model: Annotated[str, tyro.conf.Positional],
    api_key_file: Path | None = None,
    temperature: float = 0.7,
    max_tokens: int | None = None,
    system: str | None = None,
) -> None:
    """Talk to a model in the terminal: one that `dsv3 serve` (or another server with OpenAI's API) serves, or one loaded here.

    A model without a chat template continues each line. Ctrl-C ends an answer, Ctrl-D the conversation.

    Example: dsv3 chat http://127.0.0.1:8000

    Example: dsv3 chat runs/tiny --max-tokens 60

    Args:
        model: A server's address, or what `dsv3 serve` takes.
        api_key_file: A file whose first line is the server's key.
        temperature: 0 takes the likeliest token.
        max_tokens: The longest answer.
        system: What the model is told before the conversation.
    """
    with _serving_packages():
        from dsv3_jax.http_api.chat import chat as run

        run(model, api_key_file, temperature, max_tokens, system)


_VERBS = {
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "generate": generate,
    "import": import_,
    "export": export,
    "compress": compress,
    "serve": serve,
    "chat": chat,
    "report": report,
    "describe": describe,
    "platforms": platforms,
    "plan": plan,
    "overlap": overlap,
    "launch": launch,
    "bench": bench,
}


def _protect_command(args: list[str]) -> list[str]:
    """Put `--` before the verb that `launch` runs, so that the options after it are that verb's and not launch's."""
    verb = next((i for i, a in enumerate(args[1:], 1) if a in _VERBS), None)
    return args if args[:1] != ["launch"] or verb is None or "--" in args else [*args[:verb], "--", *args[verb:]]


# verbs whose result is what they print
_PRINTING = {"eval", "generate", "chat", "report", "describe", "platforms", "plan", "overlap", "bench"}


def main(args: list[str] | None = None) -> None:
    """Run the command line. Raises `SystemExit` with an exit code other than 0 (see errors.py) if it does not succeed.

    Without `args` it is the program, and what it refuses ends the process at once: threads of a save that has failed may be
    waiting for minutes. One of several processes ends with the others, as JAX has it.
    """
    try:
        _run_forgiving(sys.argv[1:] if args is None else args)
    except Refused:
        if args is None and not _has_joined():
            os._exit(EXIT_BAD_INPUT)
        raise


def _has_joined() -> bool:
    """Whether this process is one of a run's several. Imports nothing: bad input is refused within a second."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _run_forgiving(args: list[str]) -> None:
    args = _protect_command(args)
    with forgiving_streams() as out:
        _run(args)
        out.flush()
        if out.lost is not None and set(args[:1]) <= _PRINTING:
            _fail(f"cannot write standard output: {out.lost.strerror}")


def _run(args: list[str]) -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(_VERBS, prog="dsv3", description=__doc__, args=args)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(os_error_line(error))
    except FailedElsewhere:
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("dsv3: stopped", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED) from None


def _fail(message: str) -> NoReturn:
    line = one_line(message)
    print(f"dsv3: error: {line}", file=sys.stderr)
    raise Refused(line)


if __name__ == "__main__":
    main()
