"""Running means of blocks of keys: what a decoder that chooses blocks keeps, so that a step reads no key that it does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import check_count, check_tensor, shape_of


class BlockMeans:
    """Sums of every ``block`` tokens of each row and head, float32, for rows that only grow.

    Append what is appended to the cache, and give it to the choice: ``select=ak.top_k_blocks(64, 16).given(means)``. The cache
    may be of any codec, and in pages. A second one, of values, makes the compressed branch of native sparse attention.

    Args:
        batch: rows.
        heads: kv heads.
        dim: channels.
        block: tokens in a block.
        max_len: the most tokens of a row.

    Raises:
        AttnkitError: AK401 or AK402, a size is no size.
    """

    def __init__(self, batch: int, heads: int, dim: int, *, block: int, max_len: int) -> None:
        sizes = {"batch": batch, "heads": heads, "dim": dim, "block": block, "max_len": max_len}
        for name, size in sizes.items():
            check_count(name, size, 1, 2**31 - 1)
        self.block, self.max_len = block, max_len
        self.sums = torch.zeros(batch, heads, -(-max_len // block), dim, dtype=torch.float32)
        self.lengths = torch.zeros(batch, dtype=torch.int32)

    @torch.no_grad()
    def append(self, tokens: Tensor, lens: Tensor | None = None) -> None:
        """Add ``tokens [B, H, T, D]`` at the end of each row; of row b the first ``lens[b]``, all if None.

        Raises:
            AttnkitError: AK402, AK403, not such tensors; AK602, more than a row has room for: nothing is changed.
        """
        check_tensor("tokens", tokens)
        batch, heads, _, dim = self.sums.shape
        if tokens.dim() != 4 or (tokens.shape[0], tokens.shape[1], tokens.shape[3]) != (batch, heads, dim):
            raise error(
                "AK403", where="tokens", given=shape_of(tokens), allowed=f"[{batch}, {heads}, T, {dim}]"
            )
        count = tokens.shape[2]
        added = torch.full((batch,), count) if lens is None else lens
        if lens is not None:
            check_tensor("lens", lens)
            if lens.shape != (batch,) or bool(((lens < 0) | (lens > count)).any()):
                raise error(
                    "AK602", where="lens", given=str(lens.tolist()[:8]), allowed=f"0..{count}, one a row"
                )
        if bool((self.lengths + added > self.max_len).any()):
            raise error("AK602", where="tokens", given=f"{int((self.lengths + added).max())} tokens in a row",
                        allowed=f"at most {self.max_len}")  # fmt: skip
        if count == 0:
            return
        token = torch.arange(count)
        exists = token < added[:, None]
        at = (self.lengths[:, None] + token).clamp(max=self.max_len - 1) // self.block
        index = at.long()[:, None, :, None].expand(tokens.shape)
        self.sums.scatter_add_(2, index, tokens.float().masked_fill(~exists[:, None, :, None], 0))
        self.lengths += added.int()

    def means(self) -> Tensor:
        """float32 ``[B, H, blocks, D]``; of an open block that of what it has, of one without tokens 0."""
        first = torch.arange(self.sums.shape[2]) * self.block
        held = (self.lengths[:, None] - first).clamp(1, self.block)
        return self.sums / held[:, None, :, None]
