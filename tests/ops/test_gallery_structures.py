# ruff: noqa: ANN001, ANN202 -- the functions are written as their users write them
"""More mask functions of public galleries: images and videos, maps and lists, trees; and the ways to write a function.

Each runs unchanged through `ak.flex_attention` as the mask of a BlockMask, eager and compiled, and is compared with
torch's own flex_attention on float64 tensors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
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


# --- images and videos --------------------------------------------------------------------------------------


def neighbourhood(
    coordinates: Callable[[Any], tuple[Any, Any]], width: int, height: int, kernel: int
) -> Mask:
    """The keys around a query; its window is moved inside the image at the edges."""

    def natten(b, h, q_idx, kv_idx):
        (q_x, q_y), (kv_x, kv_y) = coordinates(q_idx), coordinates(kv_idx)
        x = q_x.clamp(kernel // 2, width - 1 - kernel // 2)
        y = torch.clamp(q_y, kernel // 2, height - 1 - kernel // 2)
        return ((x - kv_x).abs() <= kernel // 2) & ((y - kv_y).abs() <= kernel // 2)

    return natten


@mask
def natten() -> Mask:
    return neighbourhood(lambda i: (i % 6, i // 6), 6, 4, 3)


@mask
def natten_in_tiles() -> Mask:
    """The image is stored tile by tile, 2 by 2."""

    def coordinates(i):
        tile, inside = i // 4, i % 4
        return tile % 3 * 2 + inside % 2, tile // 3 * 2 + inside // 2

    return neighbourhood(coordinates, 6, 4, 3)


@mask(sizes=(B, H, 2, 64, 64))
def natten_in_morton_order() -> Mask:
    """The image is stored along the Z-curve: the bits of x and y alternate."""

    def even_bits(i):
        i = i & 0x55555555
        i = (i | i >> 1) & 0x33333333
        i = (i | i >> 2) & 0x0F0F0F0F
        return (i | i >> 4) & 0x00FF00FF

    return neighbourhood(lambda i: (even_bits(i), even_bits(i >> 1)), 8, 8, 3)


@mask(sizes=(B, H, 2, 16, 16))
def morton_codes_compared() -> Mask:
    """Coordinates to codes, the other way around: keys up to the query's place on the Z-curve."""

    def spread(i):
        return (i | i << 1) & 0b101

    def code(i):
        return spread(i % 4) | spread(i // 4 % 4) << 1

    return lambda b, h, q_idx, kv_idx: code(kv_idx) <= code(q_idx)


@mask(sizes=(1, H, 2, 40, 40))
def sliding_tiles() -> Mask:
    """STA: windows of whole tiles over an image of 6 by 6, stored in tiles of 2 by 2; then 4 tokens of text."""
    tiles, kernel, vision, text = 3, 2, 36, 4
    before, after = kernel // 2, kernel // 2 + (kernel % 2 - 1)

    def sliding(b, h, q_idx, kv_idx):
        near = (q_idx < vision) & (kv_idx < vision)
        for of in (lambda tile: tile // tiles, lambda tile: tile % tiles):
            q_tile, kv_tile = of(q_idx // 4), of(kv_idx // 4)
            center = q_tile.clamp(before, tiles - 1 - after)
            near = near & (kv_tile >= center - before) & (kv_tile <= center + after)
        to_text = (q_idx < vision) & (kv_idx >= vision) & (kv_idx < vision + text)
        from_text = (q_idx >= vision) & (kv_idx < vision + text)
        return near | to_text | from_text

    return sliding


@mask(sizes=(1, H, 2, 38, 38))
def spatial_and_temporal_heads() -> Mask:
    """Sparse VideoGen: half of the heads look around in space, half along time; a prompt of 2, frames of 6."""
    prompt, frame = 2, 6

    def video(b, h, q_idx, kv_idx):
        spatial = torch.abs(q_idx - kv_idx) < 2 * frame
        temporal = torch.abs((q_idx - prompt) % frame - (kv_idx - prompt) % frame) < 2
        text = (q_idx < prompt) | (kv_idx < prompt)
        return text | torch.where(h < H // 2, spatial, temporal)

    return video


@mask(sizes=(1, H, 2, 36, 36))
def frames_in_order() -> Mask:
    """Video: all of this frame and those before, within 3 frames."""
    frame = torch.tensor(6)

    def ordered(b, h, q_idx, kv_idx):
        apart = torch.floor_divide(q_idx, frame) - torch.div(kv_idx, frame, rounding_mode="floor")
        return (apart >= 0) & (apart < 3)

    return ordered


# --- maps and lists -----------------------------------------------------------------------------------------


@mask
def any_map() -> Mask:
    visible = torch.rand(B, H, S, S) < 0.4
    return lambda b, h, q_idx, kv_idx: visible[b, h, q_idx, kv_idx]


@mask
def learned_blocks() -> Mask:
    visible = torch.rand(H, S // 4, S // 4) < 0.5
    return lambda b, h, q_idx, kv_idx: visible[h, q_idx // 4, kv_idx // 4]


@mask
def learned_gates() -> Mask:
    gate = nn.Parameter(torch.randn(H, S // 4, S // 4))
    return lambda b, h, q_idx, kv_idx: torch.sigmoid(gate[h, q_idx // 4, kv_idx // 4]) > 0.5


@mask
def selected_blocks() -> Mask:
    """Lists of the best blocks of keys for each block of queries."""
    chosen = torch.rand(B, H, S // 4, S // 4).topk(2).indices

    def selected(b, h, q_idx, kv_idx):
        return (chosen[b, h, q_idx // 4] == kv_idx // 4).any()

    return selected


@mask
def random_blocks_and_window() -> Mask:
    """Big Bird."""
    random = torch.rand(S // 4, S // 4) < 0.2

    def bird(b, h, q_idx, kv_idx):
        q_block, kv_block = q_idx >> 2, kv_idx >> 2
        ends = (q_block == 0) | (kv_block == 0)
        return ends | ((q_block - kv_block).abs() <= 1) | random[q_block, kv_block]

    return bird


@mask
def clusters() -> Mask:
    """Queries and keys of one cluster, per head."""
    q_cluster, kv_cluster = torch.randint(0, 3, (H, S)), torch.randint(0, 3, (H, S))
    return lambda b, h, q_idx, kv_idx: torch.eq(q_cluster[h, q_idx], kv_cluster[h, kv_idx])


@mask(sizes=(B, H, 2, 7, 12))
def tree_of_drafts() -> Mask:
    """Speculative decoding: all of the cache, and the ancestors in the tree of drafts."""
    prefix, parents = 5, [-1, 0, 1, 1, 3, 3, 0]
    ancestor = torch.eye(7, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        ancestor[node] |= ancestor[parent]

    def tree(b, h, q_idx, kv_idx):
        node = (kv_idx - prefix).clamp(min=0, max=len(parents) - 1)
        return (kv_idx < prefix) | ancestor[q_idx, node]

    return tree


@mask(sizes=(B, H, 2, 7, 7))
def tree_in_bits() -> Mask:
    """The same with a word of bits for each node."""
    parents = [-1, 0, 1, 1, 3, 3, 0]
    words = [1]
    for node, parent in enumerate(parents[1:], 1):
        words.append(words[parent] | 1 << node)
    ancestors = torch.tensor(words)
    return lambda b, h, q_idx, kv_idx: (ancestors[q_idx] >> kv_idx & 1) == 1


@mask(sizes=(B, H, 2, 12, 17))
def drafts_in_training() -> Mask:
    """Several drafts after one prefix: each sees the prefix and its own past."""
    prefix, block = 5, 4

    def drafts(b, h, q_idx, kv_idx):
        after = kv_idx - prefix
        own = (q_idx // block == after // block) & (after % block <= q_idx % block)
        return (kv_idx < prefix) | ((kv_idx >= prefix) & own)

    return drafts


@mask
def physical_pages() -> Mask:
    """Paged attention: physical positions become logical ones; a page of -1 belongs to someone else."""
    page, logical = 4, torch.stack([torch.randperm(S // 4) for _ in range(B)])
    logical[0, 2] = logical[1, 5] = -1

    def paged(b, h, q_idx, physical_kv_idx):
        block = logical[b, physical_kv_idx // page]
        kv_idx = block * page + physical_kv_idx % page
        return torch.where(block >= 0, causal(b, h, q_idx, kv_idx), False)

    return paged


# --- how functions are written --------------------------------------------------------------------------------


def batched(inner: Mask, size: int) -> Mask:
    """Any mask inside groups of ``size`` tokens."""

    def both(b, h, q_idx, kv_idx):
        return (q_idx // size == kv_idx // size) & inner(b, h, q_idx % size, kv_idx % size)

    return both


def within(b: Any, h: Any, q_idx: Any, kv_idx: Any, window: int) -> Any:
    return (q_idx - kv_idx).abs() < window


class Window(nn.Module):
    """A module that holds what its masks need."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ids", (torch.arange(24) > 9).int())
        self.window = 4

    def forward(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (self.ids[q_idx] == self.ids[kv_idx]) & self.near(b, h, q_idx, kv_idx)

    def near(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx).abs() <= self.window


@dataclass
class Blocks:
    """A callable object."""

    size: int

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx // self.size <= q_idx // self.size


@mask
def a_wrapper_around_another() -> Mask:
    return batched(or_masks(lambda b, h, q_idx, kv_idx: kv_idx < 5, causal), 8)


@mask
def a_wrapper_around_everything() -> Mask:
    return batched(noop_mask, 8)


@mask
def a_partial() -> Mask:
    return functools.partial(within, window=5)


@mask
def a_bound_method() -> Mask:
    return and_masks(Window().near)  # torch wants a function with a code object


@mask
def a_module() -> Mask:
    return or_masks(Window())


@mask
def a_callable_object() -> Mask:
    return and_masks(Blocks(5), lambda b, h, q, kv: Window().near(b, h, q, kv) | (kv == 0))


@mask
def many_of_one_kind() -> Mask:
    return or_masks(*[lambda b, h, q, kv, n=n: (q == n) | (kv == n) for n in (3, 7, 11)], causal)


@mask
def torch_functions_for_operators() -> Mask:
    def spelled_out(b, h, q_idx, kv_idx):
        past = torch.ge(q_idx, kv_idx)
        near = torch.lt(torch.sub(q_idx, kv_idx), 9)
        even = torch.eq(torch.remainder(torch.add(q_idx, kv_idx), 2), 0)
        odd_head = torch.bitwise_and(h, 1).to(torch.bool)
        return torch.logical_or(torch.bitwise_and(past, near), torch.logical_xor(even, odd_head)) & ~(
            kv_idx == 5
        )

    return spelled_out


@mask
def assembled_in_place() -> Mask:
    def assembled(b, h, q_idx, kv_idx):
        visible = q_idx >= kv_idx
        visible |= kv_idx == 0
        visible.logical_and_(q_idx - kv_idx < 12)
        kv_idx += 1
        return visible & (kv_idx % 5 != 0) & torch.ones_like(h, dtype=torch.bool)

    return assembled


@pytest.mark.parametrize("name", GALLERY)
def test_structures_of_the_gallery(name: str, same_as_flex: Any) -> None:
    torch.manual_seed(len(name))
    make, sizes = GALLERY[name]
    same_as_flex(None, make(), sizes)
