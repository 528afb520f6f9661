"""`ak.flex_attention` against torch's: the signature, every argument, what is returned, what is refused."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, create_block_mask

import attnkit as ak


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """torch's flex_attention in float64: the equation, materialised."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def call(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Any:
        return flex.flex_attention(q.double(), k.double(), v.double(), **keywords)

    return call


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=3e-6)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def test_the_signature_is_torchs() -> None:
    ours, torchs = (inspect.signature(f).parameters for f in (ak.flex_attention, flex.flex_attention))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in torchs.values()
    ]


@pytest.mark.parametrize("scale", [None, 0.3, 1, 2.0, 0.0, -1.5])
@pytest.mark.parametrize(
    "score", [None, lambda s, b, h, i, j: torch.tanh(s) * 2 + i - j], ids=["plain", "score"]
)
def test_any_finite_scale(scale: float | None, score: Any, qkv: Any, theirs: Any) -> None:
    q, k, v = qkv(kv_len=11)
    expected, aux = theirs(q, k, v, score_mod=score, scale=scale, return_aux=AuxRequest(lse=True))
    o, lse = ak.flex_attention(q, k, v, score, scale=scale, return_lse=True)
    close(o, expected)
    close(lse, aux.lse)


@pytest.mark.parametrize(("length", "kv_len"), [(9, 9), (5, 9), (9, 5)])
def test_positions_count_from_the_first_query_and_key(
    length: int, kv_len: int, qkv: Any, theirs: Any
) -> None:
    q, k, v = qkv(length=length, kv_len=kv_len, v_head_dim=3)
    blocks = create_block_mask(causal, None, None, length, kv_len, device="cpu")
    expected, aux = theirs(q, k, v, block_mask=blocks, return_aux=AuxRequest(lse=True))
    for mask in (blocks, ak.block_mask(causal, 1, 1, length, kv_len)):
        o, lse = ak.flex_attention(q, k, v, block_mask=mask, return_lse=True)
        close(o, expected)
        close(lse, aux.lse)


def test_rows_that_see_nothing(qkv: Any, theirs: Any) -> None:
    q, k, v = qkv()
    blocks = create_block_mask(lambda b, h, i, j: (i > j) & (i != 7), None, None, 19, 19, device="cpu")
    expected, aux = theirs(q, k, v, block_mask=blocks, return_aux=AuxRequest(lse=True))
    o, lse = ak.flex_attention(q, k, v, block_mask=blocks, return_lse=True)
    close(o, expected)
    close(lse, aux.lse)
    assert lse[0, 0, 0] == lse[1, 3, 7] == -math.inf
    assert not o[:, :, [0, 7]].any()


def test_grouped_heads_must_be_asked_for(qkv: Any, theirs: Any) -> None:
    q, k, v = qkv(heads=4, kv_heads=2)
    with pytest.raises(ak.AttnkitValueError, match="AK407") as caught:
        ak.flex_attention(q, k, v)
    assert caught.value.given == "4 query heads and 2 key heads"
    assert "enable_gqa" in caught.value.hint
    close(ak.flex_attention(q, k, v, enable_gqa=True), theirs(q, k, v, enable_gqa=True))
    same = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    close(ak.flex_attention(*same, enable_gqa=True), theirs(*same))


def test_one_set_of_keys_for_a_batch_of_queries(qkv: Any, theirs: Any) -> None:
    """Paged attention: the block mask tells the queries apart."""
    q, (_, k, v) = qkv(3)[0], qkv(1)
    lengths = torch.tensor([19, 4, 11])
    blocks = create_block_mask(lambda b, h, i, j: j < lengths[b], 3, None, 19, 19, device="cpu")
    close(ak.flex_attention(q, k, v, block_mask=blocks), theirs(q, k, v, block_mask=blocks))
    for refused in (None, create_block_mask(causal, None, None, 19, 19, device="cpu")):
        with pytest.raises(ValueError, match="batch size"):
            theirs(q, k, v, block_mask=refused)
        with pytest.raises(ak.AttnkitValueError, match="AK403"):
            ak.flex_attention(q, k, v, block_mask=refused)


def test_what_is_returned(qkv: Any) -> None:
    q, k, v = qkv()
    o = ak.flex_attention(q, k, v)
    assert isinstance(o, Tensor)
    with_lse = ak.flex_attention(q, k, v, return_lse=True)
    assert isinstance(with_lse, tuple)
    assert torch.equal(with_lse[0], o)
    scores = q @ k.mT * q.shape[3] ** -0.5
    torch.testing.assert_close(with_lse[1], scores.logsumexp(-1), rtol=1e-5, atol=1e-6)  # natural logarithm
    same, aux = ak.flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    assert isinstance(aux, AuxOutput)
    assert torch.equal(same, o)
    assert torch.equal(aux.lse, with_lse[1])
    assert ak.flex_attention(q, k, v, return_aux=AuxRequest())[1] == AuxOutput()


def test_kernel_options_are_ignored(qkv: Any) -> None:
    q, k, v = qkv()
    options = {"BLOCK_M": 64, "BACKEND": "TRITON", "anything": 1}
    assert torch.equal(ak.flex_attention(q, k, v, kernel_options=options), ak.flex_attention(q, k, v))


def test_nothing_to_see(qkv: Any) -> None:
    for sizes in ({"length": 0}, {"kv_len": 0}, {"batch": 0}):
        q, k, v = qkv(**sizes)
        o, lse = ak.flex_attention(q, k, v, lambda s, *_: s * 2, return_lse=True)
        assert o.shape == q.shape
        assert not o.any()
        assert (lse == -math.inf).all()


def test_compiled_with_what_torch_compiles(qkv: Any) -> None:
    """All of a module around it, through inductor."""
    q, k, v = qkv()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    blocks = create_block_mask(causal, None, None, 19, 19, device="cpu")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, aux = ak.flex_attention(
            q * 2,
            k,
            v,
            lambda s, b, h, i, j: s + slopes[h] * (j - i),
            blocks,
            return_aux=AuxRequest(lse=True),
        )
        return o * aux.lse.sigmoid().unsqueeze(-1)

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(q, k, v), model(q, k, v))
