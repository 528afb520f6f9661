"""The backward kernels against the float64 reference, and against how close the naive float32 computation comes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit.backends import get
from attnkit.ops.traced import Traceable
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv

TILES = {"dq_tile_q": 64, "dq_tile_kv": 64, "dkv_tile_q": 64, "dkv_tile_kv": 64}


def gradients(
    kernel: Any, tensors: list[Any], buffers: list[Any], params: list[float], d_o: Any, d_lse: Any, seed: Any,
    of_buffers: bool = True,
) -> Any:  # fmt: skip
    q, k, v = tensors
    o, lse = q.new_full((*q.shape[:3], v.shape[3]), float("nan")), torch.full(q.shape[:3], float("nan"))
    kernel(q, k, v, o, lse, buffers, params, 1, seed)
    dq, dk, dv = (torch.zeros_like(x) for x in tensors)
    d_buffers = [torch.zeros(b.shape) if of_buffers and b.is_floating_point() else None for b in buffers]
    kernel.backward(q, k, v, o, lse, buffers, params, d_o, d_lse, dq, dk, dv, d_buffers, 1, seed)
    return [dq, dk, dv, *(d for d in d_buffers if d is not None)]


@pytest.fixture
def agree(build: Callable[..., Any], rng: np.random.Generator) -> Callable[..., None]:
    """``agree(dims, **fields of Traceable)``: all gradients are as close to float64 as float32 rounding explains."""

    def run(
        dims: Dims,
        *,
        dtype: str = "float32",
        plant: Any = None,
        d_lse: bool = True,
        seed: Any = None,
        of_buffers: bool = True,
        **fields: Any,
    ) -> None:
        arrays = qkv("gaussian", rng, dims, dtype)
        d_o = rng.standard_normal((*arrays[0].shape[:3], arrays[2].shape[3])).astype(np.float32)
        of_lse = rng.standard_normal(arrays[0].shape[:3]).astype(np.float32) if d_lse else None
        if plant is not None:
            plant(*arrays, d_o)
        tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]
        traced = Traceable(fields.pop("score", None), fields.pop("mask", None), **fields)
        kernel, buffers, params = build(traced, tensors[0], tensors[2], TILES)
        cotangents = (
            torch.from_numpy(d_o).to(tensors[0].dtype),
            None if of_lse is None else torch.from_numpy(of_lse),
        )
        got = gradients(kernel, tensors, buffers, params, *cotangents, seed, of_buffers)
        spec = KernelSpec(kernel.spec.program, "float64", dims.head_dim, dims.v_head_dim, "cpu")
        reference = get("reference").build(spec, {})
        doubles = [t.double() for t in tensors]
        o, lse = reference_forward(reference, doubles, buffers, params, seed)
        want = [torch.zeros_like(x) for x in doubles]
        d_buffers = [
            torch.zeros(b.shape, dtype=torch.float64) if of_buffers and b.is_floating_point() else None
            for b in buffers
        ]
        reference.backward(  # type: ignore[attr-defined]
            *doubles,
            o,
            lse,
            buffers,
            params,
            cotangents[0].double(),
            cotangents[1],
            *want,
            d_buffers,
            1,
            seed,
        )
        for i, (mine, other) in enumerate(
            zip(got, [*want, *(d for d in d_buffers if d is not None)], strict=True)
        ):
            found, expected = mine.double().numpy(), other.numpy()
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(found), finite, err_msg=f"result {i}")
            size = float(np.abs(np.where(finite, expected, 0)).max(initial=0))
            tolerance = {"float32": 4e-6, "float16": 4e-3}[dtype]
            error = float(np.abs(np.where(finite, found - expected, 0)).max(initial=0))
            assert error <= tolerance * max(size, 1.0), (
                f"result {i}: error {error:.3g}, largest element {size:.3g}"
            )

    return run


def reference_forward(
    reference: Any, tensors: list[Any], buffers: Any, params: Any, seed: Any
) -> tuple[Any, Any]:
    q, _, v = tensors
    o, lse = q.new_empty((*q.shape[:3], v.shape[3])), torch.empty(q.shape[:3])
    reference(*tensors, o, lse, buffers, params, 1, seed)
    return o, lse


SMALL = Dims(1, 2, 1, 70, 90, 16, 24)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gallery(variant: str, dtype: str, gallery: Any, agree: Callable[..., None]) -> None:
    _, fields = gallery(variant, SMALL)
    agree(SMALL, dtype=dtype, **fields)


def test_plain(agree: Callable[..., None]) -> None:
    agree(SMALL)
    agree(Dims(2, 2, 2, 64, 64, 16, 16), d_lse=False)


def test_no_keys(agree: Callable[..., None]) -> None:
    agree(Dims(1, 2, 1, 5, 3, 16, 16)._replace(kv_len=0))


def test_causal(agree: Callable[..., None]) -> None:
    agree(Dims(1, 4, 2, 130, 100, 16, 16), mask=ak.causal())


def test_window(agree: Callable[..., None]) -> None:
    agree(SMALL, mask=ak.window(20, 9))


def test_lists(agree: Callable[..., None]) -> None:
    agree(SMALL, mask=lambda b, h, q_idx, kv_idx: (q_idx // 16 + kv_idx // 16 + h) % 2 == 0)


def test_float16(agree: Callable[..., None]) -> None:
    agree(SMALL, dtype="float16", mask=ak.causal())


def test_softcap(agree: Callable[..., None]) -> None:
    agree(SMALL, score=ak.softcap(2.0), mask=ak.causal())


def test_the_least_float_is_a_score(agree: Callable[..., None]) -> None:
    least = float(np.finfo(np.float32).min)
    score = lambda s, b, h, q_idx, kv_idx: torch.where(kv_idx % 3 == h, least, s)  # noqa: E731
    agree(SMALL, score=score, mask=ak.window(20, 9))


def test_a_large_scale(agree: Callable[..., None]) -> None:
    agree(SMALL, scale=1.5, mask=ak.causal())


def test_sink(agree: Callable[..., None], rng: np.random.Generator) -> None:
    agree(SMALL, sink=torch.from_numpy(rng.standard_normal(2).astype(np.float32)), mask=ak.causal())


@pytest.mark.parametrize("shape", ["h", "bh", "hq", "k", "hk", "bhqk", "qk", "hqk", "1hqk", "kq"])
def test_captured(shape: str, agree: Callable[..., None], rng: np.random.Generator) -> None:
    dims = Dims(2, 2, 1, 70, 90, 16, 16)
    sizes = {"b": 2, "h": 2, "q": 70, "k": 90, "1": 1}
    tensor = torch.from_numpy(rng.standard_normal([sizes[d] for d in shape]).astype(np.float32))

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        index = {"b": b, "h": h, "q": q_idx, "k": kv_idx, "1": 0}
        return s + tensor[tuple(index[d] for d in shape)] * torch.sigmoid(s)

    agree(dims, score=score, mask=ak.causal())


def test_a_tensor_smaller_than_the_pairs(agree: Callable[..., None], rng: np.random.Generator) -> None:
    """What the mask leaves reads within it; nothing beyond it is written."""
    tensor = torch.from_numpy(rng.standard_normal((70, 60)).astype(np.float32))
    agree(
        SMALL,
        score=lambda s, b, h, q_idx, kv_idx: s + tensor[q_idx, kv_idx],
        mask=lambda b, h, q_idx, kv_idx: kv_idx < 60,
    )


def t5_bucket(distance: Any) -> Any:
    """T5's, of 16: one for each distance up to 7, from there on one for each half power of two."""
    far = 8 + (torch.log(torch.clamp(distance, min=1) / 8.0) * 2.885390081777927).to(torch.int64)
    return torch.where(distance < 8, torch.clamp(distance, min=0), torch.clamp(far, max=15))


