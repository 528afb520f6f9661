"""Every named modifier, as a plain Python function and as attnkit's own, equals its equation in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit.testing import Dims, Pairs, qkv

SHAPES = {"square": (70, 70), "long_kv": (33, 140), "long_q": (140, 33)}


@dataclass
class Variant:
    """One attention, said three times: for the oracle, as plain Python functions, and with attnkit's mods."""

    oracle: dict[str, Any]
    plain: dict[str, Any] = field(default_factory=dict)
    mods: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Callable[[np.random.Generator, Dims], Variant]] = {}


def variant(function: Callable[[np.random.Generator, Dims], Variant]) -> None:
    VARIANTS[function.__name__] = function


def slopes_of(rng: np.random.Generator, *shape: int) -> Any:
    return rng.uniform(0.01, 0.5, shape).astype(np.float32)


def distance(p: Pairs, dtype: Any) -> Any:
    return abs(p.position - p.kv_idx).astype(dtype)


# --- scores -----------------------------------------------------------------------------------------------


@variant
def plain_attention(rng: np.random.Generator, n: Dims) -> Variant:
    return Variant({}, {"score": lambda s, b, h, q_idx, kv_idx: s}, {"normalizer": ak.softmax()})


@variant
def scale(rng: np.random.Generator, n: Dims) -> Variant:
    return Variant({"scale": 0.3}, {"scale": 0.3})


@variant
def alibi(rng: np.random.Generator, n: Dims) -> Variant:
    slopes, offset = slopes_of(rng, n.q_heads), n.kv_len - n.q_len
    tensor = torch.from_numpy(slopes)

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s - tensor[h] * (q_idx + offset - kv_idx).abs()

    def oracle(s: Any, p: Pairs) -> Any:
        return s - slopes[p.h] * distance(p, s.dtype)

    return Variant({"score": oracle}, {"score": score}, {"score": ak.alibi(tensor)})


@variant
def alibi_per_batch(rng: np.random.Generator, n: Dims) -> Variant:
    slopes, offset = slopes_of(rng, n.batch, n.q_heads), n.kv_len - n.q_len
    tensor = torch.from_numpy(slopes)

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s - tensor[b, h] * torch.abs(q_idx + offset - kv_idx)

    def oracle(s: Any, p: Pairs) -> Any:
        return s - slopes[p.b, p.h] * distance(p, s.dtype)

    return Variant({"score": oracle}, {"score": score}, {"score": ak.alibi(tensor)})


@variant
def slope_with_sign(rng: np.random.Generator, n: Dims) -> Variant:
    """What grows with the key's place, and a gain: sums of products in all their orders."""
    slopes, gains = slopes_of(rng, n.q_heads), 1 + slopes_of(rng, n.q_heads)
    slope, gain = torch.from_numpy(slopes), torch.from_numpy(gains)

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        x = (kv_idx - q_idx) * slope[h] + (s * gain[h] + 1.0)
        return (1.0 - gain[h] * x) - 0.0078125 * (kv_idx - 2 * q_idx)

    def oracle(s: Any, p: Pairs) -> Any:
        x = slopes[p.h] * (p.kv_idx - p.q_idx) + s * gains[p.h] + 1
        return 1 - gains[p.h] * x - 0.0078125 * (p.kv_idx - 2 * p.q_idx)

    return Variant({"score": oracle}, {"score": score})


@variant
def softcap(rng: np.random.Generator, n: Dims) -> Variant:
    return Variant(
        {"score": lambda s, p: 2 * np.tanh(s / 2)},
        {"score": lambda s, b, h, q_idx, kv_idx: 2.0 * torch.tanh(s / 2.0)},
        {"score": ak.softcap(2.0)},
    )


@variant
def softcap_param(rng: np.random.Generator, n: Dims) -> Variant:
    cap = ak.param("cap", 3.0)
    return Variant(
        {"score": lambda s, p: 3 * np.tanh(s / 3)},
        {"score": lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap)},
        {"score": ak.softcap(cap)},
    )


@variant
def relative_bias(rng: np.random.Generator, n: Dims) -> Variant:
    """T5's: a bias for every distance. The table holds every distance there is."""
    table = rng.standard_normal((n.q_heads, n.q_len + n.kv_len - 1)).astype(np.float32)
    tensor, last = torch.from_numpy(table), n.q_len - 1

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s + tensor[h, kv_idx - q_idx + last]

    return Variant({"score": lambda s, p: s + table[p.h, p.kv_idx - p.q_idx + last]}, {"score": score})


