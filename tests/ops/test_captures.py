"""A trace never outlives what it captured: a change takes effect at the next call, whatever holds the number."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def check(o: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Equal to the float64 oracle within a few float32 roundings."""
    assert o.dtype == torch.float32
    torch.testing.assert_close(o.double(), expected[0], rtol=1e-5, atol=3e-6)


@pytest.fixture
def same_as_fresh(qkv: Any) -> Callable[..., Tensor]:
    """``same_as_fresh(score, wanted)``: what the function gives now is what ``wanted`` says it should, exactly."""
    q, k, v = qkv(length=9)

    def compare(score: Any, wanted: float | Tensor) -> Tensor:
        result = ak.attention(q, k, v, score=score)
        scale = torch.as_tensor(
            wanted, dtype=torch.float32
        ).clone()  # a fresh tensor: traced to a load, never stale
        expected = ak.attention(q, k, v, score=lambda s, b, h, i, j: s * scale)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        return result

    return compare


class Holder:
    """Somebody's module."""

    factor = 2.0

    def __init__(self) -> None:
        self.own = 2.0
        self.table = torch.tensor([2.0])

    def by_class(self, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s * self.factor

    def __call__(self, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s * self.own


class Factor(float):
    """A number with something beside it."""

    beside = 2.0


GLOBAL = 2.0
GLOBAL_TENSOR = torch.tensor(2.0)
Change = Callable[[], tuple[Callable[..., Any], Callable[[float], None]]]


def rebound_cell() -> Any:
    factor = 2.0

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return lambda s, *_: s * factor, change


def global_number() -> Any:
    def change(value: float) -> None:
        globals()["GLOBAL"] = value

    return lambda s, *_: s * GLOBAL, change


def global_of_a_helper() -> Any:
    def helper(s: Any) -> Any:
        return s * GLOBAL

    return lambda s, *_: sum(helper(x) for x in (s,)), global_number()[1]


def global_tensor() -> Any:
    def change(value: float) -> None:
        globals()["GLOBAL_TENSOR"] = torch.tensor(value)

    return lambda s, *_: s * GLOBAL_TENSOR, change


def default_argument() -> Any:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, factor: float = 2.0) -> Any:
        return s * factor

    return score, lambda value: setattr(score, "__defaults__", (value,))


def keyword_default() -> Any:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, *, factor: float = 2.0) -> Any:
        return s * factor

    return score, lambda value: setattr(score, "__kwdefaults__", {"factor": value})


def function_attribute() -> Any:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s * score.factor  # type: ignore[attr-defined]

    score.factor = 2.0  # type: ignore[attr-defined]
    return score, lambda value: setattr(score, "factor", value)


def attribute(name: str) -> Any:
    held = Holder()
    return lambda s, *_: s * getattr(held, name), lambda value: setattr(held, name, value)


def attribute_tensor() -> Any:
    held = Holder()
    return lambda s, *_: s * held.table[0], held.table.fill_


def class_attribute() -> Any:
    class Config:
        factor = 2.0

    return lambda s, *_: s * Config.factor, lambda value: setattr(Config, "factor", value)


def bound_method() -> Any:
    held = Holder()
    return held.by_class, lambda value: setattr(held, "factor", value)


def callable_object() -> Any:
    held = Holder()
    return held, lambda value: setattr(held, "own", value)


def partial() -> Any:
    keywords = {"factor": 2.0}

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, factor: float) -> Any:
        return s * factor

    made = functools.partial(score, **keywords)
    return made, lambda value: made.keywords.update(factor=value)


def in_a(container: Any) -> Any:
    key = "factor" if isinstance(container, dict) else 0
    return lambda s, *_: s * container[key], lambda value: container.__setitem__(key, value)


def method_of_a_container() -> Any:
    table = {"factor": 2.0}
    get = table.get
    return lambda s, *_: s * get("factor"), lambda value: table.update(factor=value)


def beside_a_number() -> Any:
    factor = Factor(1.0)
    return lambda s, *_: s * factor.beside, lambda value: setattr(factor, "beside", value)


