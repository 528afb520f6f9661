"""ak.factorizable_attention on the engine: against the matrix of weights in float64, forwards and backwards; states; errors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.cpu.engine import engine
from attnkit.ops.factorizable import program_text

pytestmark = pytest.mark.shows
Named = dict[str, Any]
MEMBERS: dict[str, Named] = {
    "fastmax1": {"order": 1, "temperature": 2.0},
    "fastmax2": {},
    "layer": {"qk_norm": "layer", "temperature": 16.0},
    "based": {"qk_norm": None, "temperature": 4.0},
    "own coefficients": {"coefficients": (1.0, 0.3, 0.7)},
}
HEADS = {"equal": (2, 2), "grouped": (4, 2)}
SIZES = {  # tokens, head_dim, v_head_dim
    "odd": (37, 5, 7), "whole": (150, 32, 16), "wide": (70, 70, 16), "one": (1, 7, 80), "few": (4, 20, 16),
}  # fmt: skip
each_member = pytest.mark.parametrize("member", MEMBERS)
either_way = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def phi(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    parts = [torch.ones_like(x[..., :1]), x, (x[..., :, None] * x[..., None, :]).flatten(-2)]
    return torch.cat([a * part for a, part in zip(coefficients, parts, strict=False)], -1)


def matrix(
    q: Tensor, k: Tensor, v: Tensor, *, order: int = 2, causal: bool = False, qk_norm: str | None = "l2",
    temperature: float = 1.0, coefficients: tuple[float, ...] | None = None, initial_state: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, M and z from all weights, and what came before from its moments: differentiable, in any precision."""
    a = coefficients or (1.0, 1.0, 0.5)[: order + 1]
    group = q.shape[1] // k.shape[1]

    def mapped(x: Tensor) -> Tensor:
        if qk_norm == "l2":
            return x / x.norm(dim=-1, keepdim=True)
        if qk_norm == "layer":
            x = x - x.mean(-1, keepdim=True)
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x

    q, k = mapped(q) / temperature, mapped(k)
    x = q @ k.repeat_interleave(group, 1).mT
    f = sum(c * x**i for i, c in enumerate(a))
    assert isinstance(f, Tensor)
    f = f.tril() if causal else f
    total, norm = f @ v.repeat_interleave(group, 1), f.sum(-1, keepdim=True)
    written = phi(k, (1.0,) * len(a))
    state, state_norm = written.mT @ v, written.sum(2)
    if initial_state is not None:
        before, before_norm = initial_state
        reads = phi(q, a)
        total = total + reads @ before.repeat_interleave(group, 1)
        norm = norm + reads @ before_norm[..., None].repeat_interleave(group, 1)
        state, state_norm = state + before, state_norm + before_norm
    return total / norm, state, state_norm


def problem(member: str, heads: str = "equal", size: str = "odd", *, initial: bool = False) -> Named:
    generator = torch.Generator().manual_seed(0)
    (length, dim, v_dim), (q_heads, kv_heads) = SIZES[size], HEADS[heads]
    given: Named = {
        x: torch.randn(2, h, length, d, generator=generator)
        for x, h, d in (("q", q_heads, dim), ("k", kv_heads, dim), ("v", kv_heads, v_dim))
    }
    if initial:
        rows = 1 + dim + (dim * dim if MEMBERS[member].get("order", 2) == 2 else 0)
        norm = 0.1 * torch.rand(2, kv_heads, rows, generator=generator)
        norm[..., 0] += 5  # weights of what came before stay positive
        given["initial_state"] = (torch.randn(2, kv_heads, rows, v_dim, generator=generator), norm)
    return given | MEMBERS[member]


def run(**given: Any) -> tuple[Tensor, Tensor, Tensor]:
    o, (state, norm) = ak.factorizable_attention(**given, return_state=True)
    return o, state, norm


