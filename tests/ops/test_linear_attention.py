"""ak.linear_attention on the engine: against the equation in float64, forwards and backwards; states; limits; errors."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.variants import linear

pytestmark = pytest.mark.shows
HEADS = {
    "equal": (2, 2, 2),
    "grouped queries": (4, 2, 2),
    "grouped keys": (2, 2, 4),
    "one query": (1, 1, 3),
}  # q, k, v
SIZES = {"odd": (37, 5, 7), "whole": (150, 64, 32), "one token": (1, 16, 16)}  # tokens, head_dim, v_head_dim
each_case = pytest.mark.parametrize("name", linear.CASES)
Named = dict[str, Any]

# --- the equation, one token at a time: differentiable, in any precision ------------------------------------

Results = tuple[Tensor, Tensor, Tensor]


def mapped(x: Tensor, qk_norm: str | None, feature_map: str) -> Tensor:
    if qk_norm == "l2":
        x = x / x.norm(dim=-1, keepdim=True)
    elif qk_norm == "layer":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.nn.functional.elu(x) + 1 if feature_map == "elu1" else x


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor | None = None, beta: Tensor | None = None,
    bonus: Tensor | None = None, initial_state: Any = None, feature_map: str = "identity", qk_norm: str | None = None,
    normalize: bool = False, causal: bool = True, cu_seqlens: Tensor | None = None,
) -> Results:  # fmt: skip
    """o, the last states, and their norms."""
    batch, q_heads, length, dim = q.shape
    heads, v_dim = v.shape[1], v.shape[3]
    q = mapped(q, qk_norm, feature_map) * dim**-0.5
    k = mapped(k, qk_norm, feature_map).repeat_interleave(heads // k.shape[1], 1)
    q = q.repeat_interleave(max(1, heads // q_heads), 1).unflatten(1, (heads, -1))
    decay = torch.ones(batch, heads, length, 1, dtype=q.dtype)
    if gate is not None:
        gate = gate[None, :, None] if gate.dim() == 1 else gate
        decay = (gate if gate.dim() == 4 else gate[..., None]).exp().expand(batch, heads, length, -1)
    initial, initial_norm = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    cuts = [] if cu_seqlens is None else cu_seqlens.tolist()
    spans = (
        list(zip([0] * len(cuts), cuts, cuts[1:], strict=False))
        if cuts
        else [(b, 0, length) for b in range(batch)]
    )
    rows, states, norms = [], [], []
    for n, (b, first, end) in enumerate(spans):
        state = torch.zeros(heads, dim, v_dim, dtype=q.dtype) if initial is None else initial[n]
        norm = torch.zeros(heads, dim, dtype=q.dtype) if initial_norm is None else initial_norm[n]

        def read(t: int, state: Tensor, norm: Tensor, b: int = b) -> Tensor:
            o = torch.einsum("hgd,hdv->hgv", q[b, :, :, t], state)
            return o / torch.einsum("hgd,hd->hg", q[b, :, :, t], norm)[..., None] if normalize else o

        for t in range(first, end):
            key, value, e = k[b, :, t], v[b, :, t], decay[b, :, t]
            if bonus is not None:
                rows.append(read(t, state + (bonus * key)[..., None] * value[:, None], norm))
            state, norm = state * e[..., None], norm * e
            if beta is not None:
                value = (value - torch.einsum("hd,hdv->hv", key, state)) * beta[b, :, t, None]
            state, norm = state + key[..., None] * value[:, None], norm + key
            if bonus is None and causal:
                rows.append(read(t, state, norm))
        rows += [] if causal else [read(t, state, norm) for t in range(first, end)]
        states.append(state)
        norms.append(norm)
    o = torch.stack(rows).view(-1, length, heads * q.shape[2], v_dim).transpose(1, 2)
    return o, torch.stack(states), torch.stack(norms)


# --- calls --------------------------------------------------------------------------------------------------


def tensor(x: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)) if isinstance(x, np.ndarray) else x


def problem(
    name: str,
    heads: str = "equal",
    size: str = "whole",
    *,
    packed: bool = False,
    initial: bool = False,
    seed: int = 0,
) -> Named:
    """The arguments of a call, float32."""
    rng = np.random.default_rng(seed)
    (length, dim, v_dim), (q_heads, k_heads, v_heads) = SIZES[size], HEADS[heads]
    batch = 1 if packed else 2
    given: Named = {
        x: rng.standard_normal((batch, h, length, d))
        for x, h, d in (("q", q_heads, dim), ("k", k_heads, dim), ("v", v_heads, v_dim))
    }
    given |= linear.CASES[name](batch, v_heads, length, dim, rng)
    given = {"feature_map": "identity", "normalize": False} | {x: tensor(t) for x, t in given.items()}
    given.pop("epsilon", None)
    states = batch
    if packed:
        given["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32)
        states = 3
    if initial:
        state = torch.from_numpy(rng.standard_normal((states, v_heads, dim, v_dim), np.float32))
        norm = torch.from_numpy(rng.random((states, v_heads, dim), np.float32))
        given["initial_state"] = (state, norm) if given["normalize"] else state
    return given


def run(given: Named, **more: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    o, state = ak.linear_attention(**given, return_state=True, **more)
    return (o, *state) if isinstance(state, tuple) else (o, state, None)


def leaves_of(given: Named, dtype: torch.dtype) -> tuple[Named, list[Tensor]]:
    """The call in another precision, and everything in it that takes a gradient."""
    leaves: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(leaf, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.detach().to(dtype).requires_grad_())
        return leaves[-1]

    return {name: leaf(x) for name, x in given.items()}, leaves


def everything(function: Callable[..., Any], given: Named, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients, with a cotangent of every result."""
    call, leaves = leaves_of(given, dtype)
    results = [x for x in function(call) if x is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


def equation(call: Named) -> Any:
    o, state, norm = recurrent(**call)
    return o, state, norm if call["normalize"] else None


def close(found: list[Tensor], given: Named, factor: float = 2.0) -> None:
    """Errors at most twice those of the equation in float32, and two units in the last place of the largest element."""
    close_to(expected(given), found, given, factor)


def expected(given: Named) -> list[list[Tensor]]:
    return [everything(equation, given, dtype) for dtype in (torch.float32, torch.float64)]


def close_to(expected: list[list[Tensor]], found: list[Tensor], given: Named, factor: float = 2.0) -> None:
    for mine, other, true in zip(found, *expected, strict=True):
        assert mine.shape == true.shape
        summed = (
            given["v"][0, 0].shape[0] * given["v"].shape[0] if true.dim() == 1 else 1
        )  # a gate for all tokens
        allowed = factor * (other - true).abs().max() + 8 * summed * 2.0**-23 * true.abs().max()
        assert (mine - true).abs().max() <= allowed


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("heads", HEADS)
@each_case
def test_call_and_gradients_are_the_equations(name: str, heads: str, initial: bool) -> None:
    given = problem(name, heads, "odd", initial=initial)
    close(everything(run, given, torch.float32), given)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@each_case
def test_on_every_instruction_set(name: str, packed: bool, each_isa: Callable[[], Iterator[str]]) -> None:
    given = problem(name, packed=packed, initial=True)
    want = expected(given)
    for _ in each_isa():
        close_to(want, everything(run, given, torch.float32), given)


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["linear_attn", "simple_gla", "gated_delta_rule", "kda"])
def test_every_chunk_size_means_the_same(name: str, chunk: int) -> None:
    given = problem(name, initial=True)
    close(everything(lambda call: run(call, chunk_size=chunk), given, torch.float32), given)