def beside_a_tensor() -> Any:
    held = torch.tensor(1.0)
    held.beside = 2.0  # type: ignore[attr-defined]
    return lambda s, *_: s * held.beside, lambda value: setattr(held, "beside", value)


def contents_of_a_tensor() -> Any:
    factor = torch.tensor([2.0])
    return lambda s, b, h, i, j: s * factor[h * 0], factor.fill_


def item_of_a_tensor() -> Any:
    factor = torch.tensor(2.0)
    return lambda s, *_: s * factor.item(), factor.fill_


def list_of_a_tensor() -> Any:
    factor = torch.tensor([2.0])
    return lambda s, *_: s * factor.tolist()[0], factor.fill_


def float_of_a_tensor() -> Any:
    factor = torch.tensor(2.0)
    return lambda s, *_: s * float(factor), factor.fill_


def branch_on_a_tensor() -> Any:
    factor = torch.tensor(2.0)
    return lambda s, *_: s * 2.0 if factor < 3 else s * 5.0, factor.fill_


def computed_from_a_tensor() -> Any:
    factor = torch.tensor([1.0])
    return lambda s, b, h, i, j: s * (factor + 1)[h * 0], lambda value: factor.fill_(value - 1)


def numpy_view_of_a_tensor() -> Any:
    factor = torch.tensor(2.0)
    array = factor.numpy()
    return lambda s, *_: s * float(array), factor.fill_


def param() -> Any:
    factor = ak.param("factor", 2.0)
    return lambda s, *_: s * factor, lambda value: setattr(factor, "value", value)


def value_of_a_param() -> Any:
    factor = ak.param("factor", 2.0)
    return lambda s, *_: s * factor.value, lambda value: setattr(factor, "value", value)


def param_and_its_value() -> Any:
    factor = ak.param("factor", math.sqrt(2.0))
    return lambda s, *_: s * factor * factor.value, lambda value: setattr(factor, "value", math.sqrt(value))


def from_elsewhere() -> Any:
    space: dict[str, Any] = {"factor": 2.0}
    exec("def score(s, b, h, q_idx, kv_idx): return s * factor", space)  # noqa: S102 -- functions without a module
    return space["score"], lambda value: space.update(factor=value)