def tables(rng: np.random.Generator) -> dict[str, Callable[..., Any]]:
    """Scores that read learned tables at indices that are computed."""

    def made(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    of_bucket, of_distance, of_document, of_block, of_half = (
        made(*n) for n in ((2, 16), (2, 41), (2, 5), (9, 12), (1,))
    )
    documents = torch.from_numpy(np.sort(rng.integers(0, 5, 200)).astype(np.int32))
    return {
        "T5": lambda s, b, h, i, j: s + of_bucket[h, t5_bucket(i + 20 - j)],
        "distance": lambda s, b, h, i, j: s * torch.sigmoid(of_distance[h, torch.clamp(i - j, -20, 20) + 20]),
        "documents of rows": lambda s, b, h, i, j: s + of_document[h, documents[i]],
        "documents of columns": lambda s, b, h, i, j: s + of_document[h, documents[j]] * torch.tanh(s),
        "blocks": lambda s, b, h, i, j: s + of_block[i // 8 % 9, j // 8 % 12],
        "two loads": lambda s, b, h, i, j: (
            s + of_document[h, i % 5] + of_document[1 - h, j % 5] * of_half[h // 2]
        ),
    }


TABLES = ["T5", "distance", "documents of rows", "documents of columns", "blocks", "two loads"]


@pytest.mark.parametrize("name", TABLES)
def test_computed_indices(name: str, agree: Callable[..., None], rng: np.random.Generator) -> None:
    """With tails, rows that see nothing, two heads of one kv head, and two sequences."""
    score = tables(rng)[name]
    agree(SMALL, score=score, mask=ak.window(20, 9))
    agree(
        Dims(2, 2, 1, 70, 130, 16, 16), score=score, mask=lambda b, h, i, j: (i // 16 + j // 16 + h) % 2 == 0
    )


@pytest.mark.parametrize("name", ["T5", "documents of rows", "two loads"])
def test_computed_indices_of_packed_sequences(
    name: str, agree: Callable[..., None], rng: np.random.Generator
) -> None:
    cu_q, cu_kv = torch.tensor([0, 0, 5, 70, 71]).int(), torch.tensor([0, 9, 40, 40, 200]).int()
    agree(Dims(1, 2, 1, 71, 200, 16, 16), cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, score=tables(rng)[name],
          mask=ak.causal())  # fmt: skip


def test_indices_of_packed_sequences(agree: Callable[..., None], rng: np.random.Generator) -> None:
    """The number of a sequence, and places in it."""
    cu = torch.tensor([0, 30, 71]).int()
    of_row, of_pair = (
        torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for n in ((2, 71), (71, 71))
    )
    agree(
        Dims(1, 2, 1, 71, 71, 16, 16), cu_seqlens_q=cu, cu_seqlens_kv=cu,
        score=lambda s, b, h, i, j: s + of_row[b, i] * torch.sigmoid(s) + of_pair[i, j],
    )  # fmt: skip


def test_the_order_of_programs_changes_no_bit(build: Any, rng: np.random.Generator, monkeypatch: Any) -> None:
    """On a GPU programs add to a table as they come."""
    from triton.runtime.interpreter import interpreter_builder as builder

    tensors = [torch.from_numpy(x) for x in qkv("gaussian", rng, SMALL)]
    d_o = torch.from_numpy(rng.standard_normal((1, 2, 70, 24)).astype(np.float32))
    tiles = TILES | {"pairs_tile_q": 16, "pairs_tile_kv": 32}
    traced = Traceable(tables(rng)["T5"], ak.causal())
    kernel, buffers, params = build(traced, tensors[0], tensors[2], tiles)
    first = gradients(kernel, tensors, buffers, params, d_o, None, None)[3]
    forwards = type(builder).set_grid_idx

    def backwards(self: Any, x: int, y: int, z: int) -> None:
        forwards(self, *(n - 1 - at for n, at in zip(self.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(type(builder), "set_grid_idx", backwards)
    assert torch.equal(gradients(kernel, tensors, buffers, params, d_o, None, None)[3], first)


def test_what_is_not_a_number_reaches_what_its_pairs_read(build: Any, rng: np.random.Generator) -> None:
    """Of a table of rows modulo 7 the places of rows that see it; others are as without it."""
    q, k, v = (torch.from_numpy(x) for x in qkv("gaussian", rng, Dims(1, 2, 1, 20, 18, 16, 24)))
    d_o = torch.from_numpy(rng.standard_normal((1, 2, 20, 24)).astype(np.float32))
    table = torch.from_numpy(rng.standard_normal((2, 7, 3)).astype(np.float32))
    score = lambda s, b, h, i, j: s + table[h, i % 7, (i + j) % 3]  # noqa: E731
    kernel, buffers, params = build(Traceable(score, None), q, v, TILES)
    want = gradients(kernel, [q, k, v], buffers, params, d_o, None, None)[3]
    planted = d_o.clone()
    planted[0, 1, 12, 5] = np.nan
    got = gradients(kernel, [q, k, v], buffers, params, planted, None, None)[3]
    lost = torch.isnan(got)
    assert lost.nonzero().tolist() == [[1, 5, 0], [1, 5, 1], [1, 5, 2]]
    assert (got - want)[~lost].abs().max() < 1e-6


def test_padded(agree: Callable[..., None]) -> None:
    lens = torch.tensor([90, 0, 33], dtype=torch.int32)

    def plant(q: Any, k: Any, v: Any, d_o: Any) -> None:
        k[2, :, 33:], v[2, :, 33:], k[1], v[1] = np.nan, np.inf, np.nan, np.nan

    agree(Dims(3, 2, 1, 30, 90, 16, 16), kv_lens=lens, plant=plant)


def test_packed(agree: Callable[..., None]) -> None:
    cu_q, cu_kv = torch.tensor([0, 0, 5, 70, 71]).int(), torch.tensor([0, 9, 40, 40, 200]).int()
    agree(Dims(1, 2, 1, 71, 200, 16, 16), cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, mask=ak.causal())
    agree(Dims(1, 2, 1, 71, 200, 16, 16), cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv,
          mask=lambda b, h, q_idx, kv_idx: (q_idx + kv_idx + h) % 3 != 0)  # fmt: skip


def test_dropout(agree: Callable[..., None]) -> None:
    agree(SMALL, dropout_p=0.4, seed=987654321987654321, mask=ak.causal())


@pytest.mark.parametrize("lists", [False, True])
def test_launches_of_a_backward_are_made_again(lists: bool, build: Any, rng: np.random.Generator) -> None:
    """With other tensors of the same shapes, other params, and other contents of what is captured."""
    cap, ids = ak.param("cap", 2.0), torch.zeros(90, dtype=torch.int32)
    mask: Any = ak.causal() if not lists else lambda b, h, q_idx, kv_idx: (ids[kv_idx] + q_idx) % 3 != 0
    kernel: Any = None
    for c in (2.0, 3.0):
        tensors = [torch.from_numpy(x) for x in qkv("gaussian", rng, SMALL)]
        captured = [torch.from_numpy(rng.integers(0, 2, 90).astype(np.int32))] if lists else []
        d_o = torch.from_numpy(rng.standard_normal((1, 2, 70, 24)).astype(np.float32))
        if kernel is None:
            kernel, _, _ = build(Traceable(ak.softcap(cap), mask), tensors[0], tensors[2], TILES)
        got = gradients(kernel, tensors, captured, [c], d_o, None, None)
        fresh, _, _ = build(Traceable(ak.softcap(cap), mask), tensors[0], tensors[2], TILES)
        want = gradients(fresh, tensors, captured, [c], d_o, None, None)
        assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))
    assert len(kernel._recorded) == 2  # one forward, one backward


@pytest.mark.parametrize("where", ["keys", "queries"])
def test_what_is_not_a_number_reaches_those_who_see_it(
    where: str, build: Callable[..., Any], rng: np.random.Generator
) -> None:
    """A key or value those queries that see it, a query or cotangent those keys; nothing else changes."""
    q, k, v = (torch.from_numpy(x) for x in qkv("gaussian", rng, SMALL))
    d_o = torch.from_numpy(rng.standard_normal((1, 2, 70, 24)).astype(np.float32))
    if where == "keys":
        v[0, 0, 85, 3], k[0, 0, 88, 2] = np.nan, np.inf
    else:
        d_o[0, 0, 5, 1], q[0, 1, 3, 4] = np.inf, np.nan
    kernel, buffers, params = build(Traceable(None, ak.causal()), q, v, TILES)
    got = gradients(kernel, [q, k, v], buffers, params, d_o, None, None)
    want = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    for h in range(2):
        for i in range(70):  # a row at a time, over the keys that it sees
            seen = slice(0, i + 21)
            rows = [q[0, h, i].double(), k[0, 0, seen].double(), v[0, 0, seen].double()]
            leaves = [row.requires_grad_() for row in rows]
            (torch.softmax(leaves[1] @ leaves[0] / 4, 0) @ leaves[2]).backward(d_o[0, h, i].double())
            places = (want[0][0, h, i], want[1][0, 0, seen], want[2][0, 0, seen])
            for place, leaf in zip(places, leaves, strict=True):
                place.add_(leaf.grad)
    for mine, other in zip(got, want, strict=True):
        finite = torch.isfinite(other)
        assert torch.equal(torch.isfinite(mine), finite), (
            (torch.isfinite(mine) != finite).nonzero().tolist()[:9]
        )
        assert not finite.any() or (mine[finite] - other[finite]).abs().max() < 1e-5
    assert 0 < torch.isfinite(want[0 if where == "keys" else 1]).sum() < want[0].numel()
