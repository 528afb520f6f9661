"""The two functions that transformers calls, one call at a time: masks against dense ones, attention against sdpa's."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak

pytest.importorskip("transformers")
from transformers import masking_utils as mu
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnkit.integrations import transformers as integration
from attnkit.ops import traced as traces

B, LONG = 2, 24  # LONG: more positions than any mask here reaches

LAYER: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True)


def dense(mask: integration.ModelMask) -> Tensor:
    """What a mask lets through, bool ``[B, 1, Sq, Skv]``, as the kernel sees it: equal weights on one-hot values."""
    batch, _, q_len, kv_len = mask.shape
    q, k = torch.zeros(batch, 1, q_len, 4), torch.zeros(batch, 1, kv_len, 4)
    v = torch.eye(kv_len).expand(batch, 1, kv_len, kv_len)
    o, _ = integration.attention_forward(LAYER, q, k, v, mask)
    return o.transpose(1, 2) > 0


def randint(high: int, seed: int) -> Tensor:
    return torch.randint(high, (B, LONG), generator=torch.Generator().manual_seed(seed))


# name -> a mask function of absolute positions
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal": mu.causal_mask_function,
    "bidirectional": mu.bidirectional_mask_function,
    "window": mu.sliding_window_causal_mask_function(3),
    "window to both sides": mu.sliding_window_bidirectional_mask_function(2),
    "chunks": mu.chunked_causal_mask_function(3, torch.tensor([2, 0])),
    "blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(randint(4, 0).sort().values - 1)),
    "packed": mu.packed_sequence_compatibility_function(
        mu.sliding_window_causal_mask_function(3), torch.arange(LONG).expand(B, -1) % 5, torch.arange(LONG).expand(B, -1) // 5
    ),
    "or, and": mu.and_masks(
        mu.or_masks(mu.causal_mask_function, lambda b, h, q, kv: (kv - q == 2) | (kv % 5 == 0)), lambda b, h, q, kv: kv != q - 1
    ),
    "tables": lambda b, h, q, kv: torch.where(randint(2, 1).bool()[b, q], kv <= q, (q - kv).abs() < 3),
}  # fmt: skip

# Sq, Skv, q_offset, kv_offset
GEOMETRIES: dict[str, tuple[int, int, Any, int]] = {
    "prefill": (7, 7, 0, 0),
    "one token": (1, 9, 8, 0),
    "a few tokens": (3, 9, 6, 0),
    "full window": (1, 5, 11, 7),
    "a few past the window": (4, 8, 11, 7),
    "empty static cache": (5, 12, 0, 0),
    "static cache": (3, 12, torch.tensor(4), 0),
    "static cache, one token": (1, 12, torch.tensor(11), 0),
    "queries ahead": (2, 6, 9, 1),
}

PADDINGS: dict[str, Tensor | None] = {
    "none": None,
    "all there": torch.ones(B, LONG, dtype=torch.bool),
    "left": torch.arange(LONG) >= torch.tensor([[4], [0]]),
    "right": torch.arange(LONG) < torch.tensor([[3], [9]]),
    "all gone": torch.arange(LONG) < torch.tensor([[0], [9]]),
    "short": torch.ones(B, 6, dtype=torch.bool),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_are_transformers_own(function: str, geometry: str) -> None:
    q_len, kv_len, q_offset, kv_offset = GEOMETRIES[geometry]
    for padding in PADDINGS.values():
        arguments: dict[str, Any] = {
            "batch_size": B, "q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "kv_offset": kv_offset,
            "mask_function": FUNCTIONS[function], "attention_mask": padding,
        }  # fmt: skip
        expected = mu.sdpa_mask(**arguments, allow_is_causal_skip=False)
        mask = integration.create_mask(**arguments)
        if mask is None:  # nothing to hide from one query
            assert q_len == 1
            assert expected.all()
            continue
        assert mask.shape == expected.shape
        assert torch.equal(dense(mask), expected)


def test_decoding_with_a_growing_cache_needs_no_mask() -> None:
    padded = torch.arange(LONG) >= torch.tensor([[4], [0]])
    assert integration.create_mask(B, 1, 9, 8) is None
    assert integration.create_mask(B, 1, 9, 8, attention_mask=padded) is not None
    assert integration.create_mask(B, 1, 9, 8, mask_function=FUNCTIONS["window"]) is not None
    assert integration.create_mask(B, 1, 12, torch.tensor(8)) is not None


def test_a_new_offset_is_no_new_program() -> None:
    steps = {
        "growing cache": [(8 + i, 7 + i, 0) for i in range(3)],
        "full window": [(5, 11 + i, 7 + i) for i in range(3)],
        "static cache": [(12, torch.tensor(4 + i), 0) for i in range(3)],
        "queries ahead": [(6, 9 + i, 1 + i) for i in range(3)],
    }
    for function, geometry in itertools.product(FUNCTIONS.values(), steps.values()):
        masks = [integration.create_mask(B, 1, *lengths, function) for lengths in geometry]
        texts = {None if mask is None else ak.trace(mask.function).text for mask in masks}
        assert len(texts) == 1


def test_a_mask_is_traced_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = integration.create_mask(B, 5, 9, 4, mask_function=FUNCTIONS["window"])
    assert mask is not None
    traced = []
    real = traces._recall
    monkeypatch.setattr(traces, "_recall", lambda what, like: traced.append(what) or real(what, like))
    q, k, v = torch.randn(B, 2, 5, 8), torch.randn(B, 2, 9, 8), torch.randn(B, 2, 9, 8)
    first, second = (ak.attention(q, k, v, mask=mask.function) for _ in range(2))
    assert len(traced) == 1
    assert torch.equal(first, second)
    scaled = ak.attention(q, k, v, mask=mask.function, scale=3.0)
    assert len(traced) == 2
    assert torch.equal(scaled, ak.attention(q, k, v, mask=mask.function.function, scale=3.0))


def test_masks_look_at_a_static_cache_before_it_counts_on() -> None:
    counter = torch.tensor(3)
    mask = integration.create_mask(B, 2, 12, counter)
    counter += 2
    assert mask is not None
    assert torch.equal(dense(mask), mu.sdpa_mask(B, 2, 12, 3, allow_is_causal_skip=False))


def test_nothing_stands_for_a_mask_that_hides_nothing() -> None:
    def skipped(**more: Any) -> bool:
        settings = {"mask_function": mu.bidirectional_mask_function, "allow_is_bidirectional_skip": True}
        return integration.create_mask(B, 7, 7, **settings, **more) is None

    assert skipped()
    assert skipped(attention_mask=PADDINGS["all there"])
    assert not skipped(attention_mask=PADDINGS["left"])
    assert skipped(local_size=8)
    assert not skipped(local_size=7)


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("layer", [{}, {"is_causal": False}, {"is_causal": True}], ids=str)
def test_a_missing_mask_means_what_it_means_for_sdpa(layer: dict[str, bool], is_causal: bool | None) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=2, **layer)
    generator = torch.Generator().manual_seed(4)
    for (q_len, kv_len), biased in itertools.product(((1, 1), (1, 9), (5, 5), (5, 9)), (False, True)):
        q = torch.randn(B, 4, q_len, 8, generator=generator)
        k, v = (torch.randn(B, 2, kv_len, 8, generator=generator) for _ in "kv")
        bias = torch.randn(1, 4, q_len, kv_len, generator=generator) if biased else None
        arguments: dict[str, Any] = {"is_causal": is_causal, "position_bias": bias, "scaling": 0.3}
        ours, weights = integration.attention_forward(module, q, k, v, None, **arguments)
        torchs, _ = sdpa_attention_forward(module, q, k, v, None, **arguments)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
        assert ours.shape == (B, q_len, 4, 8)
        assert ours.is_contiguous()
        assert weights is None


def test_dense_masks_and_biases() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(B, 4, 5, 8, generator=generator) for _ in "qkv")
    bias = torch.randn(1, 4, 5, 5, generator=generator)
    for shape in ((B, 4, 5, 5), (B, 1, 5, 5), (1, 1, 5, 5), (B, 1, 1, 5), (1, 5, 5), (5, 5)):
        visible = torch.rand(shape, generator=generator) < 0.7
        visible[..., 0] = True
        for mask, position_bias in itertools.product((visible, visible.float() * 3), (None, bias)):
            ours, _ = integration.attention_forward(LAYER, q, k, v, mask, position_bias=position_bias)
            torchs, _ = sdpa_attention_forward(LAYER, q, k, v, mask, position_bias=position_bias)
            torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_learned_queries_serve_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(1, 4, 5, 8, generator=generator)
    k, v = (torch.randn(B, 4, 7, 8, generator=generator) for _ in "kv")
    ours, _ = integration.attention_forward(LAYER, q, k, v, None, is_causal=False)
    torchs, _ = sdpa_attention_forward(LAYER, q, k, v, None, is_causal=False)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    """Where eager gives the mean of all values: its mask is a very negative number."""
    padding = torch.arange(4) >= torch.tensor([[2], [0]])
    mask = integration.create_mask(B, 4, 4, attention_mask=padding)
    q, k, v = (torch.randn(B, 1, 4, 8) for _ in "qkv")
    o, _ = integration.attention_forward(LAYER, q, k, v, mask)
    assert (o[0, :2] == 0).all()
    assert (o[0, 2:] != 0).all()
    assert (o[1] != 0).all()
    eager = mu.eager_mask(B, 4, 4, attention_mask=padding)
    o, _ = integration.attention_forward(LAYER, q, k, v, eager)
    torch.testing.assert_close(o[0, 0, 0], v[0, 0].mean(0))


Q = torch.zeros(B, 2, 5, 8)
CAUSAL = integration.create_mask(B, 5, 5)
assert CAUSAL is not None


def call(mask: Any = None, **keywords: Any) -> Any:
    return integration.attention_forward(LAYER, Q, Q, Q, mask, **keywords)


# name -> (code, the argument that the message names, the call)
ERRORS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    **{
        name: ("AK504", name, lambda name=name: call(CAUSAL, **{name: torch.ones(2)}))
        for name in ("head_mask", "layer_head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "cache", "indices", "block_indices", "sinks")
    },
    "output_attentions": ("AK504", "output_attentions", lambda: call(CAUSAL, output_attentions=True)),
    "dropout": ("AK401", "dropout_p", lambda: call(CAUSAL, dropout=1.1)),
    "window without a mask": ("AK401", "sliding_window", lambda: call(sliding_window=4)),
    "scaling": ("AK401", "scale", lambda: call(CAUSAL, scaling=-1.0)),
    "softcap": ("AK401", "softcap", lambda: call(CAUSAL, softcap=-1.0)),
    "mask of more queries": ("AK403", "attention_mask", lambda: call(integration.create_mask(B, 6, 5))),
    "mask of one query": ("AK403", "attention_mask", lambda: call(integration.create_mask(B, 1, 5))),
    "mask of more keys": ("AK403", "attention_mask", lambda: call(integration.create_mask(B, 5, 6, 1))),
    "mask of another batch": ("AK403", "attention_mask", lambda: call(integration.create_mask(B + 1, 5, 5))),
    "mask made for another step": (
        "AK403", "attention_mask", lambda: integration.create_mask(B, 1, 6, 5, attention_mask=CAUSAL),
    ),
    "dense mask": ("AK403", "attention_mask", lambda: call(torch.ones(B, 1, 5, 6))),
    "dense mask of rank 5": ("AK403", "attention_mask", lambda: call(torch.ones(1, B, 1, 5, 5))),
    "int mask": ("AK404", "attention_mask", lambda: call(torch.ones(B, 1, 5, 5, dtype=torch.long))),
    "position bias": ("AK403", "position_bias", lambda: call(position_bias=torch.ones(1, 3, 5, 5))),
    "sinks of too many heads": ("AK403", "sink", lambda: call(CAUSAL, s_aux=torch.ones(3))),
    "if in a mask function": (
        "AK301", "test_attnkit_masks", lambda: call(integration.create_mask(B, 5, 5, mask_function=lambda b, h, q, kv: q > kv or True)),
    ),
    "index of a mask": ("AK416", "attention_mask", lambda: CAUSAL[:, :, :, :3]),
    "sum of a mask": ("AK416", "attention_mask", lambda: Q + CAUSAL),
    "negated mask": ("AK416", "attention_mask", lambda: ~CAUSAL),
    "mask in a torch function": ("AK416", "attention_mask", lambda: torch.where(CAUSAL, 0.0, 1.0)),
    "method of a mask": ("AK416", "attention_mask", lambda: CAUSAL.masked_fill(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    code, where, wrong = ERRORS[name]
    before = ak.installed_report().kernel_runs
    with pytest.raises(ak.AttnkitError) as caught:
        wrong()
    assert caught.value.code == code
    assert where in caught.value.where
    assert caught.value.allowed or caught.value.hint
    assert ak.installed_report().kernel_runs == before


def test_what_a_mask_has_and_has_not() -> None:
    assert CAUSAL is not None
    assert not hasattr(CAUSAL, "masked_fill")
    assert CAUSAL.contiguous() is CAUSAL
    assert (CAUSAL.ndim, CAUSAL.dtype, CAUSAL.shape) == (4, torch.bool, (B, 1, 5, 5))
    again = integration.create_mask(B, 5, 5, attention_mask=CAUSAL)
    assert again is CAUSAL


def test_false_and_none_ask_for_nothing() -> None:
    call(CAUSAL, output_attentions=False, head_mask=None, position_ids=torch.arange(5), use_cache=True)


@pytest.mark.parametrize("version", [None, "4.40.0", "4.57.0"])
def test_transformers_missing_or_too_old(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if version is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        old = ModuleType("transformers")
        masks, utils = ModuleType("transformers.masking_utils"), ModuleType("transformers.utils")
        imports: Any = ModuleType("transformers.utils.import_utils")
        if version == "4.57.0":  # has both interfaces, with another signature
            old.AttentionInterface = old.AttentionMaskInterface = object  # type: ignore[attr-defined]
            masks.sdpa_mask = lambda batch_size, cache_position, kv_length: None  # type: ignore[attr-defined]
            masks.causal_mask_function = mu.causal_mask_function  # type: ignore[attr-defined]
            utils.output_capturing = None  # type: ignore[attr-defined]
            imports.is_tracing = None
        for module in (old, masks, utils, imports):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    source = importlib.util.spec_from_file_location("fresh", integration.__file__)
    assert source is not None
    assert source.loader is not None
    with pytest.raises(ak.AttnkitNotImplementedError) as caught:
        source.loader.exec_module(importlib.util.module_from_spec(source))
    assert caught.value.code == "AK501"
    assert "transformers" in caught.value.where
    assert caught.value.given
    assert "pip install" in caught.value.hint
