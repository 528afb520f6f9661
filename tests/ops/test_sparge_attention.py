"""`ak.sparge_attention` on the engine: the family's equations, its limits and laws, and each trap of what is published."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.cpu.engine import engine
from attnkit.errors import AttnkitError
from attnkit.ops import sparge_family as ops
from attnkit.variants import sparge

pytestmark = [pytest.mark.shows, pytest.mark.filterwarnings("ignore:sparge_attention:UserWarning")]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Where a code is rounded to its neighbour, because float32 and float64 differ.
ROUNDING = 1.5e-2
EVERYTHING: list[Any] = [{"topk": 1.0}, {"cdf": 1.0}, {"similarity": 1.0}, {"topk": 0.1, "similarity": 1.5}]
PLAIN: Any = {"int8": False, "smooth_k": False}


@pytest.fixture(params=engine().isa_levels())
def level(request: pytest.FixtureRequest) -> Any:
    before = engine().current_isa()
    engine().set_isa(request.param)
    yield request.param
    engine().set_isa(before)


def structured(
    rng: np.random.Generator, q_len: int, kv_len: int, heads: tuple[int, int] = (4, 2)
) -> list[Tensor]:
    """Tokens that resemble their neighbours, in stretches: tiles that are coherent and some that are not."""
    inputs = []
    for h, length, d in ((heads[0], q_len, 32), (heads[1], kv_len, 32), (heads[1], kv_len, 24)):
        centres = rng.standard_normal((1, h, -(-length // 48), d))
        x = np.repeat(centres, 48, axis=2)[:, :, :length] + 0.5 * rng.standard_normal((1, h, length, d))
        inputs.append(torch.from_numpy(x.astype(np.float32)))
    return inputs


def call(inputs: list[Tensor], **parameters: Any) -> tuple[Tensor, Tensor]:
    found = ak.sparge_attention(*inputs, return_density=True, **parameters)
    assert isinstance(found, tuple)
    assert found[0].dtype == inputs[0].dtype
    assert found[1].dtype == torch.float32
    return found


def naive(inputs: list[Tensor], **parameters: Any) -> sparge.Results:
    return sparge.naive(*(x.detach().double().numpy() for x in inputs), **parameters)


def agree(found: Tensor, expected: Any, dtype: torch.dtype, *, int8: bool) -> None:
    tolerance = TOLERANCE[dtype] + (ROUNDING if int8 else 0)
    np.testing.assert_allclose(found.detach().double().numpy(), expected, atol=tolerance, rtol=tolerance)
    if int8:  # few are rounded to the other side
        assert np.linalg.norm(found.detach().double().numpy() - expected) <= TOLERANCE[dtype] * 20 * max(
            np.linalg.norm(expected), 1e-3
        )


# --- the equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sparge.CASES)
def test_it_is_the_equation(name: str, dtype: torch.dtype, rng: np.random.Generator, level: str) -> None:
    parameters = sparge.CASES[name] | {"pv_threshold": None}
    lengths = [(300, 300), (130, 400), (300, 130)] if level == engine().isa_levels()[-1] else [(140, 200)]
    for q_len, kv_len in [*lengths, (1, 1), (5, 130), (0, 3), (3, 0)]:
        inputs = [x.to(dtype) for x in structured(rng, q_len, kv_len)]
        o, density = call(inputs, **parameters)
        expected = naive(inputs, **parameters)
        agree(o, expected.o, dtype, int8=parameters.get("int8", True))
        np.testing.assert_allclose(density.numpy(), expected.density, atol=1e-6)


@pytest.mark.parametrize(("cdf", "count"), [(0.4, 1), (0.5, 1), (0.79, 1), (0.8, 2), (0.98, 3), (1.0, 4)])
def test_the_longest_prefix_within_the_mass(cdf: float, count: int) -> None:
    """The worked example: tiles of one direction whose logits are log p; just above, as exp and log round."""
    p = np.array([0.5, 0.3, 0.15, 0.05])[[2, 0, 3, 1]]
    k = torch.from_numpy(np.repeat(np.log(p), 64).astype(np.float32)).reshape(1, 1, 256, 1)
    _, density = call([torch.ones(1, 1, 1, 1), k, k], cdf=min(cdf + 1e-5, 1.0), similarity=-1.0, **PLAIN)
    assert density.item() == count / 4


@pytest.mark.parametrize(("topk", "tiles", "count"), [(0.5, 5, 2), (0.1, 5, 1), (1.0, 5, 5), (0.75, 4, 3)])
def test_top_k_is_a_fraction_of_all(topk: float, tiles: int, count: int) -> None:
    k = torch.arange(tiles * 64).reshape(1, 1, -1, 1) // 64 + 1.0
    o, density = call([torch.ones(1, 1, 1, 1), k, (k == tiles).float()], topk=topk, **PLAIN)
    assert density.item() == pytest.approx(count / tiles)
    assert o.item() > 0  # the largest is among them


def test_density_counts_live_tiles(rng: np.random.Generator) -> None:
    """300 queries and keys: 3 x 5 tiles, of which 2 + 4 + 5 are live under a causal mask."""
    inputs = structured(rng, 300, 300)
    for parameters, density in (
        ({"topk": 0.4}, 6 / 11),
        ({"topk": 1.0}, 1),
        ({"topk": 0.4, "similarity": 1.0}, 1),
    ):
        found = call(inputs, causal=True, **({"similarity": -1.0} | parameters))[1]
        np.testing.assert_allclose(found.numpy(), density, rtol=1e-6)


def test_heads_may_differ(rng: np.random.Generator) -> None:
    inputs = structured(rng, 300, 700)
    topk, similarity = [0.2, 0.5, 1.0, 0.9], [-1.0, -1.0, -1.0, 2.0]
    o, density = call(inputs, topk=topk, similarity=similarity)
    for h in range(4):
        alone, kept = call(inputs, topk=topk[h], similarity=similarity[h])
        assert torch.equal(o[:, h], alone[:, h])
        assert torch.equal(density[:, h], kept[:, h])


# --- limits and laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parameters", EVERYTHING, ids=str)
def test_the_dense_limit_is_dense(
    parameters: Any, causal: bool, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Published, a mass of 1 does not promise everything: the running sum in float32 passes it. Here it does, to the bit."""
    inputs = [x.to(dtype) for x in structured(rng, 257, 700)]
    exact = ak.dense_attention(*inputs, causal=causal)
    o, density = call(inputs, causal=causal, **parameters, **PLAIN)
    assert torch.equal(o, exact)
    assert (density == 1).all()
    quantised, density = call(inputs, causal=causal, **parameters)
    assert torch.equal(quantised, call(inputs, causal=causal, topk=1.0)[0])
    assert (density == 1).all()
    error = (quantised.double() - exact.double()).norm() / exact.double().norm()
    assert error < 0.03


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_dense_limit_are_dense(causal: bool, rng: np.random.Generator) -> None:
    inputs = [x.requires_grad_() for x in structured(rng, 257, 700)]
    found, expected = (
        torch.autograd.grad(o.square().sum(), inputs)
        for o in (
            call(inputs, causal=causal, topk=1.0, **PLAIN)[0],
            ak.dense_attention(*inputs, causal=causal),
        )
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sparge.CASES)
def test_constant_values_survive_any_selection(
    name: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    q, k, v = (x.to(dtype) for x in structured(rng, 300, 300))
    constant = v[:, :, :1].expand(v.shape)
    o, _ = call([q, k, constant], **sparge.CASES[name])
    lse_dead = torch.from_numpy(naive([q, k, constant], **sparge.CASES[name]).lse == -np.inf)
    wanted = constant.repeat_interleave(2, dim=1).masked_fill(lse_dead[..., None], 0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cdf", [0.3, 0.7, 0.9])
def test_kept_mass_does_not_exceed_the_cdf(cdf: float, dtype: torch.dtype, rng: np.random.Generator) -> None:
    narrow = [x.to(dtype) for x in structured(rng, 700, 1500, (2, 2))]
    q, k, _ = (x.float() for x in narrow)
    chosen = ops.choose(*narrow[:2], ops.predictions_of(2, None, cdf, -1.0), causal=False, smooth=True)
    mean = [
        torch.stack([part.mean(2) for part in x.split(tile, 2)], 2)
        for x, tile in ((q, 128), (k - k.mean(2, keepdim=True), 64))
    ]
    p = torch.softmax(32**-0.5 * mean[0].double() @ mean[1].double().mT, -1)
    kept = (p * chosen).sum(-1)
    assert ((kept <= cdf + 1e-5) | (chosen.sum(-1) == 1)).all()
    assert (kept + (p * ~chosen).amax(-1) > cdf - 1e-5).all()


def test_an_offset_of_all_keys_changes_little(rng: np.random.Generator) -> None:
    """Smoothing takes it out before codes are made, and before tiles are predicted."""
    q, k, v = structured(rng, 300, 700)
    offset = 30 * torch.from_numpy(rng.standard_normal(32).astype(np.float32))
    errors = []
    for smooth in (True, False):
        o = call([q, k + offset, v], topk=1.0, smooth_k=smooth)[0]
        errors.append(float((o - ak.attention(q, k, v)).norm()))
    assert errors[0] < errors[1] / 4
    assert torch.equal(
        call([q, k + 4, v], topk=0.3)[1], call([q, k, v], topk=0.3)[1]
    )  # 4 is exact in these floats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipping_is_bounded(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """What is left out weighs at most 2^-t of the largest, each key of it; o moves by no more than twice that."""
    q, k, v = structured(rng, 200, 1500, (2, 2))
    q[..., 0] += 6
    k[..., 0] += torch.from_numpy(np.repeat(3 * rng.standard_normal(24), 64)[:1500].astype(np.float32))
    inputs = [x.to(dtype) for x in (q, k, v)]
    moved = []
    for threshold in (3.0, 8.0, 30.0):
        whole, skipped = (call(inputs, topk=1.0, int8=False, pv_threshold=t)[0] for t in (None, threshold))
        moved.append(float((whole.double() - skipped.double()).abs().max()))
        assert moved[-1] <= 2 * 1500 * 2.0**-threshold * float(v.abs().max()) + TOLERANCE[dtype]
        if dtype == torch.float32:
            expected = naive(inputs, topk=1.0, int8=False, pv_threshold=threshold)
            agree(skipped, expected.o, dtype, int8=False)
    assert moved[0] > 0.01  # something was left out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifting_the_logits_of_a_row_changes_nothing_that_is_skipped(
    dtype: torch.dtype, rng: np.random.Generator
) -> None:
    q, k, v = structured(rng, 200, 1500, (2, 2))
    q[..., 0] += 6
    k[..., 0] += torch.from_numpy(np.repeat(3 * rng.standard_normal(24), 64)[:1500].astype(np.float32))
    inputs = [x.to(dtype) for x in (q, k, v)]
    shift = torch.from_numpy(100 * rng.standard_normal(200).astype(np.float32)).round()
    select = ak.sparge(topk=1.0, int8=False, pv_threshold=3.0)
    whole = ak.attention(*inputs)
    o, moved = (
        ak.attention(*inputs, select=select, score=lambda s, b, h, i, j, by=by: s + by[i])  # type: ignore[misc]
        for by in (torch.zeros(200), shift)
    )
    assert (
        o - whole
    ).abs().max() > 0.01  # something was left out: had it been other tiles, o would be that far off
    torch.testing.assert_close(moved, o, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tiles_are_less_error(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """By the family's own measures: relative L1, root mean square, cosine."""
    inputs = [x.to(dtype) for x in structured(rng, 300, 1000)]
    exact = ak.attention(*(x.double() for x in inputs), backend="reference")
    errors = []
    for topk in (0.2, 0.5, 1.0):
        o = call(inputs, topk=topk, similarity=-1.0)[0].double()
        off = o - exact
        cosine = torch.nn.functional.cosine_similarity(o.flatten(), exact.flatten(), dim=0)
        errors.append([off.abs().sum() / exact.abs().sum(), off.square().mean().sqrt(), 1 - cosine])
    assert (np.diff(errors, axis=0) < 0).all()
    assert max(errors[2]) < 0.02


# --- traps of what is published ---------------------------------------------------------------------------


def test_causal_is_exact_inside_tiles(rng: np.random.Generator) -> None:
    """Published, some entry points enforce it at tiles alone: diagonal tiles see the future. Lengths may differ, too."""
    for q_len, kv_len in ((300, 300), (200, 500)):
        q, k, v = structured(rng, q_len, kv_len)
        for parameters in ({"topk": 0.3}, {"topk": 1.0}, {"cdf": 0.8}):
            o = call([q, k, v], causal=True, int8=False, smooth_k=False, **parameters)[0]
            later = [k.clone(), v.clone()]
            at = kv_len - q_len + 70  # the middle of a tile
            for t in later:
                t[:, :, at + 1 :] += 100
            moved = call([q, *later], causal=True, int8=False, smooth_k=False, **parameters)[0]
            if parameters == {"topk": 1.0}:
                assert torch.equal(o[:, :, :71], moved[:, :, :71])
            sees = torch.zeros_like(v)
            sees[:, :, at + 1 :] = 1  # what a query before has of it is 0
            assert (call([q, k, sees], causal=True, **parameters)[0][:, :, :71] == 0).all()


def test_early_rows_keep_everything_late_ones_a_number(rng: np.random.Generator) -> None:
    """Under a causal mask the share is of all tiles, as published: 5 of 10."""
    q, k, _ = structured(rng, 640, 640)
    chosen = ops.choose(q, k, ops.predictions_of(4, 0.5, None, -1.0), causal=True, smooth=True)
    assert chosen.sum(-1).tolist() == [[[2, 4, 5, 5, 5]] * 4]


def test_tokens_of_zeros_are_kept(rng: np.random.Generator) -> None:
    """Published, 0 / 0 in a cosine forces a tile by accident; here a token without a direction makes it incoherent."""
    q, k, v = structured(rng, 128, 640)
    k[:, :, 70] = 0
    o, density = call([q, k, v], topk=0.2, similarity=-1.0, smooth_k=False)
    assert torch.isfinite(o).all()
    np.testing.assert_allclose(density.numpy(), 3 / 10)
    zeros = [torch.zeros_like(q), torch.zeros_like(k), v]
    o, density = call(zeros, topk=0.2)
    torch.testing.assert_close(
        o, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(o.shape), atol=1e-5, rtol=0
    )
    assert (density == 1).all()


def test_a_row_whose_tiles_are_all_incoherent_keeps_them(rng: np.random.Generator) -> None:
    """Published, its softmax is of nothing, and NaN."""
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, 640, 32)).astype(np.float32)) for _ in range(3))
    o, density = call([q, k, v], topk=0.2, similarity=0.9, int8=False)
    assert (density == 1).all()
    torch.testing.assert_close(o, ak.attention(q, k, v))