@each_case
def test_one_token_from_a_state(name: str) -> None:
    given = problem(name, size="one token", initial=True)
    close(everything(run, given, torch.float32), given)


def part(given: Named, tokens: slice) -> Named:
    """The call on a stretch of tokens."""
    of_tokens = ("q", "k", "v", "beta", *(["gate"] if "gate" in given and given["gate"].dim() > 1 else []))
    return {name: x[:, :, tokens] if name in of_tokens else x for name, x in given.items()}


@pytest.mark.parametrize("cut", [1, 16, 63, 64, 149])
@pytest.mark.parametrize("name", [name for name in linear.CASES if not name.endswith("_full")])
def test_a_state_carries_the_sequence_on(name: str, cut: int) -> None:
    given = problem(name)
    o, state, norm = run(given)
    first_o, first, first_norm = run(part(given, slice(cut)))
    start = (first, first_norm) if given["normalize"] else first
    rest_o, last, last_norm = run(part(given, slice(cut, None)) | {"initial_state": start})
    torch.testing.assert_close(torch.cat([first_o, rest_o], 2), o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)
    if norm is not None and last_norm is not None:
        torch.testing.assert_close(last_norm, norm, rtol=1e-5, atol=1e-5)


@each_case
def test_packed_is_each_sequence_alone_to_the_bit(name: str) -> None:
    given = problem(name, packed=True, initial=True)
    found = everything(run, given, torch.float32)
    cuts = given.pop("cu_seqlens").tolist()
    for n in range(3):
        alone = part(given, slice(cuts[n], cuts[n + 1]))
        held = alone.pop("initial_state")
        alone["initial_state"] = (
            tuple(x[n : n + 1] for x in held) if isinstance(held, tuple) else held[n : n + 1]
        )
        o, state, _ = run(alone)
        assert torch.equal(o, found[0][:, :, cuts[n] : cuts[n + 1]])
        assert torch.equal(state[0], found[1][n])