CAPTURES: dict[str, Any] = {
    f.__name__.replace("_", " "): f
    for f in (
        rebound_cell, global_number, global_of_a_helper, global_tensor, default_argument, keyword_default, function_attribute,
        attribute_tensor, class_attribute, bound_method, callable_object, partial, method_of_a_container, beside_a_number, beside_a_tensor,
        contents_of_a_tensor, item_of_a_tensor, list_of_a_tensor, float_of_a_tensor, branch_on_a_tensor,
        computed_from_a_tensor, numpy_view_of_a_tensor, param, value_of_a_param, param_and_its_value, from_elsewhere,
    )
}  # fmt: skip
CAPTURES |= {
    "attribute": lambda: attribute("own"),
    "list": lambda: in_a([2.0]),
    "dict": lambda: in_a({"factor": 2.0}),
    "array": lambda: in_a(np.array([2.0])),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_a_change_takes_effect_at_the_next_call(name: str, same_as_fresh: Any) -> None:
    try:
        score, change = CAPTURES[name]()
        for value in (2.0, 5.0, 2.0):
            change(value)
            first, second = same_as_fresh(score, value), same_as_fresh(score, value)
            assert torch.equal(first, second)
    finally:
        globals().update(GLOBAL=2.0, GLOBAL_TENSOR=torch.tensor(2.0))


def test_a_captured_tensor_may_change_shape_and_dtype(qkv: Any) -> None:
    q, k, v = qkv(length=9)
    table: Tensor

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s + (table[h] if table.dim() == 1 else table[h, kv_idx]) * (0.5 * table.shape[-1])

    for table in (
        SLOPES,
        torch.arange(36.0).view(4, 9),
        torch.arange(4),
        torch.arange(36).view(4, 9),
        SLOPES > 0.2,
    ):
        expected = ak.attention(
            q,
            k,
            v,
            score=ak.bias(
                (table if table.dim() == 2 else table[:, None]).float()[:, None] * 0.5 * table.shape[-1]
            ),
        )
        torch.testing.assert_close(ak.attention(q, k, v, score=score), expected, rtol=1e-6, atol=1e-6)


def test_same_code_different_captures(same_as_fresh: Any) -> None:
    def scaled(factor: Any) -> Any:
        return lambda s, *_: s * factor

    values = [
        2.0,
        3.0,
        2,
        True,
        -0.0,
        0.0,
        torch.tensor(2.0),
        torch.tensor(5.0),
        torch.tensor(3),
        ak.param("x", 7.0),
        np.float64(4),
        np.float32(5),
        np.int64(6),
    ]
    scores = [scaled(value) for value in values]
    for _ in range(2):
        for score, value in zip(scores, values, strict=True):
            same_as_fresh(score, value.value if isinstance(value, type(ak.param(""))) else value)


def test_captured_ints_and_floats_are_told_apart(qkv: Any) -> None:
    q, k, v = qkv(length=9)

    def divided(by: Any) -> Any:
        return lambda s, b, h, q_idx, kv_idx: s - kv_idx // by + (7 + q_idx * 0) // by

    for by in (2, 2.0, 3, True):
        wanted = (torch.arange(9) // by)[None, :].float() * -1
        expected = ak.attention(q, k, v, score=ak.bias(wanted.expand(9, 9)))
        torch.testing.assert_close(ak.attention(q, k, v, score=divided(by)), expected, rtol=1e-6, atol=1e-6)


def test_aliased_captures_stay_apart(qkv: Any, oracle: Any) -> None:
    q, k, v = qkv(length=9)

    def two(first: Tensor, second: Tensor) -> Any:
        return lambda s, b, h, q_idx, kv_idx: s + first[q_idx] * second[kv_idx]

    one, other = torch.arange(9.0) / 9, torch.arange(9.0).flip(0) / 9
    for first, second in ((one, one), (one, other), (other, one), (one[:], one), (other, other)):
        check(ak.attention(q, k, v, score=two(first, second)), oracle(q, k, v, score=two(first, second)))
    check(
        ak.attention(q, k, v, score=ak.alibi(SLOPES), normalizer=ak.softmax(SLOPES)),
        oracle(q, k, v, score=lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(), sink=SLOPES),
    )


def test_recursion_and_generators(qkv: Any) -> None:
    q, k, v = qkv(length=9)

    def power(x: Any, n: int) -> Any:
        return x if n == 1 else x * power(x, n - 1)

    cubed = ak.attention(q, k, v, score=lambda s, *_: power(s, 3))
    assert torch.equal(cubed, ak.attention(q, k, v, score=lambda s, *_: s * (s * s)))

    tangled: list[Any] = [2.0]
    tangled.append(tangled)
    doubled = ak.attention(q, k, v, score=lambda s, *_: s * tangled[0])
    assert torch.equal(doubled, ak.attention(q, k, v, score=lambda s, *_: s * 2.0))

    def endless(s: Any, *index: Any) -> Any:
        return endless(s, *index)

    with pytest.raises(RecursionError):  # their function's own, not ours
        ak.attention(q, k, v, score=endless)

    def generator(s: Any, *index: Any) -> Any:
        yield s

    with pytest.raises(ak.AttnkitTypeError, match="AK305"):
        ak.attention(q, k, v, score=generator)
    assert torch.equal(
        ak.attention(q, k, v, score=lambda s, *_: sum(x for x in (s, s))),
        ak.attention(q, k, v, score=lambda s, *_: s * 2),
    )


def test_what_a_function_raises_comes_through(qkv: Any) -> None:
    class Theirs(Exception):
        pass

    def score(s: Any, *index: Any) -> Any:
        raise Theirs

    with pytest.raises(Theirs):
        ak.attention(*qkv(), score=score)