def test_smoothing_may_be_left_out_and_changes_no_argument(rng: np.random.Generator) -> None:
    """Published, smooth_k = False raises, and a relative writes the mean into the caller's keys."""
    inputs = structured(rng, 200, 300)
    before = [x.clone() for x in inputs]
    for smooth in (True, False):
        call(inputs, smooth_k=smooth)
        assert all(map(torch.equal, inputs, before))


def test_what_is_not_a_number_reaches_who_sees_it(rng: np.random.Generator) -> None:
    inputs = structured(rng, 300, 300)
    inputs[1][0, 0, 10, 3] = float("nan")
    o, _ = call(inputs, topk=0.5)
    assert o[0, :2].isnan().all()
    assert torch.isfinite(o[0, 2:]).all()


# --- the call ---------------------------------------------------------------------------------------------


def test_causal_with_smoothed_codes_warns_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = structured(rng, 64, 64)
    monkeypatch.setattr(ops, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(inputs, causal=True, smooth_k=False)
        call(inputs, causal=True, int8=False)
        call(inputs)
    with pytest.warns(UserWarning, match="prefill"):
        call(inputs, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(inputs, causal=True)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("AK401", {"topk": 0.0}), ("AK401", {"topk": 1.5}), ("AK401", {"cdf": -1}), ("AK401", {"scale": 0.0}),
        ("AK401", {"pv_threshold": 0}), ("AK402", {"topk": "half"}), ("AK402", {"causal": 1}), ("AK402", {"int8": None}),
        ("AK403", {"topk": [0.5] * 3}), ("AK408", {"topk": 0.5, "cdf": 0.9}),
    ],
)  # fmt: skip
def test_wrong_arguments(code: str, wrong: Any, rng: np.random.Generator) -> None:
    with pytest.raises(AttnkitError, match=code):
        call(structured(rng, 20, 20), **wrong)


