"""How the tests run: over all cores, from fixed seeds, and with one cache of compiled kernels for the whole run."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import register_random, settings

from functorch_ens.training import update as updates

# Examples have no deadline: the first call of a compiled function takes seconds. By default everyone draws the same
# examples at every run; `--hypothesis-profile=explore` draws new and more ones, and keeps those that failed.
settings.register_profile("project", deadline=None, max_examples=100, derandomize=True, database=None)
settings.register_profile(
    "explore", settings.get_profile("default"), deadline=None, max_examples=500, derandomize=False, print_blob=True
)
settings.load_profile("project")

_WORKER = "PYTEST_XDIST_WORKER" in os.environ


class _TorchRandom:
    """torch's generator, which hypothesis seeds before each example, so that a failing example fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()
register_random(_torch_random)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute a run of the whole suite over the cores; without pytest-xdist, or with `-n 0`, it runs in one process.

    A run of chosen files stays in one process too, since workers take longer to start than most files to run.
    """
    if not config.pluginmanager.hasplugin("xdist") or _WORKER:
        return
    if config.option.numprocesses is None and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.option.numprocesses = "logical"
        config.option.maxprocesses = config.option.maxprocesses or 8  # each worker takes 1.5 GB
    if config.option.numprocesses and config.option.dist == "no":
        # Tests in a row stay on one worker as long as both are busy, so most fixtures of modules are made once.
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Divide the cores among the workers, and give them, and the processes that tests start, one cache of kernels."""
    torch.manual_seed(0)  # for the models that files make while they are collected
    if _WORKER:
        threads = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="functorch_ens-kernels-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)
    # Inductor's pool of processes compiles Triton kernels, which no test has; each process that compiles starts one.
    os.environ.setdefault("TORCH_WARM_POOL", "0")


SLOW = tuple(line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#"))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow tests of the list, the tests of the compiler's folder, and those that compile by `oracle`.

    Without a GPU the tests on one are deselected.
    """
    if not torch.cuda.is_available():
        on_gpu = [item for item in items if item.get_closest_marker("cuda")]
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=on_gpu)
    for item in items:
        function = getattr(item, "obj", None)
        function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        if item.path.parent.name == "_compile" or not {"compile_whole", "compiler"}.isdisjoint(names):
            item.add_marker("compile")
        if any(item.nodeid.startswith(line) and item.nodeid[len(line) :][:1] in ("", *"[]-") for line in SLOW):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Every test starts from the same seed, with no compiled code of other tests, and leaves the level of the log."""
    torch.manual_seed(0)
    log = logging.getLogger("functorch_ens")
    level = log.level
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the reset would import the compiler
        torch.compiler.reset()
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def small_members_are_updated_in_parts() -> Iterator[None]:
    """Members of all sizes are updated in parts, as outside the tests only large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALL", 0)
        yield
