"""Hostile calls of the public functions and of ``torch.ops.attnkit.attend``: a typed error, or the right result.

A call starts as a valid one, and up to three of its arguments are made worse: another dtype, rank, size, stride,
device or layout, elements that overlap, memory that is not there, lengths that are not true, numbers and functions
that make no sense, damaged program text. What succeeds is compared with the equation in float64 where rounding leaves
something to compare (tests/fuzz/valid_calls.py). What fails must fail typed, or as one of `SCHEMA` before attnkit
sees the call. Inputs must not have changed.
"""

import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine
from attnkit.errors import CODES
from attnkit.testing import isolated

sys.path.insert(0, str(Path(__file__).parent))
from valid_calls import Called, compare, i32, of, randn, valid

Rng = np.random.Generator

# What torch's dispatcher says of arguments that do not fit the op's schema, before attnkit sees them.
SCHEMA = {
    "not of the schema": r"attnkit::attend\(\) (Expected a value of type|expected at most|is missing)|Unable to cast",
    "no kernel for such tensors": r"Could not run 'attnkit::attend' with arguments from the '\w+' backend",
    "text that is not UTF-8": r"surrogates not allowed",
}
# What Python says of a score or mask that takes other arguments.
ARITY = r"positional argument"


# --- making arguments worse ------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.uint8,
]  # fmt: skip
THINGS: list[Any] = [
    None,
    3,
    1.5,
    "x",
    [1.0],
    (),
    {},
    object(),
    b"q",
    np.ones((2, 2), np.float32)[::-1],
    torch.float32,
]
NUMBERS: list[Any] = [
    0, 0.0, -1.0, 1e-30, 1e30, 1e300, 5e-324, math.inf, -math.inf, math.nan, 10**400, "x", 1j, [1.0], True, None,
    np.float16(2), torch.tensor(0.5), 2**63,
]  # fmt: skip


def misaligned(t: Tensor) -> Tensor:
    memory = torch.frombuffer(
        bytearray(t.numel() * t.element_size() + 9), dtype=t.dtype, offset=1, count=t.numel()
    )
    return memory.view(t.shape)


