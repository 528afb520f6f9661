"""The KV cache: rows of keys and values that grow at their ends, read by `attention` where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import PAGE_SIZES, check_pages, check_tensor, is_page_size, shape_of
from attnkit.ops.kv_append import CODECS, append, capacity, slots, write
from attnkit.ops.warm import is_unwatched

_QUANTISED = ("fp8", "int8", "int4", "int2")


class Segment(NamedTuple):
    """What `attention` reads of a cache: pages, if there is a table."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    page_table: Tensor | None


class KVCache:
    """Keys and values of ``batch`` rows, each with a length of its own.

    ``ak.attention(q, cache)`` attends to it; the queries are the last tokens of each row, already appended. It takes no
    gradient.

    Args:
        batch: rows.
        num_kv_heads: heads of k and v.
        head_dim: width of a key.
        v_head_dim: width of a value; None is ``head_dim``.
        max_len: tokens that a row can hold; with pages rounded up to whole ones.
        codec: how elements are kept: ``"f32"``, ``"f16"``, ``"bf16"``; or a pair, for k and for v. q has the dtype of a
            plain codec; k and v of any float dtype are rounded to it.
        group_size: tokens or channels that share a scale, of the quantised codecs (which are not built yet).
        residual: the newest tokens that they keep in full precision.
        page_size: None, or the tokens of a page, a power of two of at least 16: each row then is a list of pages.
        device: ``"cpu"``.

    Raises:
        AttnkitError: AK401, a number is not allowed; AK402, not a number; AK504, the codec or the device is not built yet.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        max_len: int,
        codec: str | tuple[str, str] = "bf16",
        group_size: int = 32,
        residual: int = 128,
        page_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        numbers = {
            "batch": batch, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim,
            "max_len": max_len, "group_size": group_size, "residual": residual,
        }  # fmt: skip
        for name, n in numbers.items():
            if type(n) is not int:
                raise error("AK402", where=name, given=type(n).__name__, allowed="an int")
            if n < (0 if name in ("batch", "residual") else 1):
                raise error("AK401", where=name, given=str(n), allowed="a positive number")
        if page_size is not None and (type(page_size) is not int or not is_page_size(page_size)):
            raise error("AK401", where="page_size", given=repr(page_size), allowed=PAGE_SIZES)
        if torch.device(device).type != "cpu":
            raise error("AK504", where="device", given=str(device), allowed="cpu")
        dtype = CODECS[_codec(codec)]
        table = None
        if page_size is None:
            outer, inner = batch, max_len
        else:
            columns = -(-max_len // page_size)
            outer, inner = batch * columns, page_size
            table = torch.arange(outer, dtype=torch.int32).view(batch, columns)
        k, v = (
            _memory(outer, num_kv_heads, inner, dim, dtype, table is not None)
            for dim in (head_dim, v_head_dim)
        )
        self._keep(k, v, table, torch.zeros(batch, dtype=torch.int32), external=False)

    @classmethod
    def from_pages(cls, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor) -> KVCache:
        """A cache over pages that somebody else allocates, read (and appended to) in place.

        Args:
            k_pages: ``[pages, Hkv, page_size, D]``, of any strides: pages that hold tokens before heads are given as
                ``k_pages.transpose(1, 2)``. float32, float16 or bfloat16.
            v_pages: ``[pages, Hkv, page_size, Dv]``, likewise.
            page_table: int32 ``[B, n]``: token t of row b is token ``t % page_size`` of page
                ``page_table[b, t // page_size]``. Entries beyond a row's length are never read.
            lengths: int32 ``[B]``, which `append` and the others change.

        Raises:
            AttnkitError: AK402, not a tensor; AK403, shapes; AK404, dtypes; AK405, devices; AK602, lengths.
        """
        for name, t in (("k_pages", k_pages), ("v_pages", v_pages)):
            check_tensor(name, t)
            if t.dim() != 4 or t.shape[3] == 0:
                raise error(
                    "AK403", where=name, given=shape_of(t), allowed="[pages, heads, page_size, head_dim]"
                )
            if t.dtype not in CODECS.values() or t.dtype != k_pages.dtype:
                allowed = "float32, bfloat16 or float16, k and v alike"
                raise error("AK404", where=name, given=str(t.dtype), allowed=allowed)
        if k_pages.shape[:3] != v_pages.shape[:3]:
            given, allowed = (
                f"{shape_of(k_pages)} and {shape_of(v_pages)}",
                "pages of the same tokens and heads",
            )
            raise error("AK403", where="k_pages, v_pages", given=given, allowed=allowed)
        for name, t, rank in (("page_table", page_table, 2), ("lengths", lengths, 1)):
            check_tensor(name, t, k_pages.device)
            if t.dtype != torch.int32:
                raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32")
            if t.dim() != rank:
                raise error(
                    "AK403", where=name, given=shape_of(t), allowed="[batch, n]" if rank == 2 else "[batch]"
                )
        if k_pages.device.type != "cpu":
            raise error("AK504", where="device", given=str(k_pages.device), allowed="cpu")
        check_pages(k_pages.shape[2], page_table, lengths, lengths.shape[0])
        cache = cls.__new__(cls)
        cache._keep(k_pages, v_pages, page_table, lengths, external=True)
        return cache

    def _keep(self, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor, external: bool) -> None:
        self._storage = [k, v] if table is None else [k, v, table]
        self.lengths = lengths
        self.codec = next(name for name, dtype in CODECS.items() if dtype is k.dtype)
        self._external = external

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def max_len(self) -> int:
        """Tokens that a row can hold."""
        return capacity(self._storage)

    @property
    def page_size(self) -> int | None:
        """Tokens of a page; None if there are no pages."""
        return self._storage[0].shape[2] if len(self._storage) == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, without lengths and page table."""
        return sum(t.numel() * t.element_size() for t in self._storage[:2])

    @property
    def segment(self) -> Segment:
        """The tensors that attention reads."""
        k, v, *table = self._storage
        return Segment(k, v, self.lengths, table[0] if table else None)

    def __repr__(self) -> str:
        k, v = self._storage[:2]
        pages = "" if self.page_size is None else f", page_size={self.page_size}"
        dims = f"{k.shape[3]}" if k.shape[3] == v.shape[3] else f"{k.shape[3]}/{v.shape[3]}"
        return f"KVCache({self.batch} rows, {k.shape[1]} heads of {dims}, max_len={self.max_len}, {self.codec}{pages})"

    # --- how it changes -----------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, lens: Tensor | None = None) -> None:
        """Put tokens at each row's end.

        Args:
            k: ``[B, Hkv, T, D]``, of a float dtype.
            v: ``[B, Hkv, T, Dv]``.
            lens: int32 ``[B]``: only the first ``lens[b]`` of a row's T tokens exist. None: all do.

        Raises:
            AttnkitError: AK402 to AK405, not such tensors; AK503, they require gradients; AK602, a row would outgrow
                the cache or its pages: then nothing has changed.
        """
        given = [k, v] if lens is None else [k, v, lens]
        watched = torch.compiler.is_compiling() or (
            all(isinstance(t, Tensor) for t in given)
            and not is_unwatched((*given, self.lengths, *self._storage))
        )
        do = torch.ops.attnkit.kv_append if watched else append
        do(self._storage, self.lengths, k, v, self.codec, lens)

    def truncate(self, n: int | Tensor) -> None:
        """Forget what comes after the first n tokens (an int, or int ``[B]``); shorter rows stay as they are.

        The cache is as if the rest had never been appended.

        Raises:
            AttnkitError: AK401, n is negative; AK402, AK403, it is no such number or tensor.
        """
        if isinstance(n, Tensor):
            self._check_integers("n", n, (self.batch,))
            if not torch.compiler.is_compiling() and bool((n < 0).any()):
                raise error("AK401", where="n", given=str(n.tolist()[:8]), allowed="0 and more")
            self.lengths.copy_(torch.minimum(self.lengths, n.to(torch.int32)))
            return
        if type(n) is bool or not isinstance(n, (int, torch.SymInt)):
            raise error("AK402", where="n", given=type(n).__name__, allowed="an int or a tensor of ints")
        if n < 0:
            raise error("AK401", where="n", given=str(n), allowed="0 and more")
        self.lengths.clamp_(max=n)

    def reorder(self, batch_index: Tensor) -> None:
        """Row b becomes what row ``batch_index[b]`` was, as beam search needs it: int ``[B]``, any may repeat.

        With pages, only rows that repeat are copied.

        Raises:
            AttnkitError: AK401, there is no such row; AK402 to AK405, not such a tensor; AK504, the pages are somebody
                else's: reorder the page table.
        """
        if self._external:
            what = "pages of somebody else's are not reordered"
            raise error(
                "AK504", what=what, where="reorder", hint="reorder the rows of page_table and lengths"
            )
        self._check_integers("batch_index", batch_index, (self.batch,))
        index = batch_index.tolist()
        if any(not 0 <= b < self.batch for b in index):
            raise error("AK401", where="batch_index", given=str(index[:8]), allowed=f"0..{self.batch - 1}")
        lengths = self.lengths.tolist()
        longest = max((lengths[b] for b in index), default=0)
        if len(self._storage) == 2:
            for t in self._storage:
                t[:, :, :longest] = t[batch_index.long(), :, :longest]
        else:
            self._reorder_pages(index, lengths)
        self.lengths.copy_(self.lengths[batch_index.long()])

    def _reorder_pages(self, index: list[int], lengths: list[int]) -> None:
        *stores, table = self._storage
        unused = [b for b in range(self.batch) if b not in index]
        rows: list[int] = []  # whose pages each row gets
        for b in index:
            if b not in rows:
                rows.append(b)
                continue
            rows.append(unused.pop())
            used = -(-lengths[b] // stores[0].shape[2])
            to, source = table[rows[-1], :used].long(), table[b, :used].long()
            for t in stores:
                t[to] = t[source]
        table.copy_(table[torch.tensor(rows, dtype=torch.int64)])

    def select(self, positions: Tensor) -> None:
        """Keep only the tokens at these positions, in this order: of a tree of drafts, the branch that was accepted.

        Args:
            positions: int ``[n]`` for all rows, or ``[B, n]``; -1 at the end of a row stands for nothing.

        Raises:
            AttnkitError: AK401, there is no such token; AK402 to AK405, not such a tensor.
        """
        self._check_integers("positions", positions, None)
        wanted = positions.long()
        if wanted.dim() == 1:
            wanted = wanted.expand(self.batch, -1)
        if wanted.dim() != 2 or wanted.shape[0] != self.batch:
            raise error(
                "AK403", where="positions", given=shape_of(positions), allowed=f"[n] or [{self.batch}, n]"
            )
        exist = wanted >= 0
        counts = exist.sum(1, dtype=torch.int32)
        in_front = exist == (torch.arange(wanted.shape[1]) < counts[:, None])
        if not bool((in_front & (wanted >= -1) & (wanted < self.lengths[:, None])).all()):
            allowed = f"tokens of rows of {self.lengths.tolist()[:8]}, then -1"
            raise error("AK401", where="positions", given=str(positions.tolist())[:80], allowed=allowed)
        rows, columns = exist.nonzero(as_tuple=True)
        write(self._storage, rows, columns, *self._read(rows, wanted[rows, columns]))
        self.lengths.copy_(counts)

    # --- what it holds ------------------------------------------------------------------------------------

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """The tokens, ``k [B, Hkv, n, D]`` and ``v [B, Hkv, n, Dv]``, n being the longest row; zero beyond a row's end."""
        lengths = self.lengths.long()
        longest = int(lengths.max()) if self.batch else 0
        rows, columns = (torch.arange(longest) < lengths[:, None]).nonzero(as_tuple=True)
        found = []
        for tokens in self._read(rows, columns):
            out = tokens.new_zeros(self.batch, longest, *tokens.shape[1:])
            out[rows, columns] = tokens
            found.append(out.transpose(1, 2))
        return found[0], found[1]

    def _read(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        first, second = slots(self._storage, rows, positions)
        k, v = (t[first, :, second] for t in self._storage[:2])
        return k, v

    def _check_integers(self, name: str, t: Any, shape: tuple[int, ...] | None) -> None:
        check_tensor(name, t, self.lengths.device)
        if t.dtype not in (torch.int32, torch.int64):
            raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32 or torch.int64")
        if shape is not None and t.shape != shape:
            raise error("AK403", where=name, given=shape_of(t), allowed=str(list(shape)))


def _codec(codec: Any) -> str:
    names = codec if isinstance(codec, tuple) and len(codec) == 2 else (codec, codec)
    for name in names:
        if name in _QUANTISED:
            what = "quantised codecs are not built yet"
            raise error("AK504", what=what, where="codec", given=repr(name), allowed=", ".join(CODECS))
        if not isinstance(name, str) or name not in CODECS:
            raise error(
                "AK401", where="codec", given=repr(codec), allowed=f"{', '.join(CODECS)}, or a pair of them"
            )
    if names[0] != names[1]:
        what = "k and v of different plain codecs are not built yet"
        raise error("AK504", what=what, where="codec", given=repr(codec), allowed="the same for both")
    return str(names[0])


def _memory(outer: int, heads: int, inner: int, dim: int, dtype: torch.dtype, paged: bool) -> Tensor:
    """``[outer, heads, inner, dim]``, unset; of pages, those of a head follow each other, as do the tokens of a row."""
    if paged:
        return torch.empty(heads, outer, inner, dim, dtype=dtype).transpose(0, 1)
    return torch.empty(outer, heads, inner, dim, dtype=dtype)
