# ruff: noqa: ANN001, ANN202 -- the functions are written as their users write them
"""Mask functions of FlexAttention's documentation, its blog and public galleries, written down from what they mean.

Each runs unchanged through `ak.flex_attention` as the mask of a BlockMask, eager and compiled, and is compared with
torch's own flex_attention on float64 tensors.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

pytestmark = pytest.mark.shows

B, H, S = 2, 4, 24
SQUARE = (B, H, 2, S, S)
Mask = Callable[..., Any]
GALLERY: dict[str, tuple[Callable[[], Mask], tuple[int, ...]]] = {}


def mask(make: Callable[[], Mask] | None = None, *, sizes: tuple[int, ...] = SQUARE) -> Any:
    """A gallery entry for ``(B, Hq, Hkv, L, S)``: called when its test runs, with a seed of its own."""
    if make is None:
        return functools.partial(mask, sizes=sizes)
    GALLERY[make.__name__.replace("_", " ")] = make, sizes
    return make


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def document_ids(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The document of each token, and where documents start."""
    counts = torch.tensor(lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), counts), torch.tensor([0, *counts.cumsum(0)])


# --- orders and windows -------------------------------------------------------------------------------------


@mask
def everything() -> Mask:
    return noop_mask


@mask
def causal_mask() -> Mask:
    return causal


@mask
def sliding_window() -> Mask:
    window = 6

    def sliding(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= window)

    return sliding


@mask
def sliding_window_by_composition() -> Mask:
    return and_masks(causal, lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= 6)


@mask
def symmetric_window() -> Mask:
    return lambda b, h, q, kv: abs(q - kv) <= 4


@mask
def window_with_sinks() -> Mask:
    sink, window = 3, 5
    return and_masks(or_masks(lambda b, h, q, kv: q - kv <= window, lambda b, h, q, kv: kv < sink), causal)


@mask
def dilated_window() -> Mask:
    window, dilation = 8, 2

    def dilated(b, h, q_idx, kv_idx):
        distance = torch.abs(q_idx - kv_idx)
        return (distance <= window) & (distance % dilation == 0)

    return dilated


@mask
def dilation_by_head() -> Mask:
    return lambda b, h, q, kv: (q >= kv) & ((q - kv) % (2**h) == 0)


@mask
def window_by_head() -> Mask:
    windows = torch.tensor([1, 3, 7, 24])
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < windows[h])