def test_gradients_are_those_of_the_chosen_tiles(rng: np.random.Generator) -> None:
    """The choice has none, and the rounding of codes lets them through."""
    inputs = [x.requires_grad_() for x in structured(rng, 200, 300)]
    o, _ = call(inputs, topk=0.4, similarity=-1.0)
    d_o = torch.from_numpy(rng.standard_normal(o.shape).astype(np.float32))
    o.backward(d_o)
    chosen = ops.choose(*inputs[:2], ops.predictions_of(4, 0.4, None, -1.0), causal=False, smooth=True)
    mask = chosen.repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :200, :300]
    others = [x.detach().double().requires_grad_() for x in inputs]
    torch.nn.functional.scaled_dot_product_attention(*others, attn_mask=mask, enable_gqa=True).backward(
        d_o.double()
    )
    for x, y in zip(inputs, others, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad).norm() < 0.03 * y.grad.norm()
    with pytest.raises(AttnkitError, match="AK503"):
        call(inputs, pv_threshold=20.0)


def test_no_thread_changes_a_bit(rng: np.random.Generator) -> None:
    inputs = structured(rng, 400, 900)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call(inputs, cdf=0.8, similarity=0.1, pv_threshold=8.0))
    for o, density in found[1:]:
        assert torch.equal(o, found[0][0])
        assert torch.equal(density, found[0][1])