def everything(function: Any, given: Named, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients, with a cotangent of every result."""
    call = {
        x: t.detach().to(dtype).requires_grad_() if isinstance(t, Tensor) else t for x, t in given.items()
    }
    if "initial_state" in call:
        call["initial_state"] = tuple(t.detach().to(dtype).requires_grad_() for t in call["initial_state"])
    leaves = [t for t in call.values() if isinstance(t, Tensor)] + list(call.get("initial_state", ()))
    results = function(**call)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


def close(found: list[Tensor], given: Named) -> None:
    """Errors at most twice those of the equation in float32, and eight units in the last place of the largest element."""
    exact, naive = everything(matrix, given, torch.float64), everything(matrix, given, torch.float32)
    for mine, other, true in zip(found, naive, exact, strict=True):
        assert mine.shape == true.shape
        assert (mine - true).abs().max() <= 2 * (other - true).abs().max() + 8 * 2.0**-23 * true.abs().max()


@pytest.fixture(params=engine().isa_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = engine().current_isa()
    engine().set_isa(request.param)
    yield request.param
    engine().set_isa(before)


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("heads", HEADS)
@either_way
@each_member
def test_call_and_gradients_are_the_equations(member: str, causal: bool, heads: str, initial: bool) -> None:
    given = problem(member, heads, initial=initial) | {"causal": causal}
    close(everything(run, given, torch.float32), given)


@either_way
@pytest.mark.parametrize("size", ["whole", "wide"])
def test_on_every_instruction_set(size: str, causal: bool, level: str) -> None:
    given = problem("fastmax2", size=size, initial=True) | {"causal": causal}
    close(everything(run, given, torch.float32), given)


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("size", ["one", "few"])
@pytest.mark.parametrize("member", ["fastmax1", "own coefficients"])
def test_few_tokens_step_on_the_state_as_it_lies(member: str, size: str, initial: bool, level: str) -> None:
    given = problem(member, "grouped", size, initial=initial) | {"causal": True}
    if initial:
        close(everything(run, given, torch.float32), given)
    for found, exact in zip(run(**given), everything(matrix, given, torch.float64)[:3], strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)  # of sums of all features


@pytest.mark.parametrize("cut", [1, 64, 149])
@each_member
def test_a_state_carries_the_sequence_on(member: str, cut: int) -> None:
    given = problem(member, size="whole") | {"causal": True}
    o, state, norm = run(**given)

    def part(tokens: slice) -> Named:
        return {x: t[:, :, tokens] if isinstance(t, Tensor) else t for x, t in given.items()}

    first, *start = run(**part(slice(cut)))
    rest, last, last_norm = run(**part(slice(cut, None)), initial_state=tuple(start))
    torch.testing.assert_close(torch.cat([first, rest], 2), o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last_norm, norm, rtol=1e-4, atol=1e-4)


@each_member
def test_token_by_token_is_the_whole(member: str) -> None:
    given = problem(member, "grouped", "whole") | {"causal": True}
    whole, *last = run(**given)
    rows: list[Tensor] = []
    start: Named = {}
    for t in range(150):
        token = {x: y[:, :, t : t + 1] if isinstance(y, Tensor) else y for x, y in given.items()}
        o, *state = run(**token, **start)
        start = {"initial_state": tuple(state)}
        rows.append(o)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-4, atol=1e-5)
    for found, expected in zip(state, last, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_member
def test_the_last_causal_row_is_the_last_full_row(member: str) -> None:
    given = problem(member, "grouped", "whole")
    causal, full = (run(**given, causal=causal) for causal in (True, False))
    torch.testing.assert_close(causal[0][:, :, -1], full[0][:, :, -1], rtol=1e-4, atol=1e-5)
    for found, expected in zip(causal[1:], full[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        causal[0][:, :, 0], given["v"][:, :, 0].repeat_interleave(2, 1), rtol=1e-4, atol=1e-5
    )


@either_way
def test_threads_and_neighbours_change_no_bit(causal: bool) -> None:
    given = problem("fastmax2", "grouped", "whole") | {"causal": causal}
    once = everything(run, given, torch.float32)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    assert all(map(torch.equal, everything(run, given, torch.float32), once))
    assert torch.equal(
        run(**{x: t[1:] if isinstance(t, Tensor) else t for x, t in given.items()})[0], once[0][1:]
    )


def test_numbers_by_hand() -> None:
    q = torch.eye(2)[None, None]
    v = torch.tensor([1.0, 3.0])[None, None, :, None]
    two = ak.factorizable_attention(q, q, v)
    torch.testing.assert_close(two.flatten(), torch.tensor([1.571429, 2.428571]), rtol=1e-6, atol=1e-6)
    one = ak.factorizable_attention(q, q, v, order=1)
    torch.testing.assert_close(one.flatten(), torch.tensor([1.666667, 2.333333]), rtol=1e-6, atol=1e-6)


def test_a_constant_polynomial_is_the_running_mean() -> None:
    given = problem("fastmax2")
    o = ak.factorizable_attention(
        given["q"], given["k"], given["v"], coefficients=(1.0, 0.0, 0.0), causal=True
    )
    counts = torch.arange(1, 38)[None, None, :, None]
    torch.testing.assert_close(o, given["v"].cumsum(2) / counts, rtol=1e-5, atol=1e-6)


@either_way
def test_nan_reaches_no_earlier_token(causal: bool) -> None:
    given = problem("fastmax2", size="whole") | {"causal": causal}
    clean = run(**given)[0]
    for x in "qkv":
        given[x][:, :, 30] = torch.nan
    found = run(**given)[0]
    assert found[:, :, 30:].isnan().all() if causal else found.isnan().all()
    if causal:
        assert torch.equal(found[:, :, :30], clean[:, :, :30])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_short_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    given = problem("fastmax2", size="whole") | {"causal": True}
    short = {x: t.to(dtype) if isinstance(t, Tensor) else t for x, t in given.items()}
    wide = {x: t.float() if isinstance(t, Tensor) else t for x, t in short.items()}
    assert torch.equal(run(**short)[0], run(**wide)[0].to(dtype))


def test_opcheck_and_one_graph() -> None:
    given = problem("fastmax2", "grouped", initial=True)
    text = program_text((1.0, 1.0, 0.5), "l2", 1.0, True, True)
    tensors = [given[x].requires_grad_() for x in "qkv"]
    torch.library.opcheck(
        torch.ops.attnkit.recur.default, (*tensors, list(given["initial_state"]), text, [], 64)
    )
    compiled = torch.compile(ak.factorizable_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, causal=True), ak.factorizable_attention(*tensors, causal=True))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("AK402", {"q": None}),
        ("AK403", {"k": torch.zeros(2, 2, 37, 6)}),
        ("AK404", {"v": torch.zeros(2, 2, 37, 7, dtype=torch.float16)}),
        ("AK407", {"v": torch.zeros(2, 4, 37, 7)}),
        ("AK407", {"q": torch.zeros(2, 3, 37, 5)}),
        ("AK401", {"order": 3}),
        ("AK401", {"qk_norm": "seqmax"}),
        ("AK408", {"order": 1, "qk_norm": "layer"}),
        ("AK408", {"order": 1, "temperature": 0.5}),
        ("AK401", {"temperature": 0.0}),
        ("AK402", {"temperature": "1"}),
        ("AK401", {"coefficients": (1.0, 1.0)}),
        ("AK401", {"coefficients": (1.0, 1.0, float("inf"))}),
        ("AK402", {"causal": 1}),
        ("AK402", {"initial_state": torch.zeros(2, 2, 31, 7)}),
        ("AK403", {"initial_state": (torch.zeros(2, 2, 30, 7), torch.zeros(2, 2, 31))}),
        ("AK502", {"q": torch.zeros(1, 1, 2, 300), "k": torch.zeros(1, 1, 2, 300), "v": torch.zeros(1, 1, 2, 4)}),
    ],
)  # fmt: skip
def test_errors(code: str, change: Named) -> None:
    with pytest.raises(ak.AttnkitError) as caught:
        ak.factorizable_attention(**(problem("fastmax2") | change))
    assert caught.value.code == code


def test_explain_says_what_is_kept() -> None:
    given = problem("fastmax2", size="whole") | {"causal": True}
    (call,) = ak.explain(ak.factorizable_attention, **given).calls
    assert (call.backend, call.config) == ("cpu", {"chunk": 64})
    rows = 1 + 32 + 32 * 32
    assert (
        f"a state of {rows} x 16 and its norm for each of 2 heads, {2 * 2 * rows * 17 * 4:,} bytes"
        in call.notes[0]
    )
