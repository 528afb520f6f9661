"""The KV cache: rows of keys and values that grow at their ends, read by `attention` where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit import backends
from attnkit.errors import error
from attnkit.ir.intervals import INT32_MAX
from attnkit.ops import kv_storage
from attnkit.ops.attend_cache import Codes
from attnkit.ops.check import (
    NO_ROOM,
    PAGE_SIZES,
    check_count,
    check_flag,
    check_pages,
    check_tensor,
    is_page_size,
    no_room,
    read_lengths,
    shape_of,
)
from attnkit.ops.kv_append import append
from attnkit.ops.kv_codes import (
    BITS,
    PLAIN,
    SCALE_RUN,
    Scheme,
    allocate,
    capacity,
    parts_of,
    plain_scheme,
    tokens_of,
)
from attnkit.ops.warm import is_unwatched


class Segment(NamedTuple):
    """What `attention` reads of a cache: pages, if there is a table; of codes, `codes` is what k and v are elsewhere."""

    k: Tensor | None
    v: Tensor | None
    lengths: Tensor
    page_table: Tensor | None
    codes: Codes | None = None


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
        codec: how elements are kept: ``"f32"``, ``"f16"``, ``"bf16"``, ``"fp8"``, ``"int8"``, ``"int4"``, ``"int2"``; or a pair, for
            k and for v. q has the dtype of a plain codec, and any of these three beside codes; k and v of any float
            dtype are rounded.
        group_size: of int4 and int2, tokens (of k) or channels (of v) that share a scale: a multiple of 32.
        residual: the newest tokens that int4 and int2 keep in bfloat16, and how many can be taken back.
        page_size: None, or the tokens of a page, a power of two of at least 16 and of whole groups: each row then is a list of
            pages.
        device: ``"cpu"``, or an NVIDIA GPU (compiled, not run on one yet). What a graph that is replayed has no room for is not
            written there, and lengths stay at ``max_len``.
        k_scale: of fp8, a number or float32 ``[Hkv]``: what is kept is ``k / k_scale``. None is 1.
        v_scale: likewise.

    Raises:
        AttnkitError: AK401, a number is not allowed; AK402, not a number; AK403 and AK404, not such scales; AK504, the codec
            or the device is not built yet; AK603, out of memory.
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
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        numbers = {
            "batch": batch, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim,
            "max_len": max_len, "group_size": group_size, "residual": residual,
        }  # fmt: skip
        for name, n in numbers.items():
            check_count(name, n, 0 if name in ("batch", "residual") else 1, INT32_MAX)
        if page_size is not None and (
            type(page_size) is not int or not is_page_size(page_size) or page_size > INT32_MAX
        ):
            raise error("AK401", where="page_size", given=repr(page_size), allowed=PAGE_SIZES)
        k_codec, v_codec = _codecs(codec)
        device = _device(device)
        scheme = Scheme(k_codec, v_codec, head_dim, v_head_dim, group_size, residual)
        scales = kv_storage.check_scales(scheme, num_kv_heads, k_scale, v_scale)
        if scheme.has_newest and group_size % SCALE_RUN:
            raise error(
                "AK401", where="group_size", given=str(group_size), allowed=f"a multiple of {SCALE_RUN}"
            )
        if scheme.has_newest and page_size is not None and page_size % group_size:
            raise error(
                "AK401", where="page_size", given=str(page_size), allowed=f"groups of {group_size} tokens"
            )
        try:
            storage, lengths = self._allocate(scheme, batch, num_kv_heads, max_len, page_size, scales, device)
        except NO_ROOM as exc:
            raise no_room("KVCache", exc) from exc
        self._keep(storage, lengths, scheme)

    @staticmethod
    def _allocate(
        scheme: Scheme, batch: int, num_kv_heads: int, max_len: int, page_size: int | None,
        scales: tuple[Tensor | None, Tensor | None], device: torch.device,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """The storage, and lengths of nothing."""
        table = None
        if page_size is None:
            outer, inner = batch, -(-max_len // scheme.block) * scheme.block
        else:
            columns = -(-max_len // page_size)
            outer, inner = batch * columns, page_size
            table = torch.arange(outer, dtype=torch.int32, device=device).view(batch, columns)
        rows = device.type == "cuda"
        storage = allocate(scheme, batch, num_kv_heads, outer, inner, table, scales, device, rows)
        return storage, torch.zeros(batch, dtype=torch.int32, device=device)

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
            if t.dtype not in PLAIN.values() or t.dtype != k_pages.dtype:
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
        codec = next(name for name, dtype in PLAIN.items() if dtype is k_pages.dtype)
        _device(k_pages.device)
        check_pages(k_pages.shape[2], page_table, lengths, lengths.shape[0])
        cache = cls.__new__(cls)
        storage = [k_pages, v_pages, page_table]
        cache._keep(storage, lengths, plain_scheme(codec, storage), external=True)
        return cache

    def _keep(self, storage: list[Tensor], lengths: Tensor, scheme: Scheme, external: bool = False) -> None:
        self._storage = storage
        self.lengths = lengths
        self._scheme = scheme
        self._codes = None if scheme.is_plain else Codes.of(storage, scheme)
        self._external = external
        self._most = 0  # tokens of any row, as far as the host has counted along; see `_count_along`
        self.codec = scheme.k if scheme.k == scheme.v else f"{scheme.k}/{scheme.v}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the storage, which pickle would give memory of their own."""
        return {name: held for name, held in vars(self).items() if name != "_codes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._codes = None if self._scheme.is_plain else Codes.of(self._storage, self._scheme)

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def max_len(self) -> int:
        """Tokens that a row can hold."""
        return capacity(parts_of(self._scheme, self._storage))

    @property
    def page_size(self) -> int | None:
        """Tokens of a page; None if there are no pages."""
        parts = parts_of(self._scheme, self._storage)
        return None if parts.table is None else tokens_of(parts)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values with their scales, without lengths and page table."""
        kept = kv_storage.tensors(self._scheme, self._storage)
        return sum(t.numel() * t.element_size() for t in kept)

    @property
    def num_kv_heads(self) -> int:
        """Heads of k and v."""
        return self._storage[0].shape[1]

    @property
    def head_dims(self) -> tuple[int, int]:
        """The widths of keys and of values."""
        return self._scheme.head_dim, self._scheme.v_head_dim

    @property
    def segment(self) -> Segment:
        """The tensors that attention reads."""
        if self._codes is not None:
            return Segment(None, None, self.lengths, self._codes.table, self._codes)
        k, v, *table = self._storage
        return Segment(k, v, self.lengths, table[0] if table else None)

    def __repr__(self) -> str:
        pages = "" if self.page_size is None else f", page_size={self.page_size}"
        k, v = self.head_dims
        dims = f"{k}" if k == v else f"{k}/{v}"
        return f"KVCache({self.batch} rows, {self.num_kv_heads} heads of {dims}, max_len={self.max_len}, {self.codec}{pages})"

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
        if self.lengths.is_cuda and getattr(k, "ndim", 0) == 4 and not torch.compiler.is_compiling():
            self._count_along(k.shape[2], lens)
        if watched:
            for name, t in (("k", k), ("v", v), ("lens", lens)):
                if t is not None:
                    check_tensor(name, t)
        do = torch.ops.attnkit.kv_append if watched else append
        do(self._storage, self.lengths, k, v, self._scheme.text, lens)

    def _count_along(self, count: int, lens: Tensor | None) -> None:
        """Raise AK602 of a row on a GPU: the host counts how long one can be, and looks only where that is too long.

        What it does not see (graphs that are replayed, lengths that others change) the device leaves unwritten.
        """
        self._most += count
        if self._most <= self.max_len or (self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._most = int((self.lengths + (count if lens is None else lens)).max()) if self.batch else 0
        if self._most > self.max_len:
            given, self._most = f"{self._most} tokens", self.max_len
            raise error(
                "AK602",
                what="the cache is full",
                where="append",
                given=given,
                allowed=f"{self.max_len} in all",
            )

    def truncate(self, n: int | Tensor, lossy: bool = False) -> None:
        """Forget what comes after the first n tokens (an int, or int ``[B]``); shorter rows stay as they are.

        The cache is as if the rest had never been appended. int4 and int2 can take back ``residual`` tokens; ``lossy`` more, to
        a multiple of ``group_size``: what is left then are codes.

        Raises:
            AttnkitError: AK401, n is negative, or deeper than that; AK402, AK403, it is no such number or tensor.
        """
        check_flag("lossy", lossy)
        if self._scheme.has_newest:
            if isinstance(n, Tensor):
                self._check_integers("n", n, (self.batch,))
            elif type(n) is not int:
                raise error("AK402", where="n", given=type(n).__name__, allowed="an int or a tensor of ints")
            kv_storage.truncate(self._scheme, self._storage, self.lengths, n, lossy)
            if type(n) is int:
                self._most = min(self._most, n)
            return
        if isinstance(n, Tensor):
            self._check_integers("n", n, (self.batch,))
            if not (n.is_cuda or torch.compiler.is_compiling()) and bool((n < 0).any()):
                raise error("AK401", where="n", given=str(n.tolist()[:8]), allowed="0 and more")
            self.lengths.copy_(torch.minimum(self.lengths, n.to(torch.int32)).clamp_(min=0))
            return
        if type(n) is bool or not isinstance(n, (int, torch.SymInt)):
            raise error("AK402", where="n", given=type(n).__name__, allowed="an int or a tensor of ints")
        if n < 0:
            raise error("AK401", where="n", given=str(n), allowed="0 and more")
        if type(n) is int:
            n = min(n, INT32_MAX)
        self.lengths.clamp_(max=n)
        if type(n) is int:
            self._most = min(self._most, n)

    def reorder(self, batch_index: Tensor) -> None:
        """Row b becomes what row ``batch_index[b]`` was, as beam search needs it: int ``[B]``, any may repeat.

        With pages, only rows that repeat are copied.

        Raises:
            AttnkitError: AK401, there is no such row; AK402 to AK405, not such a tensor; AK504, the pages are somebody
                else's: reorder the page table; AK602, lengths that the cache cannot hold.
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
        kv_storage.reorder(self._scheme, self._storage, index, self._held())
        self.lengths.copy_(self.lengths[batch_index.long()])

    def select(self, positions: Tensor) -> None:
        """Keep only the tokens at these positions, in this order: of a tree of drafts, the branch that was accepted.

        Args:
            positions: int ``[n]`` for all rows, or ``[B, n]``; -1 at the end of a row stands for nothing.

        Raises:
            AttnkitError: AK401, there is no such token; AK402 to AK405, not such a tensor; AK602, lengths that the cache
                cannot hold.
        """
        self._check_integers("positions", positions, None)
        held = self._held()
        wanted = positions.long()
        if wanted.dim() == 1:
            wanted = wanted.expand(self.batch, -1)
        if wanted.dim() != 2 or wanted.shape[0] != self.batch:
            raise error(
                "AK403", where="positions", given=shape_of(positions), allowed=f"[n] or [{self.batch}, n]"
            )
        exist = wanted >= 0
        counts = exist.sum(1, dtype=torch.int32)
        in_front = exist == (torch.arange(wanted.shape[1], device=wanted.device) < counts[:, None])
        if not bool((in_front & (wanted >= -1) & (wanted < self.lengths[:, None])).all()):
            allowed = f"tokens of rows of {held[:8]}, then -1"
            raise error("AK401", where="positions", given=str(positions.tolist())[:80], allowed=allowed)
        kv_storage.select(self._scheme, self._storage, self.lengths, wanted, counts, self.append)

    # --- what it holds ------------------------------------------------------------------------------------

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """The tokens, ``k [B, Hkv, n, D]`` and ``v [B, Hkv, n, Dv]``, n being the longest row; zero beyond a row's end.

        Codes are float32 then.

        Raises:
            AttnkitError: AK602, lengths that the cache cannot hold.
        """
        longest = max(self._held(), default=0)
        lengths = self.lengths.long()
        exist = torch.arange(longest, device=lengths.device) < lengths[:, None]
        rows, columns = exist.nonzero(as_tuple=True)
        found = []
        for tokens in kv_storage.read(self._scheme, self._storage, rows, columns):
            out = tokens.new_zeros(self.batch, longest, *tokens.shape[1:])
            out[rows, columns] = tokens
            found.append(out.transpose(1, 2))
        return found[0], found[1]

    def _held(self) -> list[int]:
        """How many tokens each row holds: `lengths`, which others may have written to."""
        return read_lengths("lengths", self.lengths, self.max_len)

    def _check_integers(self, name: str, t: Any, shape: tuple[int, ...] | None) -> None:
        check_tensor(name, t, self.lengths.device)
        if t.dtype not in (torch.int32, torch.int64):
            raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32 or torch.int64")
        if shape is not None and t.shape != shape:
            raise error("AK403", where=name, given=shape_of(t), allowed=str(list(shape)))


def _device(device: str | torch.device) -> torch.device:
    """The device of a cache.

    Raises:
        AttnkitError: AK401, it is no device; AK501, there is nothing that runs there; AK504, no cache lies there.
    """
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError) as exc:
        given, allowed = f"{device!r}: {str(exc).splitlines()[0]}", "cpu, cuda, or a torch.device"
        raise error("AK401", where="device", given=given, allowed=allowed) from exc
    if found.type not in ("cpu", "cuda"):
        raise error("AK504", where="device", given=str(device), allowed="cpu or cuda")
    if found.type == "cuda":
        missing = backends.get("triton").available()
        if missing is not None:
            raise error("AK501", where="device", given=f"{device}: {missing}", allowed="cpu")
    return found


def _codecs(codec: Any) -> tuple[str, str]:
    names = codec if isinstance(codec, tuple) and len(codec) == 2 else (codec, codec)
    for name in names:
        if not isinstance(name, str) or name not in (*PLAIN, *BITS):
            allowed = f"{', '.join((*PLAIN, *BITS))}, or a pair of them"
            raise error("AK401", where="codec", given=repr(codec), allowed=allowed)
    k, v = names
    if k != v and k in PLAIN and v in PLAIN:
        what = "k and v of different plain codecs are not built yet"
        raise error("AK504", what=what, where="codec", given=repr(codec), allowed="the same for both")
    return k, v