@pytest.mark.slow
def test_in_a_graph(rng: np.random.Generator) -> None:
    inputs = structured(rng, 200, 300)
    compiled = torch.compile(
        lambda *x: ak.sparge_attention(*x, causal=True, return_density=True),
        fullgraph=True,
        backend="aot_eager",
    )
    for found, expected in zip(compiled(*inputs), call(inputs, causal=True), strict=True):
        torch.testing.assert_close(found, expected)


# --- as a choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_as_a_choice_it_is_the_same(causal: bool, rng: np.random.Generator) -> None:
    inputs = structured(rng, 300, 300)
    for parameters in (
        {"topk": 0.4},
        {"cdf": 0.8},
        {"topk": 1.0},
        {"topk": [0.2, 0.4, 0.6, 1.0], "int8": False},
    ):
        found = ak.attention(*inputs, select=ak.sparge(causal=causal, **parameters))
        assert torch.equal(found, call(inputs, causal=causal, **parameters)[0])
    skipping: Any = {"topk": 0.6, "pv_threshold": 6.0}
    assert torch.equal(ak.attention(*inputs, select=ak.sparge(**skipping)), call(inputs, **skipping)[0])


def test_as_a_choice_beside_scores_masks_and_a_sink(rng: np.random.Generator) -> None:
    q, k, v = structured(rng, 200, 300)
    sink = torch.zeros(4)
    given: Any = {
        "score": ak.softcap(2.0),
        "mask": ak.window(90, 40),
        "normalizer": ak.softmax(sink),
        "return_lse": True,
    }
    for parameters in ({"topk": 0.4, "int8": False}, {"topk": 0.4}):
        o, lse = ak.attention(q, k, v, select=ak.sparge(**parameters), **given)
        wide = [x.double() for x in (q, k, v)]
        wanted = ak.attention(*wide, select=ak.sparge(**parameters), backend="reference", **given)
        int8 = parameters.get("int8", True)
        agree(o, wanted[0].numpy(), torch.float32, int8=int8)
        dead = torch.isinf(wanted[1])
        assert torch.equal(torch.isinf(lse), dead)
        agree(lse[~dead], wanted[1][~dead].numpy(), torch.float32, int8=int8)


