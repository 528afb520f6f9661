"""Block classification over a gallery of masks, against all of their pairs: never unsound, and nearly always exact."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit.analysis.structure import EMPTY, FULL, PARTIAL

Mask = Callable[..., Any]
B, H, S, W = 2, 2, 768, 24  # a side of the pictures: 24 x 32 pixels
BLOCKS = [(128, 128), (96, 64), (64, 64), (32, 128), (50, 30), (16, 16)]


def ids_of(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def tree_ends(rng: np.random.Generator) -> torch.Tensor:
    """A random tree in depth-first order: node i is an ancestor of j exactly if i <= j < ends[i]."""
    parents = np.array([-1, *(rng.integers(max(0, i - 40), i) for i in range(1, S))])
    order, children = [], [np.flatnonzero(parents == i) for i in range(S)]
    stack = [0]
    while stack:
        order.append(node := stack.pop())
        stack += children[node].tolist()
    size = np.ones(S, np.int64)
    for node in reversed(order):
        if parents[node] >= 0:
            size[parents[node]] += size[node]
    return torch.from_numpy(np.arange(S) + size[order])


def gallery() -> dict[str, Mask]:
    """Masks as people write them. Each runs on whole index tensors as well as on proxies."""
    rng = np.random.default_rng(3)
    documents = ids_of(100, 1, 30, 250, 7, 180, 200)
    packed = torch.stack([documents, ids_of(384, 384)])
    lens = torch.tensor([700, 130])
    ends = torch.tensor([100, 333])
    reach = torch.tensor([20, 300])
    random_blocks = torch.from_numpy(rng.random((H, S // 32, S // 32)) < 0.2)
    diagonal = torch.arange(S // 32)[:, None] - torch.arange(S // 32)
    big_bird = (
        random_blocks
        | (diagonal.abs() <= 1)
        | (torch.arange(S // 32) < 1)
        | (torch.arange(S // 32) < 1)[:, None]
    )
    pixels = torch.from_numpy(np.kron(rng.random((S // 64, S // 64)) < 0.4, np.ones((64, 64), bool)))
    triangle = torch.ones(S, S, dtype=torch.bool).tril()
    end = tree_ends(rng)
    slopes = torch.tensor([0.5, 0.031])
    image = (ids_of(100, 150, 120, 200, 198) % 2) * ids_of(100, 150, 120, 200, 198)

    def local(i: Any, j: Any, radius: int) -> Any:
        return ((i // W - j // W).abs() <= radius) & ((i % W - j % W).abs() <= radius)

    return {
        "causal": lambda b, h, i, j: j <= i,
        "anti-causal": lambda b, h, i, j: j > i,
        "window": lambda b, h, i, j: (i - j <= 100) & (j - i <= 20),
        "causal window": lambda b, h, i, j: (j <= i) & (i - j < 130),
        "window by abs": lambda b, h, i, j: (i - j).abs() < 77,
        "sinks and window": lambda b, h, i, j: (j <= i) & ((j < 4) | (i - j <= 128)),
        "window of each head": lambda b, h, i, j: (j <= i) & (i - j <= reach[h]),
        "prefix": lambda b, h, i, j: (j <= i) | (j < 200),
        "prefix of each sequence": lambda b, h, i, j: (j <= i) | (j < ends[b]),
        "documents": lambda b, h, i, j: packed[b, i] == packed[b, j],
        "documents, causal": lambda b, h, i, j: (documents[i] == documents[j]) & (j <= i),
        "documents, window": lambda b, h, i, j: (documents[i] == documents[j]) & ((i - j).abs() <= 64),
        "jagged lengths": lambda b, h, i, j: (j < lens[b]) & (i < lens[b]) & (j <= i),
        "dilated": lambda b, h, i, j: (i - j) % 4 == 0,
        "dilated widely": lambda b, h, i, j: (j <= i) & ((i - j) % 256 == 0),
        "strided": lambda b, h, i, j: (j <= i) & ((i - j <= 64) | ((i - j) % 64 == 0)),
        "fixed": lambda b, h, i, j: (j <= i) & ((j // 64 == i // 64) | (j % 64 >= 56)),
        "chunks": lambda b, h, i, j: (i // 100 == j // 100) | (i // 100 == j // 100 + 1),
        "staircase": lambda b, h, i, j: j < (i // 96 + 1) * 96,
        "checkerboard": lambda b, h, i, j: (i // 48 + j // 48) % 2 == 0,
        "map like BigBird's": lambda b, h, i, j: big_bird[h, i // 32, j // 32],
        "map and causal": lambda b, h, i, j: random_blocks[h, i // 32, j // 32] & (j <= i),
        "picture, neighbours": lambda b, h, i, j: local(i, j, 3),
        "picture, shifted windows": lambda b, h, i, j: (
            ((i // W + 2) // 4 == (j // W + 2) // 4) & ((i % W + 4) // 8 == (j % W + 4) // 8)
        ),
        "picture, axial": lambda b, h, i, j: (i // W == j // W) | (i % W == j % W),
        "tree": lambda b, h, i, j: (j <= i) & (i < end[j]),
        "captured pixels": lambda b, h, i, j: pixels[i, j],
        "captured triangle": lambda b, h, i, j: triangle[i, j],
        "pictures in text": lambda b, h, i, j: (j <= i) | ((image[i] == image[j]) & (image[i] > 0)),
        "distance in floats": lambda b, h, i, j: slopes[h] * (i - j).abs().float() < 4.0,
        "decay": lambda b, h, i, j: (j <= i) & (torch.exp((i - j).float() * -0.02) > 0.1),
        "ratio": lambda b, h, i, j: j.float() / (i.float() + 1.0) > 0.503,
        "anti-diagonal": lambda b, h, i, j: (i + j >= 500) & (i + j < 900),
        "not a window": lambda b, h, i, j: ~((i - j).abs() < 64) & (2 * j - i < 500),
    }  # fmt: skip


def truth(visible: np.ndarray, q_block: int, kv_block: int) -> np.ndarray:
    """The kind of every block, from all of its pairs."""
    rows, columns = np.arange(0, S, q_block), np.arange(0, S, kv_block)
    seen = np.add.reduceat(np.add.reduceat(visible.astype(np.int64), rows, axis=-2), columns, axis=-1)
    area = np.diff(np.append(rows, S))[:, None] * np.diff(np.append(columns, S))
    return np.where(seen == area, FULL, np.where(seen > 0, PARTIAL, EMPTY))


GALLERY = gallery()


@pytest.mark.shows
@pytest.mark.parametrize("name", GALLERY)
def test_sound_and_exact(name: str) -> None:
    mask = GALLERY[name]
    index = [
        torch.arange(n).view([-1 if at == k else 1 for k in range(4)]) for at, n in enumerate((B, H, S, S))
    ]
    visible = torch.as_tensor(mask(*index)).expand(B, H, S, S).numpy()
    exact = total = 0
    for q_block, kv_block in BLOCKS:
        found = ak.block_mask(mask, B, H, S, S, q_block=q_block, kv_block=kv_block).to_dense().numpy()
        wanted = truth(visible, q_block, kv_block)
        unsound = (found != wanted) & (found != PARTIAL)
        assert not unsound.any(), f"{int(unsound.sum())} blocks of {q_block} x {kv_block} are unsound"
        exact, total = exact + int((found == wanted).sum()), total + wanted.size
    assert exact >= 0.99 * total, f"{exact} of {total} blocks are exact"
