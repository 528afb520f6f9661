"""Few queries over many keys: the keys are summed in stretches, which several tasks may share, and merged in order."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import runtime
from attnkit.errors import AttnkitError
from attnkit.plan.space import Config, default_config
from attnkit.testing import Dims, Pairs, qkv

Split = Callable[[int], None]
CAUSAL: dict[str, Any] = {"mask": lambda p: p.kv_idx <= p.position}
SLOPES = np.float32([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[Split]:
    """``split(n)``: from now on stretches are n keys long, so that small problems have many."""
    lookup = sys.modules["attnkit.tune.lookup"]

    def every(keys: int) -> None:
        def config(space: Any) -> Config:
            return default_config(space) | ({"split_kv": keys} if "split_kv" in space else {})

        runtime.clear()
        monkeypatch.setattr(lookup, "default_config", config)

    yield every
    runtime.clear()


def alibi(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + torch.from_numpy(SLOPES)[h] * (j - i)


def run(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    o, lse = ak.attention(q, k, v, return_lse=True, **keywords)
    return o, lse


def equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def tensors(rng: np.random.Generator, *dims: int) -> list[Tensor]:
    return [torch.from_numpy(x) for x in qkv("gaussian", rng, Dims(*dims))]


# --- against the equation --------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", [1, 2, 3, 5, 16, 17, 33, 64, 100])
def test_lengths(q_len: int, isa: str, rng: np.random.Generator, compare: Any, split: Split) -> None:
    split(64)
    for kv_len in (63, 64, 65, 128, 129, 500):
        x = qkv("gaussian", rng, Dims(1, 4, 2, q_len, kv_len, 32, 48))
        compare(*x, what=f"{q_len} x {kv_len}")
        mask: dict[str, Any] = {"oracle": CAUSAL, "mask": ak.causal()}
        compare(*x, **mask, what=f"{q_len} x {kv_len} causal")


@pytest.mark.parametrize("group", range(1, 17))
def test_groups(group: int, isa: str, rng: np.random.Generator, compare: Any, split: Split) -> None:
    split(64)
    for q_len in (1, 3):
        x = qkv("gaussian", rng, Dims(2, 2 * group, 2, q_len, 333, 24, 20))
        compare(*x, oracle=CAUSAL, mask=ak.causal(), what=f"q_len {q_len}")


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(64, 64), (128, 128), (80, 96), (7, 3), (192, 128), (129, 33)]
)
def test_head_dims(
    head_dim: int, v_head_dim: int, isa: str, rng: np.random.Generator, compare: Any, split: Split
) -> None:
    split(128)
    for heads in (1, 4, 12):
        compare(*qkv("gaussian", rng, Dims(1, heads, 1, 1, 700, head_dim, v_head_dim)), what=f"{heads} heads")


@pytest.mark.parametrize("distribution", ["outlier", "near_tie", "huge", "constant", "one_hot"])
def test_distributions(
    distribution: str, isa: str, rng: np.random.Generator, compare: Any, split: Split
) -> None:
    split(64)
    x = qkv(distribution, rng, Dims(1, 4, 2, 2, 777, 32, 32))
    compare(*x, oracle=CAUSAL, mask=ak.causal())


def window(p: Pairs) -> Any:
    return (p.kv_idx <= p.position) & (p.kv_idx >= p.position - 40)


@pytest.mark.parametrize("q_len", [1, 4, 40])
@pytest.mark.parametrize("name", ["alibi", "sink", "window", "window and sink", "document", "kv_lens"])
def test_variants(
    name: str, q_len: int, isa: str, rng: np.random.Generator, compare: Any, split: Split
) -> None:
    split(64)
    batch, kv_len = 3, 600
    x = qkv("gaussian", rng, Dims(batch, 4, 2, q_len, kv_len, 32, 32))
    sink = rng.standard_normal(4).astype(np.float32)
    ids = np.sort(rng.integers(0, 6, kv_len)).astype(np.int32)
    lens = np.array([kv_len, 65, 0 if q_len == 1 else 130], np.int32)
    position = kv_len - q_len
    oracle, call = {
        "alibi": (
            {"score": lambda s, p: s + s.dtype.type(SLOPES[p.h]) * (p.kv_idx - p.q_idx).astype(s.dtype)},
            {"score": alibi},
        ),
        "sink": ({"sink": sink}, {"normalizer": ak.softmax(torch.from_numpy(sink))}),
        "window": ({"mask": window}, {"mask": ak.window(40, 0)}),
        "window and sink": (
            {"mask": window, "sink": sink},
            {"mask": ak.window(40, 0), "normalizer": ak.softmax(torch.from_numpy(sink))},
        ),
        "document": (
            {"mask": lambda p: ids[p.q_idx + position] == ids[p.kv_idx]},
            {"mask": lambda b, h, i, j: torch.from_numpy(ids)[i + position] == torch.from_numpy(ids)[j]},
        ),
        "kv_lens": ({"kv_lens": lens}, {"kv_lens": torch.from_numpy(lens)}),
    }[name]
    compare(*x, oracle=oracle, what=name, mostly_dead=name == "kv_lens", **call)


def test_packed(isa: str, rng: np.random.Generator, compare: Any, split: Split) -> None:
    """Decoding and prefilling sequences, long and short and empty, in one call."""
    split(64)
    q_lens, kv_lens = [1, 1, 70, 0, 3, 1], [700, 9, 200, 50, 333, 0]
    cu_q, cu_kv = (np.cumsum([0, *n]).astype(np.int32) for n in (q_lens, kv_lens))
    x = qkv("gaussian", rng, Dims(1, 4, 2, sum(q_lens), sum(kv_lens), 32, 32))
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    call = {name: torch.from_numpy(value) for name, value in cu.items()}
    compare(*x, oracle={**CAUSAL, **cu}, mask=ak.causal(), **call)


# --- bit for bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q_len", "kv_len", "heads", "kv_heads"),
                         [(1, 900, 8, 2), (1, 900, 1, 1), (3, 500, 4, 4), (30, 700, 4, 1), (130, 400, 2, 2)])  # fmt: skip
def test_threads(
    q_len: int, kv_len: int, heads: int, kv_heads: int, isa: str, rng: np.random.Generator, split: Split,
) -> None:  # fmt: skip
    """One thread takes all stretches of a row by itself, seven share them."""
    split(64)
    x = tensors(rng, 2, heads, kv_heads, q_len, kv_len, 64, 64)
    torch.set_num_threads(1)
    want = run(*x, mask=ak.causal())
    assert torch.isfinite(want[0]).all()
    for n in (2, 3, 7):
        torch.set_num_threads(n)
        for _ in range(3):
            equal(run(*x, mask=ak.causal()), want)


def test_batch_composition(isa: str, rng: np.random.Generator, split: Split) -> None:
    """A sequence decodes to the same bits alone, among others, and beside one that is being prefilled."""
    split(64)
    q_lens, kv_lens = [1, 100, 1, 5], [600, 300, 65, 400]
    cu_q, cu_kv = (np.cumsum([0, *n]) for n in (q_lens, kv_lens))
    q, k, v = tensors(rng, 1, 8, 2, sum(q_lens), sum(kv_lens), 32, 32)
    cu = {"cu_seqlens_q": torch.from_numpy(cu_q).int(), "cu_seqlens_kv": torch.from_numpy(cu_kv).int()}
    o, lse = run(q, k, v, mask=ak.causal(), **cu)
    for i in range(4):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])
        alone = run(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask=ak.causal())
        equal(alone, (o[:, :, rows], lse[:, :, rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_gives_the_bits_of_prefilling(
    dtype: torch.dtype, isa: str, rng: np.random.Generator
) -> None:
    """With the stretches of the default config: a token's row does not depend on the queries beside it.

    Dot products of bfloat16 are for many queries: few are bound by memory, and keep float32 weights.
    """
    q, k, v = (x.to(dtype) for x in tensors(rng, 1, 4, 2, 2100, 2100, 64, 64))
    whole = run(q, k, v, mask=ak.causal())
    dots = isa in ("avx512bf16", "avx512amx") and dtype is torch.bfloat16
    for last in (9, 64) if dots else (1, 2, 3, 7, 64):
        equal(run(q[:, :, -last:], k, v, mask=ak.causal()), (whole[0][:, :, -last:], whole[1][:, :, -last:]))


def test_strides_change_no_bit(isa: str, rng: np.random.Generator, split: Split) -> None:
    split(128)
    q, k, v = tensors(rng, 1, 4, 1, 1, 300, 48, 48)
    want = run(q, k, v)
    apart = [torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x) for x in (q, k, v)]
    assert apart[1].stride(-1) == 2
    equal(run(*apart), want)


# --- what nobody sees, and what is not there -------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("q_len", [1, 4])
def test_dead_slots(poison: float, q_len: int, isa: str, rng: np.random.Generator, split: Split) -> None:
    """Keys outside a window, beyond a sequence's end, or masked one by one, hold anything and change no bit."""
    split(64)
    q, k, v = tensors(rng, 2, 4, 2, q_len, 500, 32, 32)
    dead = torch.from_numpy(rng.random(500) < 0.3)
    dead[130:330] = True  # whole stretches
    clean = run(
        q, k.masked_fill(dead[:, None], 0), v.masked_fill(dead[:, None], 0), mask=lambda b, h, i, j: ~dead[j]
    )
    held = [x.masked_fill(dead[:, None], poison) for x in (k, v)]
    equal(run(q, *held, mask=lambda b, h, i, j: ~dead[j]), clean)
    assert torch.isfinite(clean[0]).all()
    lens = torch.tensor([77, 400], dtype=torch.int32)
    beyond = torch.arange(500)[None] >= lens[:, None]
    clean = run(q, k, v, kv_lens=lens)
    equal(run(q, *(x.masked_fill(beyond[:, None, :, None], poison) for x in (k, v)), kv_lens=lens), clean)