def without_memory(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def overlapping(t: Tensor) -> Tensor:
    """Each row begins one element after the one before."""
    return torch.as_strided(t, [min(n, 4) for n in t.shape], [1] * t.dim()) if t.numel() >= 16 else t


def negative(t: Tensor) -> Tensor:
    return torch._neg_view(t) if t.is_floating_point() else t


class Sub(Tensor):
    pass


CHANGES: list[Callable[[Tensor], Any]] = [
    # of shape and stride
    lambda t: t[:1], lambda t: t[:, :1], lambda t: t[..., :3], lambda t: t[..., ::2], lambda t: t[:0], lambda t: t[..., :0],
    lambda t: t[0], lambda t: t[None], lambda t: t.flatten(), lambda t: t.mT, lambda t: t.transpose(0, 1), lambda t: t.flip(0),
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: t[..., :1].expand_as(t), lambda t: t[:1].expand_as(t),
    lambda t: t.unsqueeze(1), lambda t: t.repeat_interleave(2, -1)[..., ::2], overlapping, lambda t: t.new_zeros(()),
    lambda t: torch.cat([t, t], 0), lambda t: torch.cat([t, t], -1), lambda t: t[:1].expand(2**40, *t.shape[1:]),
    lambda t: t[:1, :1].expand(2**20, 2**20, *t.shape[2:]), lambda t: t[..., :1].expand(*t.shape[:-1], 2**40),
    lambda t: t[:, :, :1].expand(*t.shape[:2], 2**31, t.shape[3]), lambda t: t[:0].expand(0, *t.shape[1:-1], 2**40),
    # of memory and kind
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.to_sparse_csr(), misaligned, without_memory,
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    lambda t: torch._efficientzerotensor(t.shape), negative, lambda t: t.to(torch.complex64).conj(), lambda t: t.as_subclass(Sub),
    torch.nn.Parameter, lambda t: t.requires_grad_(), lambda t: t.numpy(), lambda t: t.tolist(),
    # of values
    lambda t: t * 1e19, lambda t: t * 1e-30, lambda t: torch.full_like(t, math.nan), lambda t: t / 0, lambda t: t * 0,
]  # fmt: skip


def worse_tensor(rng: Rng, t: Any) -> Any:
    how = rng.integers(8)
    if how == 0 or not isinstance(t, Tensor):
        return of(rng, THINGS)
    try:
        return t.to(of(rng, DTYPES)) if how == 1 else of(rng, CHANGES)(t)
    except (RuntimeError, IndexError, TypeError):  # a change that this tensor cannot have
        return of(rng, THINGS)


def worse_lengths(rng: Rng, called: Called) -> Any:
    n, kv = called.sizes.q_len, called.sizes.kv_len
    return of(rng, [
        None, i32(0, n), i32(0, kv), i32(kv), i32(-1, n), i32(n, 0), i32(0, n + 1), i32(2**31 - 1, -(2**31)), i32(), i32(0),
        i32(0, n, n), i32(0, n - 1, n, n - 1, n), torch.tensor([0, n]), torch.tensor([0.0, n]), i32(0, n).to("meta"),
        i32(0, n)[None], i32(0, 0, n, 0)[::2], i32(n).expand(2**40), i32(0).expand(3), misaligned(i32(0, n)), [0, n], 3, "x",
        i32(0, kv).requires_grad_ if rng.integers(2) else without_memory(i32(0, n)),
    ])  # fmt: skip


def worse_function(rng: Rng, called: Called) -> Any:
    t, ids = randn(rng, 3), torch.arange(called.sizes.kv_len)
    inner = [called.original[name] for name in "qkv"]
    return of(rng, [
        3, "x", t, lambda *_: None, lambda *_: True, lambda *_: 0.5, lambda *_: t, lambda *index: index[-1], lambda *index: 1 / 0,
        lambda *index: index[-1] <= index[-2], lambda *index: index[0] * 2, lambda *index: bool(index[0]), lambda *index: index,
        lambda *index: t[index[-1]], lambda *index: t[index[-1] + 2**31] > 0, lambda *index: index[-1] // index[-2],
        lambda *index: index[-1] * 2**40, lambda *index: torch.sort(index[0]), lambda *index: ids[index[-1] - 1] == 0,
        lambda *index: index[-1] % (index[-3] - 1) == 0, lambda *index: t[index[-1]][0], lambda *index: t.to("meta")[index[-1]],
        ak.bias(randn(rng, 2, 2)), ak.alibi(t), ak.document(ids[:2]), ak.prefix(ids), ak.softcap(ak.param("c")), ak.causal(),
        lambda *index: ak.attention(*inner).sum(), lambda *index: index[0].context,
        lambda *index: [index := (*index[:-1], index[-1] + 1) for _ in range(3000)][-1][-1] > 0,
    ])  # fmt: skip


def worse_text(rng: Rng, text: str) -> Any:
    if rng.integers(12) == 0:
        return of(
            rng,
            [
                None,
                3,
                "",
                "x" * 300_000,
                "attnkit 1",
                text * 2,
                text[::-1],
                "\ud800",
                "\0" + text,
                text.upper(),
                b"x",
            ],
        )
    tokens = re.findall(r"\w+|\s+|.", text)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(tokens)))
        odd = ["0", "-1", "2147483648", "1e999", "nan", "inf", "b0", "b9", "p0", "s", "q_idx", "kv_idx", "(", ")", "[", "]", "{",
               "}", "*", "//", "%", "<", "&", "f32", "i64", "bool", "bhsd", "packed", "mask", "score", "float", "where", "#", "é"]  # fmt: skip
        tokens[at] = of(rng, [of(rng, odd), of(rng, odd), of(rng, tokens), "", tokens[at] * 2])
    return "".join(tokens)


def worse_list(rng: Rng, items: Any) -> Any:
    items = list(items) if isinstance(items, (list, tuple)) else []
    how = rng.integers(5)
    if how == 0:
        return of(
            rng, [None, 3, "xy", {}, [None], [[1.0]], items * 2, [*items, 1.0], [*items, randn(rng, 2)]]
        )
    if not items:
        return [of(rng, [math.nan, 10**400, randn(rng, 1), "x"])]
    at = int(rng.integers(len(items)))
    items[at] = worse_tensor(rng, items[at]) if isinstance(items[at], Tensor) else of(rng, NUMBERS)
    return items if how > 1 else items[:-1]