def _full_bias(*shape: str) -> Callable[[np.random.Generator, Dims], Variant]:
    def build(rng: np.random.Generator, n: Dims) -> Variant:
        sizes = {"1": 1, "b": n.batch, "h": n.q_heads, "q": n.q_len, "kv": n.kv_len}
        table = 3 * rng.standard_normal([sizes[d] for d in shape]).astype(np.float32)
        tensor = torch.from_numpy(table)
        full = np.broadcast_to(table, (n.batch, n.q_heads, n.q_len, n.kv_len))
        wide = tensor.expand(full.shape)

        def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return s + wide[b, h, q_idx, kv_idx]

        return Variant(
            {"score": lambda s, p: s + full[p.b, p.h]}, {"score": score}, {"score": ak.bias(tensor)}
        )

    return build


VARIANTS["bias_2d"] = _full_bias("q", "kv")
VARIANTS["bias_3d"] = _full_bias("h", "q", "kv")
VARIANTS["bias_4d"] = _full_bias("b", "h", "q", "kv")
VARIANTS["bias_4d_broadcast"] = _full_bias("b", "1", "1", "kv")
VARIANTS["bias_rows"] = _full_bias("h", "q", "1")


@variant
def softcap_alibi_bias(rng: np.random.Generator, n: Dims) -> Variant:
    """In the order that design fixes: cap, then what is added."""
    slopes = slopes_of(rng, n.q_heads)
    table = rng.standard_normal((n.q_len, n.kv_len)).astype(np.float32)
    slope, bias, offset = torch.from_numpy(slopes), torch.from_numpy(table), n.kv_len - n.q_len

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 5.0 * torch.tanh(s / 5.0) - slope[h] * (q_idx + offset - kv_idx).abs() + bias[q_idx, kv_idx]

    def mods(s: Any, *index: Any) -> Any:
        return ak.bias(bias)(ak.alibi(slope)(ak.softcap(5.0)(s, *index), *index), *index)

    def oracle(s: Any, p: Pairs) -> Any:
        return 5 * np.tanh(s / 5) - slopes[p.h] * distance(p, s.dtype) + table

    return Variant({"score": oracle}, {"score": score}, {"score": mods})


@variant
def masked_by_score(rng: np.random.Generator, n: Dims) -> Variant:
    """The old way to mask: a score of -inf has weight 0, and a row of them sees nothing."""
    minus_infinity = float("-inf")

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(q_idx >= kv_idx + 3, s, minus_infinity)

    return Variant({"score": lambda s, p: np.where(p.q_idx >= p.kv_idx + 3, s, -np.inf)}, {"score": score})


@variant
def sink(rng: np.random.Generator, n: Dims) -> Variant:
    logits = rng.standard_normal(n.q_heads).astype(np.float32)
    logits[0] = 12  # larger than any score
    return Variant({"sink": logits}, {"normalizer": ak.softmax(torch.from_numpy(logits))})


@variant
def sink_and_dead_rows(rng: np.random.Generator, n: Dims) -> Variant:
    logits = rng.standard_normal(n.q_heads).astype(np.float32)
    return Variant(
        {"sink": logits, "mask": lambda p: p.kv_idx < p.q_idx - 20},
        {
            "normalizer": ak.softmax(torch.from_numpy(logits)),
            "mask": lambda b, h, q_idx, kv_idx: kv_idx < q_idx - 20,
        },
    )


# --- masks ------------------------------------------------------------------------------------------------


@variant
def causal_bottom_right(rng: np.random.Generator, n: Dims) -> Variant:
    offset = n.kv_len - n.q_len
    return Variant(
        {"mask": lambda p: p.kv_idx <= p.position},
        {"mask": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset},
        {"mask": ak.causal()},
    )


@variant
def causal_top_left(rng: np.random.Generator, n: Dims) -> Variant:
    return Variant(
        {"mask": lambda p: p.kv_idx <= p.q_idx},
        {"mask": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx},
        {"mask": ak.causal("top_left")},
    )


def _window(left: int | None, right: int | None) -> Callable[[np.random.Generator, Dims], Variant]:
    def build(rng: np.random.Generator, n: Dims) -> Variant:
        offset = n.kv_len - n.q_len
        low = -(10**6) if left in (None, -1) else -left  # type: ignore[operator]
        high = 10**6 if right in (None, -1) else right

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            ahead = kv_idx - (q_idx + offset)
            return (ahead >= low) & (ahead <= high)

        def oracle(p: Pairs) -> Any:
            return (p.kv_idx - p.position >= low) & (p.kv_idx - p.position <= high)

        return Variant({"mask": oracle}, {"mask": mask}, {"mask": ak.window(left, right)})

    return build


VARIANTS["window_7_0"] = _window(7, 0)
VARIANTS["window_20_9"] = _window(20, 9)
VARIANTS["window_left_only"] = _window(15, None)
VARIANTS["window_right_only"] = _window(-1, 4)
VARIANTS["window_unbounded"] = _window(None, None)


