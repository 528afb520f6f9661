"""What every test shares: a printed seed, counted skips, poisoned workspaces, one run per instruction set."""

import gc
import importlib.util
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

# Spinning threads of several test processes would wait for each other's time slices. Read once, when OpenMP and numpy's
# BLAS load, whose threads spin on for a while after every product: half the time of a comparison with the oracle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

# What somebody has tuned on this machine decides no test.
os.environ.setdefault("ATTNKIT_TUNE", "off")

SEED = int(os.environ.get("ATTNKIT_TEST_SEED", "20240229"))
THREADS = 2

# The ordinary run repeats itself exactly; `make fuzz` looks for something new, and prints how to replay it.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, print_blob=True, derandomize=False, max_examples=5000
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-skips", type=int, default=None, help="fail when more tests are skipped, gpu tests apart"
    )


def pytest_report_header() -> str:
    return f"ATTNKIT_TEST_SEED={SEED}"


# Whole files that are lines of an issue's "Shows"; single tests carry the marker themselves.
SHOWS = ("tests/conformance/", "tests/laws/", "tests/robust/", "tests/fuzz/", "tests/ops/test_attend_op.py")


PEERS = ("openvino", "onnxruntime", "onnx", "ggml", "zentorch")  # modules of the extra `peers`


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SHOWS):
            item.add_marker("shows")
        if item.nodeid.startswith("tests/fuzz/"):
            item.add_marker("fuzz")
    if not all(map(importlib.util.find_spec, PEERS)):
        absent = [item for item in items if item.get_closest_marker("peers")]
        if absent:
            config.hook.pytest_deselected(items=absent)
            items[:] = [item for item in items if item not in absent]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish() -> None:
    """Look for garbage less often, and not among what was imported: with torch's compiler, a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("isa", "isa_name"):
        if name not in metafunc.fixturenames:
            continue
        engine = _engine()
        assert engine is not None, "attnkit._engine is not built: run `make dev`"
        metafunc.parametrize(name, engine.isa_levels(), indirect=name == "isa")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what did not run and why: a suite that is silently skipped must not look green."""
    counted = Counter(_skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    deselected = len(terminalreporter.stats.get("deselected", []))
    terminalreporter.section("not run")
    terminalreporter.line(f"skipped {counted.total()}, deselected {deselected} (seed {SEED})")
    for reason, count in counted.most_common():
        terminalreporter.line(f"  {count:5d} x {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    limit = session.config.getoption("--max-skips")
    reporter: Any = session.config.pluginmanager.getplugin("terminalreporter")
    if limit is None or reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if "gpu" not in report.keywords]
    if len(skipped) > limit and session.exitstatus == pytest.ExitCode.OK:
        reporter.line(f"\n{len(skipped)} tests skipped, {limit} allowed", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of this test's own: the same numbers whichever other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def seed() -> int:
    """For what makes its own generators, perhaps in another process."""
    return SEED


@pytest.fixture(scope="session")
def effort() -> int:
    """How many times more of random cases than in the ordinary run; `make fuzz` asks for more."""
    return max(hypothesis.settings().max_examples // 100, 1)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_workspaces() -> None:
    """Engine workspaces start full of NaN, so that a read of what was never written shows."""
    engine = _engine()
    if engine is not None:
        engine.set_poison(True)


@pytest.fixture(autouse=True)
def _torch_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch's own random numbers are the same for a test whichever others run; a test may set its number of threads."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction set level of this machine, and prove that the level ran.

    A test that runs a level in another process takes ``isa_name``, the name alone, and proves it there.
    """
    engine = _engine()
    name: str = request.param
    before = engine.current_isa()
    _set_isa(engine, name)
    try:
        yield name
        assert engine.last_isa() == name, f"asked for {name}, ran {engine.last_isa() or 'nothing'}"
    finally:
        _set_isa(engine, before)


@pytest.fixture
def each_isa() -> Iterator[Callable[[], Iterator[str]]]:
    """``for _ in each_isa():`` runs at every level, where what is expected takes longer than the engine."""
    engine = _engine()
    before = engine.current_isa()

    def levels() -> Iterator[str]:
        for name in engine.isa_levels():
            _set_isa(engine, name)
            yield name
            assert engine.last_isa() == name, f"asked for {name}, ran {engine.last_isa() or 'nothing'}"

    try:
        yield levels
    finally:
        _set_isa(engine, before)


def _set_isa(engine: Any, name: str) -> None:
    """Another level's default tiles are others: no kernel that was prepared for one is met at another."""
    if name == engine.current_isa():
        return
    from attnkit import runtime

    engine.set_isa(name)
    runtime.clear()


def _engine() -> Any:
    """The compiled engine, or None where it is not built; torch goes first, so that both share one libgomp."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(THREADS)
    if importlib.util.find_spec("attnkit._engine") is None:
        return None
    return importlib.import_module("attnkit._engine")


def _has_gpu() -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _skip_reason(report: Any) -> str:
    longrepr = report.longrepr
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