@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_a_mask_outlives_the_score(q_len: int, isa: str, rng: np.random.Generator, compare: Any) -> None:
    """What the mask has computed is overwritten by the score, and still decides."""
    q, k, v = qkv("gaussian", rng, Dims(1, 3, 1, q_len, 70, 17, 16))
    slopes = np.float32([1.6, -0.3, 0.6])
    held = torch.from_numpy(slopes)
    compare(
        q, k, v,
        oracle={
            "score": lambda s, p: s - abs(slopes[p.h]) * abs(p.q_idx - p.kv_idx),
            "mask": lambda p: abs(p.q_idx - p.kv_idx) <= 1,
        },
        score=lambda s, b, h, i, j: s - held[h].abs() * (i - j).abs(),
        mask=lambda b, h, i, j: (i - j).abs() <= 1,
    )  # fmt: skip


def test_a_window_reads_only_its_keys(isa: str, rng: np.random.Generator, split: Split) -> None:
    """Every other key is NaN, and the reference backend agrees; nothing is left of a row that sees nothing."""
    split(64)
    q, k, v = tensors(rng, 1, 4, 2, 1, 1000, 32, 32)
    k[:, :, :900], v[:, :, :900] = torch.nan, torch.nan
    got = run(q, k, v, mask=ak.window(50, 0))
    torch.testing.assert_close(
        got, run(q, k, v, mask=ak.window(50, 0), backend="reference"), rtol=3e-6, atol=3e-6
    )
    o, lse = run(q, k, v, mask=lambda b, h, i, j: j < 0)
    assert not o.any()
    assert lse.isneginf().all()


def test_a_load_outside_its_buffer_is_found_in_any_stretch(
    isa: str, rng: np.random.Generator, split: Split
) -> None:
    split(64)
    torch.set_num_threads(2)
    q, k, v = tensors(rng, 1, 4, 2, 1, 400, 32, 32)
    jump = torch.arange(400)
    for bad in (0, 200, 399):
        index = jump.clone()
        index[bad] = 400
        with pytest.raises(AttnkitError, match="AK601"):
            run(q, k, v, score=lambda s, b, h, i, j, index=index: s + jump.float()[index[j]])