def test_no_argument_of_the_call_is_ignored(rng: np.random.Generator) -> None:
    """Published, masks and dropout are taken and left out."""
    q, k, v = structured(rng, 200, 300)
    select = ak.sparge(topk=0.5, int8=False, smooth_k=False)
    chosen = ops.choose(q, k, ops.predictions_of(4, 0.5, None, None), causal=False, smooth=False).contiguous()

    def tiles(b: Any, h: Any, i: Any, j: Any) -> Any:
        return chosen[b, h, i // 128, j // 64]

    results = []
    for given in ({"select": select, "mask": ak.window(50, 20)}, {"mask": ak.window(50, 20) & tiles}):
        torch.manual_seed(3)
        results.append(ak.attention(q, k, v, dropout_p=0.4, scale=0.3, **given))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], ak.attention(q, k, v, select=select, scale=0.3))


def test_what_goes_with_no_choice(rng: np.random.Generator) -> None:
    inputs = structured(rng, 20, 20)
    with pytest.raises(AttnkitError, match="AK408"):
        ak.attention(*inputs, select=ak.sparge(), kv_lens=torch.tensor([7], dtype=torch.int32))
    with pytest.raises(AttnkitError, match="AK226"):
        ak.attention(*inputs, select=ak.sparge(pv_threshold=9.0), dropout_p=0.1)
    with pytest.raises(AttnkitError, match="AK401"):
        ak.sparge(pv_threshold=-1.0)
