"""Kernels under Triton's interpreter, on tensors of the CPU, against the float64 oracle.

Collected only where ``TRITON_INTERPRET`` is set before Triton is imported: `tests/kernels/test_interpreter.py` runs these
files so, each in a process of its own.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

from attnkit import backends, testing
from attnkit.backends.triton.kernel import TritonKernel
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims
from attnkit.testing.floats import rounded
from attnkit.tune import default_config
from attnkit.variants import kv_quant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*.py"]

# Few, large tiles: a step of the interpreter costs the same for all of them.
CONFIG = {"tile_q": 128, "tile_kv": 64, "decode_tile_q": 16, "decode_tile_kv": 64, "split_kv": 64}


def pytest_configure(config: pytest.Config) -> None:
    """What Triton's interpreter says of itself under numpy, and what takes most of its time."""
    for said in ("Conversion of an array with ndim:DeprecationWarning", "All-NaN slice:RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{said}")
    if INTERPRETED:
        _remember()


def _remember() -> None:
    """Once what Triton's interpreter does at every step: types, shapes and the functions of its language stay the same."""
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    # Every sum of int32 a second time, in int64: shapes here are too small for one that overflows.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    # The language, for each call of a function: nothing in these processes needs the other one back.
    anything = FunctionType(_remember.__code__, {"tl": language, "core": core})
    interpreter._patch_lang(anything)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()

    dtype_of = cache(interpreter._get_np_dtype)
    pointers = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda type: pointers if type.scalar.is_ptr() else dtype_of(type.scalar)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes(*(type.shape if type.is_block() else ()))

    @cache
    def shapes(*sizes: int) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))

    def block(self: Any, element: Any, shape: Any) -> None:
        key = (id(element), *(getattr(n, "value", n) for n in shape))
        if key not in blocks:
            make_block(self, element, shape)
            blocks[key] = self.__dict__.copy()  # holds the element: its id stays its own
        self.__dict__.update(blocks[key])

    blocks: dict[Any, dict[str, Any]] = {}
    make_block = core.block_type.__init__
    core.tensor.__init__, core.block_type.__init__ = tensor, block


def _gallery() -> Any:
    """The variants of tests/conformance, each with its equation for the oracle."""
    path = Path(__file__).parents[2] / "conformance/test_modifiers.py"
    spec = importlib.util.spec_from_file_location("gallery_of_modifiers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GALLERY = _gallery()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``variant`` runs for every one of them."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", GALLERY.VARIANTS)


@pytest.fixture
def gallery(rng: np.random.Generator) -> Callable[[str, Dims], tuple[dict[str, Any], dict[str, Any]]]:
    """A variant's keywords for the oracle, and its fields of `Traceable`."""

    def find(name: str, dims: Dims) -> tuple[dict[str, Any], dict[str, Any]]:
        variant = GALLERY.VARIANTS[name](rng, dims)
        fields = dict(variant.mods or variant.plain)
        weighting = fields.pop("normalizer", None)
        return variant.oracle, fields | ({} if weighting is None else {"sink": weighting.sink})

    return find


def kernel_of(
    traced: Traceable, q: Any, v: Any, config: dict[str, int], int8: bool = False
) -> tuple[TritonKernel, list[Any], list[float]]:
    """The kernel that a GPU would run, its buffers and params; ``int8``: of keys and values that are codes."""
    text, buffers, params = bind(traced, q)
    if int8:
        text = re.sub(r"\b([kv]: \w+(\[[^]]*\])?)", r"\1 int8(token, 0)", text)
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


def encoded(x: Any) -> tuple[Any, Any, Any]:
    """Codes, a scale for each row in bfloat16, and what they mean: by the variant's equation."""
    found = kv_quant.quantise(x, kv_quant.INT8)
    scales = torch.from_numpy(found.scale[..., 0].astype(np.float32)).bfloat16()
    means = kv_quant.decode(found, kv_quant.INT8).astype(np.float32)
    return torch.from_numpy(found.codes), scales, means


@pytest.fixture
def encode() -> Callable[[Any], tuple[Any, Any, Any]]:
    """`encoded`."""
    return encoded


@pytest.fixture
def compare() -> Callable[..., testing.Measured]:
    """``compare(q, k, v, oracle={...}, config={...}, **fields of Traceable)``: o and lse against both gates.

    ``int8``: k and v are quantised first, and the oracle is given what their codes mean.
    """

    def run(
        q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, config: dict[str, int] | None = None,
        dtype: str = "float32", mostly_dead: bool = False, int8: bool = False, score: Any = None, mask: Any = None, **fields: Any,
    ) -> testing.Measured:  # fmt: skip
        arrays = [rounded(x, dtype) for x in (q, k, v)] if dtype != "float32" else [q, k, v]
        tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]
        traced = Traceable(score, mask, **fields)
        kernel, buffers, params = kernel_of(traced, tensors[0], tensors[2], config or {}, int8)
        beside: dict[str, Any] = {}
        if int8:
            codes, scales, arrays[1:] = zip(*(encoded(x) for x in arrays[1:]), strict=True)
            tensors[1:] = codes
            beside = dict(zip(("k_scales", "v_scales"), scales, strict=True))
        o = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=tensors[0].dtype)
        lse = torch.full(q.shape[:3], float("nan"))
        kernel(*tensors, o, lse, buffers, params, beside=beside)
        expected = testing.attention(*arrays, dtype=dtype, **(oracle or {}))
        return testing.check(
            o.float().numpy(), lse.numpy(), expected, kernel="interpreted", mostly_dead=mostly_dead
        )

    return run