@variant
def prefix_int(rng: np.random.Generator, n: Dims) -> Variant:
    return Variant(
        {"mask": lambda p: p.kv_idx < 19},
        {"mask": lambda b, h, q_idx, kv_idx: kv_idx < 19},
        {"mask": ak.prefix(19)},
    )


@variant
def prefix_per_batch(rng: np.random.Generator, n: Dims) -> Variant:
    lengths = rng.integers(1, n.kv_len + 1, n.batch).astype(np.int32)
    tensor = torch.from_numpy(lengths)
    return Variant(
        {"mask": lambda p: p.kv_idx < lengths[p.b]},
        {"mask": lambda b, h, q_idx, kv_idx: kv_idx < tensor[b]},
        {"mask": ak.prefix(tensor)},
    )


def _document_ids(rng: np.random.Generator, n: Dims, *batch: int) -> tuple[Any, Any]:
    """Three documents, sorted as in a packed batch; int64 and int32 ids both happen."""
    q_ids = np.sort(rng.integers(0, 3, (*batch, n.q_len)), axis=-1)
    return q_ids, np.sort(rng.integers(0, 3, (*batch, n.kv_len)), axis=-1).astype(np.int32)


@variant
def document(rng: np.random.Generator, n: Dims) -> Variant:
    q_ids, kv_ids = _document_ids(rng, n)
    q_tensor, kv_tensor = torch.from_numpy(q_ids), torch.from_numpy(kv_ids)
    return Variant(
        {"mask": lambda p: q_ids[p.q_idx] == kv_ids[p.kv_idx]},
        {"mask": lambda b, h, q_idx, kv_idx: q_tensor[q_idx] == kv_tensor[kv_idx]},
        {"mask": ak.document(q_tensor, kv_tensor)},
    )


@variant
def document_per_batch(rng: np.random.Generator, n: Dims) -> Variant:
    q_ids, kv_ids = _document_ids(rng, n, n.batch)
    q_tensor, kv_tensor = torch.from_numpy(q_ids), torch.from_numpy(kv_ids)
    return Variant(
        {"mask": lambda p: q_ids[p.b, p.q_idx] == kv_ids[p.b, p.kv_idx]},
        {"mask": lambda b, h, q_idx, kv_idx: q_tensor[b, q_idx] == kv_tensor[b, kv_idx]},
        {"mask": ak.document(q_tensor, kv_tensor)},
    )


@variant
def unsorted_documents(rng: np.random.Generator, n: Dims) -> Variant:
    q_ids, kv_ids = (rng.integers(0, 2, size) for size in (n.q_len, n.kv_len))
    mask = ak.document(torch.from_numpy(q_ids), torch.from_numpy(kv_ids))
    return Variant({"mask": lambda p: q_ids[p.q_idx] == kv_ids[p.kv_idx]}, {}, {"mask": mask})


@variant
def dense_bool_mask(rng: np.random.Generator, n: Dims) -> Variant:
    """No structure at all: every tile is partial."""
    table = rng.random((n.batch, n.q_heads, n.q_len, n.kv_len)) < 0.3
    tensor = torch.from_numpy(table)
    return Variant(
        {"mask": lambda p: table[p.b, p.h]}, {"mask": lambda b, h, q_idx, kv_idx: tensor[b, h, q_idx, kv_idx]}
    )


# --- combinations -----------------------------------------------------------------------------------------


@variant
def prefix_or_causal(rng: np.random.Generator, n: Dims) -> Variant:
    offset = n.kv_len - n.q_len
    return Variant(
        {"mask": lambda p: (p.kv_idx < 9) | (p.kv_idx <= p.position)},
        {"mask": lambda b, h, q_idx, kv_idx: (kv_idx < 9) | (kv_idx <= q_idx + offset)},
        {"mask": ak.prefix(9) | ak.causal()},
    )


@variant
def streaming(rng: np.random.Generator, n: Dims) -> Variant:
    """StreamingLLM: the first keys and a window, never the future."""
    offset = n.kv_len - n.q_len
    return Variant(
        {"mask": lambda p: (p.kv_idx <= p.position) & ((p.kv_idx < 4) | (p.kv_idx >= p.position - 12))},
        {"mask": lambda b, h, q, kv: (kv <= q + offset) & ((kv < 4) | (kv >= q + offset - 12))},
        {"mask": ak.causal() & (ak.prefix(4) | ak.window(12, None))},
    )


