"""Kernels under Triton's interpreter, on tensors of the CPU, against the float64 oracle.

Collected only where ``TRITON_INTERPRET`` is set before Triton is imported: `tests/kernels/test_interpreter.py` runs these
files so, each in a process of its own.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from attnkit import backends, testing
from attnkit.backends.triton.kernel import TritonKernel
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.spec import KernelSpec
from attnkit.testing.floats import rounded
from attnkit.tune import default_config

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]

# Few, large tiles: a step of the interpreter costs the same for all of them.
CONFIG = {"tile_q": 128, "tile_kv": 64, "decode_tile_q": 16, "decode_tile_kv": 64, "split_kv": 64}


def pytest_configure(config: pytest.Config) -> None:
    """What Triton's interpreter says of itself under numpy."""
    for said in ("Conversion of an array with ndim:DeprecationWarning", "All-NaN slice:RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{said}")


def kernel_of(
    traced: Traceable, q: Any, v: Any, config: dict[str, int]
) -> tuple[TritonKernel, list[Any], list[float]]:
    """The kernel that a GPU would run, its buffers and params."""
    text, buffers, params = bind(traced, q)
    dtype = str(q.dtype).removeprefix("torch.")
    spec = KernelSpec(parse(text), dtype, q.shape[3], v.shape[3], "cuda")
    backend = backends.get("triton")
    assert backend.supports(spec) == ()
    kernel = backend.build(spec, default_config(backend.space(spec)) | CONFIG | config)
    assert isinstance(kernel, TritonKernel)
    return kernel, list(buffers), [p.current() for p in params]


@pytest.fixture(autouse=True)
def _numpy_is_quiet() -> Iterator[None]:
    """The interpreter computes with numpy, where infinities are worth a warning."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def build() -> Callable[..., tuple[TritonKernel, list[Any], list[float]]]:
    """`kernel_of`."""
    return kernel_of


@pytest.fixture
def compare() -> Callable[..., testing.Measured]:
    """``compare(q, k, v, oracle={...}, config={...}, **fields of Traceable)``: o and lse against both gates."""

    def run(
        q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, config: dict[str, int] | None = None,
        dtype: str = "float32", mostly_dead: bool = False, score: Any = None, mask: Any = None, **fields: Any,
    ) -> testing.Measured:  # fmt: skip
        arrays = [rounded(x, dtype) for x in (q, k, v)] if dtype != "float32" else [q, k, v]
        tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]
        kernel, buffers, params = kernel_of(
            Traceable(score, mask, **fields), tensors[0], tensors[2], config or {}
        )
        o = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=tensors[0].dtype)
        lse = torch.full(q.shape[:3], float("nan"))
        kernel(*tensors, o, lse, buffers, params)
        expected = testing.attention(*arrays, dtype=dtype, **(oracle or {}))
        return testing.check(
            o.float().numpy(), lse.numpy(), expected, kernel="interpreted", mostly_dead=mostly_dead
        )

    return run
