"""Hostile calls: whatever they are given, what goes wrong goes wrong as a typed error."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import attnkit as ak
import attnkit.ops  # defines torch.ops.attnkit
from attnkit.errors import CODES
from attnkit.testing import strategies

B, H, HKV, S, D = 2, 4, 2, 6, 8
MANY = settings(max_examples=3 * settings().max_examples)  # of the profile: `make fuzz` asks for more


def rand(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SINK = torch.zeros(H)
BLOCKS = torch.ones(2, 2, dtype=torch.bool)
Q, K, V = rand(B, H, S, D), rand(B, HKV, S, D), rand(B, HKV, S, D)


def op(text: str, buffers: Sequence[Tensor] = (), params: Sequence[float] = ()) -> Any:
    return torch.ops.attnkit.attend(Q[:1], K[:1], V[:1], text, list(buffers), list(params), None, True)


@contextlib.contextmanager
def typed_errors_alone() -> Iterator[None]:
    """Whatever goes wrong inside goes wrong as an AttnkitError."""
    try:
        yield
    except ak.AttnkitError as error:
        known = error.code in CODES and str(error).startswith(error.code)
        if not known:
            raise


def survives(call: Callable[[], Any], dropout_p: Any = 0.0) -> None:
    """A typed error, or a result: a weighted mean of values, so it cannot leave their range, or that of kept ones."""
    kept = 1 - dropout_p if isinstance(dropout_p, float) and 0 < dropout_p < 1 else 1.0
    result = "an error"
    with typed_errors_alone():
        result = call()
    if isinstance(result, str):
        return
    o = result[0] if isinstance(result, tuple) else result
    if o.device.type == "cpu":
        assert o.isfinite().all()
        assert o.numel() == 0 or o.abs().max() <= 1.00001 / kept


ODD_DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
ODD_THINGS = [None, 3, 1.5, "x", [1.0], np.ones((2, 2), np.float32), object()]


def changes(base: Tensor) -> st.SearchStrategy[Any]:
    """Mostly the tensor itself; else one of another dtype, device, rank, size, stride or layout, or no tensor."""
    views = [
        base, base, base, base, base[:1], base[:, :1], base[:, :3], base[:, :, :1], base[..., :3], base[:0], base[:, :0],
        base[:, :, :0], base[..., :0], base[0], base[None], base.mT, base.flip(0), base[:, :, ::2], base[:, :1].expand_as(base),
        base.transpose(1, 2), base.transpose(0, 1), torch.tensor(1.0), base.flatten(), base.to("meta"), base.to_sparse(),
        torch.nn.Parameter(base, requires_grad=False),
    ]  # fmt: skip
    return st.one_of(
        st.sampled_from(views),
        st.just(base),
        st.just(base),
        st.sampled_from(ODD_DTYPES).map(base.to),
        st.sampled_from(ODD_THINGS),
    )


LENGTHS = [
    None, i32(S, S), i32(0, S), i32(0, 3), i32(0, 2, S), i32(-1, S), i32(S, 0), i32(0, S + 1), i32(2**31 - 1, -(2**31)), i32(), i32(S),
    i32(0), torch.tensor([0, S]), torch.tensor([0.0, S]), i32(0, S).to("meta"), i32(0, S)[None], i32(0, 0, S, 0)[::2], [0, S], 3,
]  # fmt: skip
NUMBERS = [
    None,
    1.0,
    0.5,
    2,
    True,
    0,
    0.0,
    -1.0,
    1e-30,
    1e30,
    math.inf,
    -math.inf,
    math.nan,
    10**400,
    "x",
    1j,
    [1.0],
    torch.tensor(0.5),
]
MODS: list[Any] = [
    None, 3, "x", rand(S, S), lambda *_: None, lambda *_: True, lambda *_: 0.5, lambda *_: rand(S), lambda *index: index[-1],
    lambda *index: index[-1] <= index[-2], lambda *index: index[0] * 2, lambda *index: bool(index[0]), lambda *index: index,
    lambda *index: rand(S, S)[index[-2], index[-1]], lambda *index: rand(S)[index[-1] + 1], lambda *index: SINK[index[-3]] > 0,
    lambda *index: index[-1] // index[-2], lambda *index: index[-1] * 2**40, lambda *index: torch.sort(index[0]),
]  # fmt: skip
SCORES = [
    *MODS, ak.bias(rand(S, S)), ak.alibi(SINK), ak.softcap(3.0), ak.alibi(torch.ones(1)), ak.bias(rand(B, 1, 1, S)),
    ak.alibi(SINK.double()), ak.bias(rand(S, S).to("meta")),
]  # fmt: skip
MASKS = [
    *MODS,
    ak.causal(),
    ak.document(i32(0, 0, 1, 1, 2, 2)),
    ak.prefix(3),
    ak.window(1, None),
    ak.document(torch.ones(S).bool()),
]
KEYWORDS: dict[str, list[Any]] = {
    "score": SCORES, "mask": MASKS, "scale": NUMBERS, "dropout_p": [0.0, 0.0, *NUMBERS], "kv_lens": LENGTHS,
    "cu_seqlens_q": LENGTHS, "cu_seqlens_kv": LENGTHS, "return_lse": [True, False],
}  # fmt: skip
OWN: dict[str, list[Any]] = {
    "normalizer": [None, ak.softmax(), ak.softmax(SINK), ak.softmax(SINK[:2]), ak.softmax(SINK.to("meta")), ak.softmax(3), "softmax"],
    "backend": ["auto", "cpu", "reference", "abacus", "", None, 3], "select": [None, 3],
    "block_mask": [None, 3, BLOCKS, ak.block_mask(ak.causal(), 1, 1, S, S), ak.block_mask(None, B, H, S, S), ak.block_mask(None, 1, 1, 2, S)],
}  # fmt: skip
DENSE: dict[str, list[Any]] = {
    "causal": [True, False], "softcap": NUMBERS, "sink": [None, SINK, SINK[:3], SINK[::2], SINK.int(), SINK.to("meta"), 3, [0.0]],
    "window": [None, (1, 0), [None, -1], (0, 0), 3, (1,), (1, 2, 3), ("a", 0), (1.5, None), (-2, 0), (math.nan, 0), (2**62, 0), (2**31, 3)],
    "alibi_slopes": [None, SINK, torch.ones(1), torch.ones(B, H), SINK[:3], SINK.double(), SINK.int(), SINK.to("meta"), rand(1, 1, 1), 3],
}  # fmt: skip


def keywords(*tables: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A few keywords at a time: a call with everything wrong shows only the first error."""
    one = [
        st.tuples(st.just(name), st.sampled_from(values))
        for table in tables
        for name, values in table.items()
    ]
    return st.lists(st.one_of(*one), max_size=3).map(dict)


