"""Shared fixtures. Compiled programs are kept between runs of the suite, in pytest's own cache directory."""

import gc
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import jax
import pytest
from jaxtyping import install_import_hook

from dsv3_jax.cluster.processes import give_threads

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SLOW_TIMEOUT_S = 1500  # of one test, setting up its environment not included; others have pyproject.toml's


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py, e.g. of NAME studies/chaos, as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config):
    """Settings that JAX needs before its backend starts; in the environment, so that tests' processes have them too."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(config.rootpath) / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    )
    # tracing makes millions of objects that stay: looking for garbage among them takes a third of its time
    gc.set_threshold(100_000, 50, 100)
    # most of the suite's time is compilation: without LLVM's optimisations a step's takes two thirds, its state's a quarter
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    # shapes in annotations are checked in every module whose arrays only come from our own code; entry points
    # (transformer, generate, batches) also take NumPy's arrays or lists, beartype knows no generic NamedTuple (Residual), and
    # a Codec's tests ask for numbers of bits that its own message refuses
    checked = [
        *(f"dsv3_jax.model.{name}" for name in ("attention", "layers", "moe", "rope", "router")),
        *(f"dsv3_jax.parallel.{name}" for name in ("collectives", "experts")),
        "dsv3_jax.exchange.wire",
        "pallas_kernels.gradient_codes", "pallas_kernels.scaled", "pallas_kernels.scaled_linear",
    ]  # fmt: skip
    install_import_hook(checked, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
    jax.config.update("jax_num_cpu_devices", 8)  # a test that wants one device says so by parallel.*, all 1 by default
    give_threads()


def _minutes(item: pytest.Item) -> float:
    """What a slow test's mark says that it takes."""
    marker = item.get_closest_marker("slow")
    return marker.kwargs.get("minutes", 0) if marker else 0


def pytest_collection_modifyitems(items):
    items.sort(key=_minutes, reverse=True)  # the longest first: at the end, no worker waits for one of them
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A few hundred short documents with words that repeat, enough to learn something from."""
    root = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "quietly",
        "judge",
        "my",
        "vow",
    ]
    for i in range(200):
        text = " ".join(words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(30 + i % 40))
        (root / f"{i:03d}.txt").write_text(f"document {i}: {text}.\n")
    return root


@pytest.fixture(scope="session")
def micro_overrides_in(corpus_dir):
    """Overrides of configs/tiny.yaml that train in seconds, with their data's cache in a directory.

    Without MTP, which takes half as long again to trace and compile: a test that is about it, or whole runs, turns it on.
    """
    return lambda directory: [
        "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16",
        "model.num_hidden_layers=3", "model.num_attention_heads=2", "model.q_lora_rank=16", "model.kv_lora_rank=16",
        "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.n_routed_experts=8",
        "model.num_nextn_predict_layers=0", "data.seq_len=32", "data.batch_size=4", f"data.path={corpus_dir}/*.txt",
        f"data.cache_dir={directory}/cache",
        "train.steps=6", "train.eval_every=3", "train.eval_batches=2", "optim.warmup_steps=2",
    ]  # fmt: skip


@pytest.fixture
def micro_overrides(micro_overrides_in, tmp_path) -> list[str]:
    return micro_overrides_in(tmp_path)