@mask
def global_tokens_and_window() -> Mask:
    """Longformer: marked tokens see all and are seen by all."""
    is_global = torch.zeros(S, dtype=torch.bool)
    is_global[::9] = True

    def window(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() <= 2

    def marked(b, h, q_idx, kv_idx):
        return is_global[q_idx] | is_global[kv_idx]

    return or_masks(window, marked)


@mask
def chunks() -> Mask:
    return lambda b, h, q_idx, kv_idx: (q_idx // 6 == kv_idx // 6) & (q_idx >= kv_idx)


@mask
def strided() -> Mask:
    """Sparse transformers: the recent past, and every seventh key before."""
    return lambda b, h, q, kv: torch.logical_and(kv <= q, torch.logical_or(q - kv < 7, (q - kv) % 7 == 0))


@mask
def blocks_in_order() -> Mask:
    """Diffusion forcing: causal between blocks, free inside them."""
    return lambda b, h, q_idx, kv_idx: kv_idx // 5 <= q_idx // 5


@mask
def block_diffusion() -> Mask:
    """Noised tokens first, clean ones second: three masks in one."""
    length, block = S // 2, 4

    def diffusion(b, h, q_idx, kv_idx):
        q_noised, kv_noised = q_idx < length, kv_idx < length
        q_block, kv_block = q_idx % length // block, kv_idx % length // block
        own = (q_block == kv_block) & (q_noised == kv_noised)
        context = (q_block > kv_block) & q_noised & ~kv_noised
        clean = (q_block >= kv_block) & ~q_noised & ~kv_noised
        return own | context | clean

    return diffusion


@mask(sizes=(B, H, 2, 7, S))
def last_queries() -> Mask:
    """Decoding: the queries are the last of the keys' positions."""
    offset = torch.tensor(S - 7)
    return lambda b, h, q_idx, kv_idx: q_idx + offset >= kv_idx


@mask(sizes=(B, H, 2, 7, S))
def positions_of_a_cache() -> Mask:
    """Decoding with another position in each batch entry."""
    start = torch.tensor([5, 17], dtype=torch.int32)

    def cached(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx + start[b], kv_idx)

    return cached


# --- prefixes and documents ---------------------------------------------------------------------------------


@mask
def prefix_language_model() -> Mask:
    return or_masks(lambda b, h, q_idx, kv_idx: kv_idx < 9, causal)


@mask
def prefix_by_batch_entry() -> Mask:
    prefix = torch.tensor([4, 15])

    def prefix_mask(b, h, q_idx, kv_idx):
        return kv_idx <= prefix[b]

    return or_masks(prefix_mask, causal)


@mask
def padding() -> Mask:
    lengths = torch.tensor([24, 13])
    return lambda b, h, q_idx, kv_idx: kv_idx < lengths[b]


@mask
def padding_of_both_sides() -> Mask:
    lengths = torch.tensor([24, 13])
    return lambda b, h, q, kv: (q < lengths[b]) & (kv < lengths[b]) & (q >= kv)


@mask
def padding_from_a_map() -> Mask:
    keep = torch.rand(B, S) < 0.8
    return lambda b, h, q_idx, kv_idx: torch.where(keep[b, kv_idx], q_idx >= kv_idx, False)


@mask
def documents() -> Mask:
    ids, _ = document_ids([5, 1, 10, 8])
    return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]


@mask
def documents_of_each_batch_entry() -> Mask:
    ids = torch.stack([document_ids([5, 1, 10, 8])[0], document_ids([12, 12])[0]]).int()

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (ids[b][q_idx] == ids[b][kv_idx])

    return document_causal


@mask
def documents_around_any_mask() -> Mask:
    """Positions start anew in each document."""
    ids, starts = document_ids([5, 1, 10, 8])

    def of_documents(inner: Mask) -> Mask:
        def both(b, h, q_idx, kv_idx):
            same = ids[q_idx] == ids[kv_idx]
            return same & inner(b, h, q_idx - starts[ids[q_idx]], kv_idx - starts[ids[kv_idx]])

        return both

    return of_documents(or_masks(lambda b, h, q, kv: kv < 2, sliding_window()))


@mask
def jagged() -> Mask:
    """A nested tensor's rows, packed; what lies behind the last one belongs to none."""
    _, offsets = document_ids([5, 3, 9])
    row = torch.searchsorted(offsets, torch.arange(S), right=True) - 1

    def nested(b, h, q_idx, kv_idx):
        inside = (q_idx < offsets[-1]) & (kv_idx < offsets[-1])
        return inside & (row[q_idx] == row[kv_idx])

    return nested


@mask
def shared_prefix() -> Mask:
    """Several answers to one prompt, which is stored once."""
    ids, starts = document_ids([6, 4, 4, 5, 5])
    prompt = torch.tensor([0, 0, 0, 3, 3])

    def shared(b, h, q_idx, kv_idx):
        own, its_prompt = ids[q_idx], prompt[ids[q_idx]]
        before = (kv_idx >= starts[own]) & causal(b, h, q_idx, kv_idx)
        prefix = (own != its_prompt) & (kv_idx >= starts[its_prompt]) & (kv_idx < starts[its_prompt + 1])
        return before | prefix

    return shared


@mask
def image_spans() -> Mask:
    """Transfusion: text is causal, the patches of one image see each other."""
    spans = [(3, 9), (14, 20)]

    def transfusion(b, h, q_idx, kv_idx):
        visible = q_idx >= kv_idx
        for start, end in spans:
            inside = (q_idx >= start) & (q_idx < end) & (kv_idx >= start) & (kv_idx < end)
            visible = visible | inside
        return visible

    return transfusion


@mask
def image_groups() -> Mask:
    """The same from a tensor of groups, -1 for text."""
    group = torch.full((B, S), -1)
    group[0, 3:9], group[1, 14:20] = 0, 1

    def grouped(b, h, q_idx, kv_idx):
        same = (group[b, q_idx] == group[b, kv_idx]) & (group[b, q_idx] >= 0)
        return causal(b, h, q_idx, kv_idx) | same

    return grouped


@mask(sizes=(B, H, 2, 12, 9))
def cross_attention_to_images() -> Mask:
    """Flamingo: text sees the image tokens whose interval it lies in."""
    intervals = torch.tensor([[0, 7], [1, 7], [7, 12]], dtype=torch.int32)
    image = torch.arange(3).repeat_interleave(3)

    def visible(b, h, q_idx, kv_idx):
        interval = intervals[image[kv_idx]]
        return (q_idx >= interval[0]) & (q_idx < interval[1])

    return visible


@mask(sizes=(B, H, 2, 12, 9))
def cross_attention_padded() -> Mask:
    q_len, kv_len = torch.tensor([12, 5]), torch.tensor([4, 9])
    return lambda b, h, q_idx, kv_idx: (q_idx < q_len[b]) & (kv_idx < kv_len[b])


@pytest.mark.parametrize("name", GALLERY)
def test_masks_of_the_gallery(name: str, same_as_flex: Any) -> None:
    torch.manual_seed(len(name))
    make, sizes = GALLERY[name]
    same_as_flex(None, make(), sizes)


def test_scores_and_masks_together(same_as_flex: Any) -> None:
    torch.manual_seed(0)
    slopes = torch.rand(H)

    def score(score, b, h, q_idx, kv_idx):
        return torch.tanh(score / 3) * 3 - slopes[h] * (q_idx - kv_idx)

    for name in ("documents", "sliding window by composition", "image groups"):
        same_as_flex(score, GALLERY[name][0](), SQUARE)