@MANY
@given(changes(Q), changes(K), changes(V), keywords(KEYWORDS, OWN))
def test_hostile_attention(q: Any, k: Any, v: Any, chosen: dict[str, Any]) -> None:
    survives(lambda: ak.attention(q, k, v, **chosen), chosen.get("dropout_p"))


@MANY
@given(keywords(KEYWORDS, OWN))
def test_hostile_keywords(chosen: dict[str, Any]) -> None:
    survives(lambda: ak.attention(Q, K, V, **chosen), chosen.get("dropout_p"))
    survives(
        lambda: ak.attention(
            Q[:1], K[:1], V[:1], **{"cu_seqlens_q": i32(0, S), "cu_seqlens_kv": i32(0, S), **chosen}
        ),
        chosen.get("dropout_p"),
    )


@MANY
@given(keywords(KEYWORDS, DENSE))
def test_hostile_dense_attention(chosen: dict[str, Any]) -> None:
    survives(lambda: ak.dense_attention(Q, K, V, **chosen), chosen.get("dropout_p"))


SDPA_MASKS = [
    None,
    rand(S, S),
    rand(S, S) > 0,
    rand(1, S),
    rand(S),
    rand(B, 1, S, S),
    rand(S + 1, S),
    rand(S, S).int(),
    rand(S, S).to("meta"),
    3,
]


@MANY
@given(
    changes(Q),
    changes(Q),
    changes(Q),
    st.sampled_from(SDPA_MASKS),
    keywords({"dropout_p": NUMBERS, "scale": NUMBERS, "is_causal": [True, False]}),
)
def test_hostile_sdpa(q: Any, k: Any, v: Any, mask: Any, chosen: dict[str, Any]) -> None:
    survives(lambda: ak.scaled_dot_product_attention(q, k, v, mask, **chosen), chosen.get("dropout_p"))


TENSORS = [
    SINK, SINK.double(), SINK.half(), SINK[0], rand(S, S), rand(S, S).mT, rand(1, 1, 1, 1, 1), rand(0), i32(0, S), i32(S, S), i32(3),
    torch.arange(S), torch.arange(S) > 2, SINK.to("meta"), rand(H, S, S)[:, ::2], SINK[:1].expand(H),
]  # fmt: skip


@MANY
@given(strategies.programs(max_ops=8), st.data())
def test_hostile_bindings(drawn: Any, data: st.DataObject) -> None:
    """Any program with any buffers: of its number or not, of its types or not."""
    n = data.draw(st.one_of(st.just(len(drawn.buffers)), st.integers(0, 4)))
    buffers = [
        data.draw(st.one_of(fitting(declared), st.sampled_from(TENSORS))) for declared in drawn.buffers[:n]
    ]
    buffers += [SINK] * (n - len(buffers))
    params = [1.0] * data.draw(st.one_of(st.just(drawn.num_params), st.integers(0, 3)))
    with typed_errors_alone():
        op(drawn.text, buffers, params)


def fitting(declared: Any) -> st.SearchStrategy[Tensor]:
    """Tensors of a declared type; lengths among them."""
    dtype = {"f32": torch.float32, "i32": torch.int32, "i64": torch.int64, "bool": torch.bool}[declared.dtype]
    made = [
        torch.full((n,) * declared.rank, 3.0).to(dtype) for n in (0, 1, S, 300) if n**declared.rank <= 100_000
    ]
    return st.sampled_from(
        made + ([i32(0, S), i32(S)] if (declared.dtype, declared.rank) == ("i32", 1) else [])
    )


@MANY
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda b: b.decode("latin-1"))))
def test_garbage_as_a_program(text: str) -> None:
    with pytest.raises((ak.AttnkitError, UnicodeEncodeError)):  # lone surrogates do not even reach the op
        op(text)


@MANY
@given(strategies.programs(max_ops=8), st.data())
def test_damaged_programs(drawn: Any, data: st.DataObject) -> None:
    """One edit to a valid program, as a torn file has it: a typed error, or a program that binds or does not."""
    text = drawn.text
    at = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 3))
    text = (
        text[:at]
        + data.draw(st.text("(){}[],:=+-*/<>&|~ \n.0123456789abskqtvhof_", max_size=3))
        + text[at + length :]
    )
    with typed_errors_alone():
        op(text)