@each_case
def test_threads_and_neighbours_change_no_bit(name: str) -> None:
    given = problem(name, initial=True)
    once = everything(run, given, torch.float32)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    assert all(map(torch.equal, everything(run, given, torch.float32), once))
    one = {x: t[1:] if isinstance(t, Tensor) and t.dim() > 2 else t for x, t in given.items()}
    if isinstance(given["initial_state"], tuple):
        one["initial_state"] = tuple(t[1:] for t in given["initial_state"])
    assert torch.equal(run(one)[0], once[0][1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_case
def test_short_floats_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    given = problem(name, initial=True)
    for x in "qkv":
        given[x] = given[x].to(dtype)
    o, state, _ = run(given)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    wide = {x: t.float() if x in "qkv" else t for x, t in given.items()}
    full, state_full, _ = run(wide)
    torch.testing.assert_close(o, full.to(dtype), rtol=0, atol=0)
    assert torch.equal(state, state_full)
    call, leaves = leaves_of({x: given[x] for x in "qkv"}, dtype)
    grads = torch.autograd.grad(run({**given, **call})[0].float().sum(), leaves)
    call, leaves = leaves_of({x: wide[x] for x in "qkv"}, torch.float32)
    for d, expected in zip(grads, torch.autograd.grad(run({**wide, **call})[0].sum(), leaves), strict=True):
        torch.testing.assert_close(d.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


# --- limits -------------------------------------------------------------------------------------------------


def test_no_decay_is_no_gate() -> None:
    given = problem("linear_attn") | {"feature_map": "identity", "normalize": False}
    plain = run(given)[0]
    for shape in ((2,), (2, 2, 150)):
        assert torch.equal(run(given | {"gate": torch.zeros(shape)})[0], plain)


def test_equal_channels_are_one_gate() -> None:
    given = problem("simple_gla")
    spread = given | {"gate": given["gate"][..., None].expand(-1, -1, -1, 64)}
    torch.testing.assert_close(run(spread)[0], run(given)[0], rtol=1e-4, atol=1e-5)
    delta = problem("gated_delta_rule")
    spread = delta | {"gate": delta["gate"][..., None].expand(-1, -1, -1, 64)}
    torch.testing.assert_close(run(spread)[0], run(delta)[0], rtol=1e-4, atol=1e-5)


def test_no_gate_is_the_delta_rule_and_no_beta_only_decays() -> None:
    given = problem("delta_rule", initial=True)
    torch.testing.assert_close(run(given | {"gate": torch.zeros(2, 2, 150)})[1], run(given)[1])
    gate = -torch.rand(2, 2, 150) * 0.1
    still = run(given | {"gate": gate, "beta": torch.zeros(2, 2, 150)})[1]
    torch.testing.assert_close(
        still, given["initial_state"] * gate.sum(2).exp()[..., None, None], rtol=1e-4, atol=1e-6
    )


def test_the_delta_rule_recalls_orthonormal_keys() -> None:
    k = torch.linalg.qr(torch.randn(2, 2, 64, 64))[0]
    v = torch.randn(2, 2, 64, 32)
    _, state = ak.linear_attention(k, k, v, beta=torch.ones(2, 2, 64), return_state=True)
    torch.testing.assert_close(k @ state, v, rtol=1e-4, atol=1e-4)


def test_outputs_of_positive_features_are_averages() -> None:
    given = problem("linear_attn")
    o = run(given)[0]
    assert (o <= given["v"].cummax(2).values + 1e-5).all()
    assert (o >= given["v"].cummin(2).values - 1e-5).all()


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule", "kda", "rwkv6"])
def test_a_gate_of_minus_infinity_forgets_exactly(name: str) -> None:
    given = problem(name, initial=True)
    at = 77
    given["gate"][:, :, at] = -torch.inf
    other = {x: t.clone() if isinstance(t, Tensor) else t for x, t in given.items()}
    last = at + (name == "rwkv6")  # which reads before it forgets
    for x in "kv":
        other[x][:, :, :at] += 1
    other["initial_state"] += 1
    found, expected = everything(run, given, torch.float32), everything(run, other, torch.float32)
    assert torch.equal(found[0][:, :, last:], expected[0][:, :, last:])
    assert torch.equal(found[1], expected[1])
    assert all(x.isfinite().all() for x in found)
    call, _ = leaves_of(given, torch.float32)
    gate, state = call["gate"], call["initial_state"]
    d_gate, d_state = torch.autograd.grad(run(call)[0][:, :, last:].sum(), (gate, state))
    assert (d_gate[:, :, : at + 1] == 0).all()
    assert (d_state == 0).all()


@pytest.mark.parametrize("name", ["linear_attn", "simple_gla", "gla", "gated_delta_rule", "kda"])
def test_nan_reaches_no_earlier_token_and_no_other_sequence(name: str) -> None:
    given = problem(name, packed=True)
    clean = run(given)[0]
    for x in "qkv":
        given[x][:, :, 30] = torch.nan
    found = run(given)[0]
    assert torch.equal(found[:, :, :30], clean[:, :, :30])
    assert found[:, :, 30].isnan().all()
    assert torch.equal(found[:, :, 50:], clean[:, :, 50:])
    call, _ = leaves_of(given, torch.float32)
    o = run(call)[0]
    cotangent = torch.ones_like(o)
    cotangent[:, :, 90] = torch.inf  # which reaches what it sees, and no later token
    for d in torch.autograd.grad(o, [call[x] for x in "qkv"], cotangent):
        assert d[:, :, 91:].isfinite().all()


LONG = {  # members whose states neither grow nor vanish, of keys of length 1
    "delta rule": ("beta",), "gated delta rule": ("beta", "gate"), "gate for each token": ("gate",), "channel gate": ("gates",),
}  # fmt: skip


@pytest.mark.parametrize("names", LONG.values(), ids=list(LONG))
def test_a_long_sequence_does_not_drift(names: tuple[str, ...]) -> None:
    """After 10^5 tokens a float32 state is as near to the float64 one as after 10^4; of bfloat16 tokens likewise."""
    generator = torch.Generator().manual_seed(0)
    length = 100_000
    k = torch.nn.functional.normalize(torch.randn(1, 1, length, 16, generator=generator), dim=-1)
    v = torch.randn(1, 1, length, 16, generator=generator)
    beside = {
        "beta": torch.rand(1, 1, length, generator=generator),
        "gate": -0.01 * torch.rand(1, 1, length, generator=generator),
        "gates": -0.01 * torch.rand(1, 1, length, 16, generator=generator),
    }
    given = {"q": k, "k": k, "v": v} | {name.rstrip("s"): beside[name] for name in names}

    def drift(dtype: torch.dtype) -> list[float]:
        """The largest error of the state after 10^4 and after 10^5 tokens, relative to its largest element."""
        short = {x: t.to(dtype) if x in "qkv" else t for x, t in given.items()}
        exact: Any = {x: t.double().numpy() for x, t in short.items()}
        found, errors, state = [None, None], [], None
        for part_of in (slice(0, 10_000), slice(10_000, length)):
            tokens = {x: t[:, :, part_of] for x, t in short.items()}
            found = list(ak.linear_attention(**tokens, initial_state=found[1], return_state=True))  # type: ignore[arg-type]
            start = {} if state is None else {"initial_state": state}
            state = linear.chunked(
                chunk_size=16, **{x: t[:, :, part_of] for x, t in exact.items()}, **start
            ).state
            errors.append(float(np.abs(found[1].numpy() - state).max() / np.abs(state).max()))  # type: ignore[attr-defined]
        return errors

    for dtype in (torch.float32, torch.bfloat16):
        early, late = drift(dtype)
        assert late < 3 * early + 1e-6
        assert late < 5e-6


@pytest.mark.parametrize("name", [name for name in linear.CASES if not name.endswith("_full")])
def test_token_by_token_is_the_whole(name: str) -> None:
    given = problem(name, size="odd")
    whole, last, last_norm = run(given)
    rows, start = [], {}
    for t in range(37):
        o, state, norm = run(part(given, slice(t, t + 1)) | start)
        start = {"initial_state": (state, norm) if given["normalize"] else state}
        rows.append(o)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
    if norm is not None and last_norm is not None:
        torch.testing.assert_close(norm, last_norm, rtol=1e-5, atol=1e-5)