def make_worse(rng: Rng, called: Called) -> str:
    """Change one argument; returns its name."""
    a = called.arguments
    name = of(
        rng, ["q", "k", "v", *a] + ([] if called.name == "op" else ["score", "mask", "scale", "lengths"])
    )
    kinds: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(("score", "mask"), lambda: worse_function(rng, called)),
        **dict.fromkeys(("scale", "softcap", "dropout_p"), lambda: of(rng, NUMBERS)),
        **dict.fromkeys(("buffers", "params"), lambda: worse_list(rng, called.original[name])),
        **dict.fromkeys(("causal", "is_causal", "need_lse", "seed"), lambda: of(rng, [None, True, 0, 2, "x", torch.tensor(1)])),
        "window": lambda: of(rng, [3, (1,), (1, 2, 3), ("a", 0), (1.5, None), (-2, 0), (math.nan, 0), (2**62, 0), (2**31, 3), [None, -1]]),
        "normalizer": lambda: of(rng, ["softmax", 3, ak.softmax(3), ak.softmax(worse_tensor(rng, randn(rng, called.sizes.heads)))]),
        "backend": lambda: of(rng, ["abacus", "", None, 3, [], "reference"]),
        "program": lambda: worse_text(rng, called.original["program"]),
    }  # fmt: skip
    if called.name == "sdpa" and name in ("score", "mask", "lengths"):
        name = of(rng, ["attn_mask", "dropout_p", "is_causal", "scale"])
    if name == "lengths" or name.startswith("cu_") or name == "kv_lens":
        name = of(rng, ["cu_seqlens_q", "cu_seqlens_kv", "kv_lens"])
        a[name] = worse_lengths(rng, called)
    else:
        a[name] = kinds[name]() if name in kinds else worse_tensor(rng, called.original.get(name))
    return name


# --- one case --------------------------------------------------------------------------------------------


def call(called: Called) -> Any:
    a = dict(called.arguments)
    if called.name == "op":
        return torch.ops.attnkit.attend(*a.values())
    if called.name == "sdpa":
        return ak.scaled_dot_product_attention(a.pop("q"), a.pop("k"), a.pop("v"), **a)
    function = ak.attention if called.name == "attention" else ak.dense_attention
    return function(a.pop("q"), a.pop("k"), a.pop("v"), return_lse=True, **a)


def memory_of(value: Any) -> list[bytes]:
    """The bytes behind every plain tensor among the arguments."""
    if isinstance(value, (list, tuple, dict)):
        members = value.values() if isinstance(value, dict) else value
        return [found for member in members for found in memory_of(member)]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return []
    if value.is_nested or value.is_quantized or value._is_zerotensor():
        return []
    storage = value.untyped_storage()
    return [torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes() if storage.nbytes() else b""]


def typed(error: ak.AttnkitError) -> str:
    assert error.code in CODES
    assert isinstance(error, CODES[error.code].error)
    assert str(error).startswith(f"{error.code}: {error.what}")
    return error.code


def others(error: Exception, called: Called) -> str | None:
    """Whose an untyped error is: of a score or mask itself, or of torch's dispatcher. None: nobody should see it."""
    if called.name == "op":
        return next((what for what, said in SCHEMA.items() if re.search(said, str(error))), None)
    raised = traceback.extract_tb(error.__traceback__)[-1]
    if (raised.filename, raised.name) == (__file__, "<lambda>") or re.search(ARITY, str(error)):
        return "the caller's own"
    return None


def ending_of(called: Called) -> str:
    try:
        result = call(called)
    except ak.AttnkitError as error:
        return typed(error)
    except Exception as error:
        if ending := others(error, called):
            return ending
        raise
    finally:
        torch.set_num_threads(1)
    return compare(called, result)


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        return f"{value.dtype} {shape} {value.device.type} {str(value.layout).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "".join(f"\n  {name}: {described(x)}" for name, x in value.items())
    return repr([described(x) for x in value] if isinstance(value, list) else value)[:1000]


def case(rng: Rng) -> str:
    warnings.simplefilter("ignore")
    called = valid(rng)
    worse = [make_worse(rng, called) for _ in range(of(rng, [0, 1, 1, 1, 1, 2, 3]))]
    before = memory_of(called.arguments)
    try:
        ending = ending_of(called)
    except Exception as error:
        raise AssertionError(f"{called.name} with worse {worse}:{described(called.arguments)}") from error
    assert memory_of(called.arguments) == before, f"{called.name} with worse {worse} changed its inputs"
    return ending if worse else f"valid, {ending}"


def run(seed: int, count: int, level: str) -> None:
    tally = isolated.run(__file__, seed=seed, count=count, environment={"ATTNKIT_ISA": level})
    assert tally["valid, right"] > count / 12, tally  # the generator makes what it means to
    assert tally["right"] > count / 12, tally  # much of what looks wrong is right
    endings = [ending for ending in tally if ending.startswith("AK")]
    assert sum(tally[ending] for ending in endings) > count / 5, tally
    assert len(endings) >= 20, tally


@pytest.mark.parametrize("level", _engine.isa_levels())
def test_hostile_calls(level: str, seed: int, effort: int) -> None:
    run(seed, 3000 * effort // len(_engine.isa_levels()), level)


@pytest.mark.slow
@pytest.mark.parametrize("level", _engine.isa_levels())
def test_a_hundred_thousand_hostile_calls(level: str, seed: int) -> None:
    run(seed + 1, 100_000 // len(_engine.isa_levels()) + 1, level)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _engine.set_poison(True)
    isolated.main(case)
