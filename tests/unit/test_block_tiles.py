"""Tiles that end where the blocks of a mask end."""

import pytest

from attnkit.backends.cpu.backend import backend as cpu
from attnkit.ir.text import parse
from attnkit.plan.blocks import block_of, tile_for
from attnkit.plan.spec import KernelSpec


def spec(mask: str, dtype: str = "float32") -> KernelSpec:
    text = f"""attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: bool[2]) {{
  o, lse = attend(q, k, v, scale = default) {{ mask = {mask} }}
  return o
}}"""
    return KernelSpec(parse(text), dtype, 64, 64)


@pytest.mark.parametrize(
    ("mask", "queries", "keys"),
    [
        ("b0[q_idx // 128, kv_idx // 64]", 128, 64),
        ("b0[(q_idx + 3) // 96, 0] & (kv_idx // 48 < q_idx)", 96, 48),
        ("(q_idx // 128 == kv_idx // 512) | (q_idx // 192 < 1)", 64, 512),
        ("b0[q_idx // 8, kv_idx // 4]", None, None),  # too small for tiles of their own
        ("(q_idx - kv_idx) // 64 == 0", None, None),
        ("kv_idx <= q_idx", None, None),
    ],
)
def test_blocks_are_found_in_the_mask(mask: str, queries: int | None, keys: int | None) -> None:
    found = spec(mask).program.attend.mask
    assert (block_of(found, "q_idx"), block_of(found, "kv_idx")) == (queries, keys)


@pytest.mark.parametrize(
    ("block", "tile"), [(None, 96), (64, 64), (128, 128), (192, 96), (256, 128), (160, 80), (37, 96)]
)
def test_tiles_divide_blocks(block: int | None, tile: int) -> None:
    assert tile_for(block, 96, 128) == tile


def test_the_kernels_take_them() -> None:
    defaults = {
        name: field.default
        for name, field in cpu.space(spec("b0[q_idx // 128, kv_idx // 64]", "bfloat16")).items()
    }
    assert defaults == {
        "tile_q": 128,
        "tile_kv": 64,
        "split_kv": 1024,
        "backward_tile_q": 64,
        "backward_tile_kv": 64,
    }
    usual = {name: field.default for name, field in cpu.space(spec("kv_idx <= q_idx", "bfloat16")).items()}
    assert usual == {
        "tile_q": 96,
        "tile_kv": 96,
        "split_kv": 1024,
        "backward_tile_q": 96,
        "backward_tile_kv": 192,
    }
