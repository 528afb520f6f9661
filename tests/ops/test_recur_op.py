"""torch.ops.attnkit.recur and the face of ak.linear_attention: opcheck, graphs, autocast, every error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.ops import recur
from attnkit.ops.linear import program_text

pytestmark = pytest.mark.shows
Named = dict[str, Any]


def problem(*names: str, length: int = 40, dim: int = 16, v_dim: int = 8, packed: bool = False) -> Named:
    """q, k, v, and of everything else what is named."""
    generator = torch.Generator().manual_seed(0)
    batch, states = (1, 3) if packed else (2, 2)
    sizes = {
        "q": (batch, 2, length, dim), "k": (batch, 2, length, dim), "v": (batch, 2, length, v_dim),
        "gate": (batch, 2, length), "gates": (batch, 2, length, dim), "beta": (batch, 2, length), "bonus": (2, dim),
        "initial_state": (states, 2, dim, v_dim), "norm": (states, 2, dim),
    }  # fmt: skip
    given: Named = {x: torch.rand(sizes[x], generator=generator) for x in ("q", "k", "v", *names)}
    for x in ("gate", "gates"):
        if x in given:
            given["gate"] = -given.pop(x)
    if "norm" in given:
        given["initial_state"] = (given["initial_state"], given.pop("norm"))
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 7, 7, length], dtype=torch.int32)
    return given


def watched(given: Named) -> tuple[Named, list[Tensor]]:
    call = {
        x: t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for x, t in given.items()
    }
    return call, [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize(
    "names",
    [("initial_state", "norm"), ("gate", "bonus", "initial_state"), ("gate", "beta", "initial_state")],
    ids=["normalised", "bonus", "delta"],
)
def test_opcheck(names: tuple[str, ...]) -> None:
    given, normal = problem(*names, packed=True), "norm" in names
    held = given["initial_state"]
    others = [given[x] for x in ("gate", "beta", "bonus") if x in given]
    others += list(held) if normal else [held]
    feature_map = "elu1" if normal else "identity"
    text = program_text(3 if "gate" in given else None, "beta" in given, "bonus" in given, True, normal, True, "l2",
                        feature_map, normal, True, None)  # fmt: skip
    plain: Any = (*(given[x] for x in "qkv"), others, text, [given["cu_seqlens"]], 16)
    results = torch.ops.attnkit.recur(*plain)
    torch.library.opcheck(torch.ops.attnkit.recur_backward.default, (*results, *results, *plain))
    for t in (*plain[:3], *others):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.attnkit.recur.default, plain)


def test_compiles_into_one_graph() -> None:
    given, leaves = watched(problem("gates", "beta", "initial_state"))
    compiled = torch.compile(ak.linear_attention, fullgraph=True, backend="aot_eager")
    o = compiled(**given)
    expected = ak.linear_attention(**given)
    assert torch.equal(o, expected)
    for d, other in zip(
        torch.autograd.grad(o.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(d, other)


def test_defaults_are_the_linear_transformer() -> None:
    bare = problem()
    whole = ak.linear_attention(**bare, feature_map="elu1", normalize=True)
    assert torch.equal(ak.linear_attention(**bare), whole)
    function = ak.linear_attention(**bare, feature_map=lambda x: torch.nn.functional.elu(x) + 1)
    torch.testing.assert_close(function, whole, rtol=1e-4, atol=1e-5)


def test_autocast_casts_tokens() -> None:
    given = problem("gate")
    with torch.autocast("cpu", torch.bfloat16):
        o, state = ak.linear_attention(**given, return_state=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_no_second_derivatives() -> None:
    given, _ = watched(problem("gate"))
    (d,) = torch.autograd.grad(ak.linear_attention(**given).sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="AK503"):
        d.sum().backward()


@pytest.mark.parametrize(
    ("code", "name", "change"),
    [
        ("AK402", "gate", {"q": None}),
        ("AK403", "gate", {"q": torch.zeros(2, 2, 40)}),
        ("AK403", "gate", {"k": torch.zeros(2, 2, 39, 16)}),
        ("AK403", "gate", {"k": torch.zeros(2, 2, 40, 15)}),
        ("AK404", "gate", {"v": torch.zeros(2, 2, 40, 8, dtype=torch.bfloat16)}),
        ("AK404", "gate", {x: torch.zeros(2, 2, 40, 16, dtype=torch.int32) for x in "qkv"}),
        ("AK407", "gate", {"k": torch.zeros(2, 3, 40, 16)}),
        ("AK403", "gate", {"gate": torch.zeros(2, 2)}),
        ("AK403", "gate", {"gate": torch.zeros(2, 2, 39)}),
        ("AK403", "beta", {"beta": torch.zeros(2, 2, 40, 1)}),
        ("AK403", "bonus", {"bonus": torch.zeros(2, 15)}),
        ("AK403", "gate", {"initial_state": torch.zeros(2, 2, 8, 16)}),
        ("AK401", "", {"initial_state": (torch.zeros(2, 2, 16, 8),)}),
        ("AK402", "", {"initial_state": torch.zeros(2, 2, 16, 8)}),
        ("AK408", "gate", {"initial_state": (torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16))}),
        ("AK401", "gate", {"feature_map": "relu"}),
        ("AK401", "gate", {"qk_norm": "l1"}),
        ("AK408", "beta", {"feature_map": torch.relu, "qk_norm": "l2"}),
        ("AK401", "gate", {"scale": 0.0}),
        ("AK402", "gate", {"scale": "1"}),
        ("AK401", "gate", {"chunk_size": 48}),
        ("AK402", "gate", {"chunk_size": 64.0}),
        ("AK402", "gate", {"causal": 1}),
        ("AK220", "gate", {"causal": False}),
        ("AK220", "beta", {"normalize": True}),
        ("AK220", "beta", {"bonus": torch.zeros(2, 16)}),
        ("AK404", "gate", {"cu_seqlens": torch.tensor([0, 40])}),
        ("AK602", "gate", {"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32)}),
        ("AK502", "gate", {x: torch.zeros(2, 2, 40, 16, dtype=torch.float64) for x in "qkv"}),
    ],
)  # fmt: skip
def test_errors(code: str, name: str, change: Named) -> None:
    given = problem(*[name][: bool(name)])
    ak.linear_attention(**given)  # so that all but what is changed has been met before
    with pytest.raises(ak.AttnkitError) as caught:
        ak.linear_attention(**(given | change))
    assert caught.value.code == code


# --- the short way of a call that has been met ---------------------------------------------------------------


STEPS: dict[str, tuple[str, ...]] = {
    "plain": ("initial_state",), "normalised": ("initial_state", "norm"), "bonus": ("gates", "bonus", "initial_state"),
    "delta": ("gate", "beta", "initial_state"),
}  # fmt: skip


@pytest.fixture
def both_ways(dispatched: Any) -> Callable[[Any, Named], list[tuple[Tensor, ...]]]:
    """``both_ways(function, given)``: o and states of the op, which a mode sees, and of the short way, which goes past it."""

    def run(function: Any, given: Named) -> list[tuple[Tensor, ...]]:
        with dispatched() as seen:
            found = [function(**given, return_state=True)]
        assert "attnkit.recur.default" in seen
        found.append(function(**given, return_state=True))
        return [(o, *(state if isinstance(state, tuple) else (state,))) for o, state in found]

    return run


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("names", STEPS.values(), ids=list(STEPS))
def test_the_short_way_gives_the_same_bits(
    names: tuple[str, ...], length: int, both_ways: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(*names, length=length) | {"normalize": "norm" in names}
    ak.linear_attention(**given)
    taken = []
    at_once = recur._at_once
    monkeypatch.setattr(recur, "_at_once", lambda *args: taken.append(at_once(*args)) or taken[-1])
    on_op, past_it = both_ways(ak.linear_attention, given)
    assert [results is not None for results in taken] == [True]
    assert all(map(torch.equal, on_op, past_it))


def test_the_short_way_of_moments(both_ways: Any) -> None:
    given: Named = {x: t for x, t in problem(length=1).items() if x in "qkv"} | {"causal": True}
    _, state = ak.factorizable_attention(**given, return_state=True)
    on_op, past_it = both_ways(ak.factorizable_attention, given | {"initial_state": state})
    assert all(map(torch.equal, on_op, past_it))


def test_what_the_engine_takes_in_another_layout_goes_the_long_way() -> None:
    given = problem("gate", "initial_state", length=1)
    expected = ak.linear_attention(**given)
    state = given["initial_state"].mT.contiguous().mT
    assert torch.equal(ak.linear_attention(**given | {"initial_state": state}), expected)
    half = given | {"initial_state": given["initial_state"].bfloat16()}
    wide = given | {"initial_state": half["initial_state"].float()}
    assert torch.equal(ak.linear_attention(**half), ak.linear_attention(**wide))


def test_gradients_are_followed_where_a_call_has_been_met() -> None:
    given = problem("gate", "initial_state", length=1)
    assert not ak.linear_attention(**given).requires_grad  # type: ignore[union-attr]
    for name in ("q", "gate", "initial_state"):
        leaf = given[name].clone().requires_grad_()
        o = ak.linear_attention(**given | {name: leaf})
        assert torch.autograd.grad(o.sum(), leaf)[0].abs().sum() > 0  # type: ignore[union-attr]
    (call,) = ak.explain(ak.linear_attention, **given).calls
    assert "recurrence" in call.notes[0]


@pytest.mark.parametrize(
    ("names", "dim", "packed", "taken"),
    [
        ((), 64, False, 32), ((), 80, False, 64), (("gate",), 16, True, 32), (("gates",), 80, False, 16),
        (("gates",), 16, True, 16), (("gate", "bonus"), 16, False, 16),
    ],
)  # fmt: skip
def test_explain_says_how_many_tokens_are_computed_together(
    names: tuple[str, ...], dim: int, packed: bool, taken: int
) -> None:
    given = problem(*names, dim=dim, packed=packed)
    (call,) = ak.explain(ak.linear_attention, **given).calls
    assert call.config == {"chunk": taken}
    o = ak.linear_attention(**given, chunk_size=taken)
    assert torch.equal(o, ak.linear_attention(**given))  # 64 are asked for
    if taken < 64:
        assert torch.equal(o, ak.linear_attention(**given, chunk_size=128))


def test_lengths_must_describe_the_tokens() -> None:
    given = problem("gate", packed=True)
    for cuts in ([0, 30], [1, 40], [0, 20, 10, 40]):
        with pytest.raises(ak.AttnkitError, match="AK602"):
            ak.linear_attention(**given | {"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)})