@variant
def not_window(rng: np.random.Generator, n: Dims) -> Variant:
    offset = n.kv_len - n.q_len
    return Variant(
        {"mask": lambda p: ~(abs(p.position - p.kv_idx) <= 6)},
        {"mask": lambda b, h, q_idx, kv_idx: ~((q_idx + offset - kv_idx).abs() <= 6)},
        {"mask": ~ak.window(6, 6)},
    )


@variant
def document_and_causal_or_prefix(rng: np.random.Generator, n: Dims) -> Variant:
    q_ids, kv_ids = _document_ids(rng, n)
    mods = ak.document(torch.from_numpy(q_ids), torch.from_numpy(kv_ids)) & (ak.causal() | ak.prefix(5))

    def oracle(p: Pairs) -> Any:
        return (q_ids[p.q_idx] == kv_ids[p.kv_idx]) & ((p.kv_idx <= p.position) | (p.kv_idx < 5))

    return Variant({"mask": oracle}, {}, {"mask": mods})


@variant
def plain_functions_beside_mods(rng: np.random.Generator, n: Dims) -> Variant:
    def even(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx + h) % 2 == 0

    def first(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < 3

    def oracle(p: Pairs) -> Any:
        return (p.kv_idx < 3) | ((p.kv_idx <= p.position) & ((p.kv_idx + p.h) % 2 == 0))

    return Variant({"mask": oracle}, {}, {"mask": first | (ak.causal() & even)})


@variant
def differs_by_head_and_batch(rng: np.random.Generator, n: Dims) -> Variant:
    """Index arithmetic as Python has it: // and % floor, also below zero."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ((q_idx - kv_idx) // 5 % (h + 2) == b) | (kv_idx == 0)

    def oracle(p: Pairs) -> Any:
        return ((p.q_idx - p.kv_idx) // 5 % (p.h + 2) == p.b) | (p.kv_idx == 0)

    return Variant({"mask": oracle}, {"mask": mask})


@variant
def score_and_mask(rng: np.random.Generator, n: Dims) -> Variant:
    slopes = slopes_of(rng, n.q_heads)
    tensor = torch.from_numpy(slopes)

    def oracle(s: Any, p: Pairs) -> Any:
        return 4 * np.tanh(s / 4) - slopes[p.h] * distance(p, s.dtype)

    def score(s: Any, *index: Any) -> Any:
        return ak.alibi(tensor)(ak.softcap(4.0)(s, *index), *index)

    mask = ak.causal() & ak.window(40)
    return Variant(
        {"score": oracle, "mask": lambda p: (p.kv_idx <= p.position) & (p.kv_idx >= p.position - 40)},
        {},
        {"score": score, "mask": mask},
    )


# --- the tests --------------------------------------------------------------------------------------------


def problem(name: str, shape: str, rng: np.random.Generator) -> tuple[Variant, Any]:
    q_len, kv_len = SHAPES[shape]
    dims = Dims(2, 4, 2, q_len, kv_len, 16, 24)
    return VARIANTS[name](rng, dims), qkv("gaussian", rng, dims)


def spellings(v: Variant) -> list[dict[str, Any]]:
    return [call for call in (v.plain, v.mods) if call]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_engine_equals_equation(
    name: str, shape: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    v, tensors = problem(name, shape, rng)
    for call in spellings(v):
        compare(*tensors, oracle=v.oracle, what=f"{name} {shape} {sorted(call)}", **call)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_equals_equation(
    name: str, shape: str, rng: np.random.Generator, compare_reference: Any
) -> None:
    v, tensors = problem(name, shape, rng)
    for call in spellings(v):
        compare_reference(*tensors, oracle=v.oracle, **call)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_attention_applies_its_keywords_in_order(
    shape: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    q_len, kv_len = SHAPES[shape]
    dims = Dims(2, 4, 1, q_len, kv_len, 16, 16)
    slopes, logits = slopes_of(rng, 4), rng.standard_normal(4).astype(np.float32)

    def oracle(s: Any, p: Pairs) -> Any:
        return (3 * np.tanh(s / 3) - slopes[p.h] * distance(p, s.dtype)) / 2

    visible = {
        "mask": lambda p: (p.kv_idx <= p.position) & (p.kv_idx >= p.position - 30) & (p.kv_idx % 3 != 1)
    }
    compare(
        *qkv("gaussian", rng, dims),
        oracle={"score": oracle, "sink": logits, "scale": 0.5, **visible},
        function=ak.dense_attention,
        causal=True,
        window=(30, 5),
        mask=lambda b, h, q_idx, kv_idx: kv_idx % 3 != 1,
        softcap=3.0,
        alibi_slopes=torch.from_numpy(slopes),
        score=lambda s, b, h, q_idx, kv_idx: s / 2,
        sink=torch.from_numpy(logits),
        scale=0.5,
    )
