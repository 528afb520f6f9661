"""The launches of a call's backward, and where its sums for captured tensors go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attnkit.backends.triton import launch
from attnkit.backends.triton.delta import delta
from attnkit.backends.triton.dkv import dkv
from attnkit.backends.triton.dq import dq, scatter
from attnkit.backends.triton.pair_sums import of_pairs
from attnkit.backends.triton.parts import MENDED, padded
from attnkit.backends.triton.slopes import AXES, Sums, sums
from attnkit.errors import error
from attnkit.ir.expr import Expr

if TYPE_CHECKING:
    from attnkit.backends.triton.kernel import Sizes, TritonKernel

SWEEPS = {"dq": dq, "dkv": dkv}
_DELTA_TILE = 64  # rows of a program that only adds
_BITS = 61  # of a sum of integers, and one more that rounding may take


class Gradients:
    """Of one program: see `TritonKernel.backward`."""

    def __init__(self, kernel: TritonKernel) -> None:
        self._kernel = kernel
        self._sums: dict[frozenset[int], Sums] = {}

    def run(
        self, saved: Sequence[Any], buffers: list[Any], params: list[float], d_o: Any, d_lse: Any | None,
        results: Sequence[Any], d_buffers: list[Any | None], seed: Any,
    ) -> None:  # fmt: skip
        """``saved`` are q, k, v, o and lse, ``results`` dq, dk and dv."""
        (q, k, v, o, lse), (dq, dk, dv) = saved, results
        if o.numel() == 0:
            return
        codecs = self._kernel.codecs
        if self._kernel.kv_layout.table is not None or any(codecs):
            given = f"keys and values as codes ({', '.join(codecs)})" if any(codecs) else "keys in pages"
            raise error(
                "AK503", where="backend triton", given=given, allowed="keys that lie in order, as numbers"
            )
        lse = lse.contiguous()
        tensors = {"q": q, "k": k, "v": v, "o": o, "d_o": d_o, "dq": dq, "dk": dk, "dv": dv, "lse": lse}
        inputs = tensors | {f"b{i}": b for i, b in enumerate(buffers)}
        inputs |= {name: t for name, t in (("d_lse", d_lse), ("seed_at", seed)) if t is not None}
        make = partial(self._launch, tensors, buffers, params, d_lse, d_buffers, seed)
        if any(d is not None for d in d_buffers) or k.shape[2] == 0:  # more is done than launches
            make(None)
        else:
            self._kernel.repeat(inputs, params, seed, make)

    def _launch(
        self, tensors: dict[str, Any], buffers: list[Any], params: list[float], d_lse: Any | None,
        d_buffers: list[Any | None], seed: Any, recording: launch.Recording | None,
    ) -> None:  # fmt: skip
        q, lse = tensors["q"], tensors["lse"]
        self._kernel.admit("backward", q)
        sizes = self._kernel.sizes(q, tensors["k"], buffers)
        wanted = frozenset(i for i, d in enumerate(d_buffers) if d is not None)
        found = self._sums.get(wanted)
        if found is None:
            found = self._sums[wanted] = sums(self._kernel.pairs(sizes, buffers), wanted)
        strided = {name: t for name, t in tensors.items() if name != "lse"}
        values = self._kernel.values(sizes, buffers, params, seed, **strided)
        values |= {
            "lse": lse, "lse_sb": lse.stride(0), "lse_sh": lse.stride(1), "deltas": lse.new_empty(lse.shape),
            "q_total": q.shape[2], "kv_len_most": sizes.kv_len, "recording": recording,
        }  # fmt: skip
        self._deltas(values, d_lse, d_buffers)
        for kind in SWEEPS:
            self._sweep(kind, found, sizes, values, buffers, d_buffers)
        for which, (load, _) in enumerate(found.of_pairs):
            self._of_pairs(which, load, found, sizes, values, buffers, d_buffers)

    def _deltas(self, values: dict[str, Any], d_lse: Any | None, d_buffers: Sequence[Any | None]) -> None:
        sink = self._kernel.attend.normalizer.sink
        d_sink = None if sink is None else d_buffers[sink]
        batch, heads, q_total, _ = values["o"].shape
        rows = -(-q_total // _DELTA_TILE) * batch
        if d_lse is not None:
            values |= {"d_lse": d_lse} | {
                f"d_lse_s{d}": n for d, n in zip("bhs", d_lse.stride(), strict=True)
            }
        if d_sink is not None:
            values["sink_sums"] = values["deltas"].new_empty((rows, heads))
        printed = self._kernel.printed(
            ("delta", d_lse is None, d_sink is None), lambda: delta(d_lse is not None, d_sink is not None)
        )
        numbers = {
            "TILE": _DELTA_TILE,
            "V_HEAD_DIM": self._kernel.spec.v_head_dim,
            "V_PADDED": padded(self._kernel.spec.v_head_dim),
        }
        self._kernel.run("delta", printed, numbers, (rows, heads), values, "delta_")
        if d_sink is not None:
            d_sink += values["sink_sums"].sum(0)

    def _sweep(
        self, kind: str, found: Sums, sizes: Sizes, values: dict[str, Any], buffers: Sequence[Any],
        d_buffers: Sequence[Any | None],
    ) -> None:  # fmt: skip
        """One of the two kernels, and what it sums for captured tensors."""
        pairs = self._kernel.pairs(sizes, buffers, "kv_idx" if kind == "dq" else "q_idx")
        lists, prefix = self._kernel.attend.mask is not None and pairs.stretch is None, kind + "_"
        tile_q, tile_kv = self._kernel.config[prefix + "tile_q"], self._kernel.config[prefix + "tile_kv"]
        values = values | {"q_tiles": -(-sizes.q_len // tile_q), "kv_tiles": -(-sizes.kv_len // tile_kv)}
        if sizes.kv_len == 0:
            values["dq"].zero_()
            return
        if lists:
            values |= self._kernel.lists(pairs, sizes, values, values["q"], prefix)
        of_loads = (*found.of_rows, *found.scattered) if kind == "dq" else found.of_columns
        length = values["q" if kind == "dq" else "k"].shape[2]
        partial = [values["lse"].new_zeros((sizes.entries, sizes.heads, length)) for _ in of_loads]
        values |= {f"sums{i}": each for i, each in enumerate(partial)}
        values |= {"sums_sb": sizes.heads * length, "sums_sh": length}
        numbers = self._kernel.numbers(sizes.group) | {
            "TILE_Q": tile_q,
            "TILE_KV": tile_kv,
            "PRECISION": self._kernel.precision,
        }
        own, tile, heads = (
            ("q", tile_q, sizes.heads) if kind == "dq" else ("kv", tile_kv, sizes.heads // sizes.group)
        )
        grid = self._kernel.rows(sizes, tile, own), heads
        values["flags"] = values["q"].new_empty(grid, dtype=launch.dtype_of(values["q"], "int"))
        for only in self._kernel.sweeps(kind):
            for mend in (False, True):
                printed = self._kernel.printed(
                    (kind, pairs, found, mend),
                    lambda mend=mend: SWEEPS[kind](pairs, self._kernel.scale, found, lists, mend),
                )
                shares = (tile // MENDED,) if mend else ()
                self._kernel.run(f"attend_{kind}", printed, numbers | only, (*grid, *shares), values, prefix)
        summed = found.of_rows if kind == "dq" else found.of_columns
        for (load, _), each in zip(summed, partial, strict=False):
            add_sums(d_buffers[int(load.attr or 0)], each, load, "bh" + ("q" if kind == "dq" else "k"))
        if kind == "dq" and found.scattered:
            self._scatter(found, sizes, values, partial[len(summed) :], buffers, d_buffers)

    def _scatter(
        self, found: Sums, sizes: Sizes, values: dict[str, Any], of_loads: Sequence[Any], buffers: Sequence[Any],
        d_buffers: Sequence[Any | None],
    ) -> None:  # fmt: skip
        """What captured tensors get that are read at computed indices; ``of_loads`` are the sizes of it, by rows."""
        pairs, kernel = self._kernel.pairs(sizes, buffers), self._kernel
        lists = kernel.attend.mask is not None and pairs.stretch is None
        tiles = {f"TILE_{x}": kernel.config[f"pairs_tile_{x.lower()}"] for x in ("Q", "KV")}
        size: dict[int, Any] = {}  # of all that a tensor gets
        for (load, _), each in zip(found.scattered, of_loads, strict=True):
            slot = int(load.attr or 0)
            size[slot] = size.get(slot, 0) + each.double().sum()
        values = values | {"q_tiles": -(-sizes.q_len // tiles["TILE_Q"])}
        if lists:
            values |= kernel.lists(pairs, sizes, values, values["q"], "pairs_")
        for slot, each in size.items():
            d_buffer: Any = d_buffers[slot]
            totals = d_buffer.new_zeros(d_buffer.shape, dtype=launch.dtype_of(d_buffer, "long"))
            per_one = (_BITS - each.frexp().exponent).double().exp2()  # no place overflows, if it gets all
            values |= {f"d_b{slot}": d_buffer, f"totals{slot}": totals, f"per_one{slot}": per_one.reshape(1)}
            values |= {f"d_b{slot}_s{d}": n for d, n in enumerate(totals.stride())}
        printed = kernel.printed(
            ("scatter", pairs, found), lambda: scatter(pairs, kernel.scale, found, lists)
        )
        numbers = kernel.numbers(sizes.group) | tiles | {"PRECISION": kernel.precision}
        grid = kernel.rows(sizes, tiles["TILE_Q"], "q"), sizes.heads
        kernel.run("attend_scatter", printed, numbers, grid, values, "pairs_")
        for slot, each in size.items():
            d_buffer = d_buffers[slot]
            d_buffer += values[f"totals{slot}"].double() / values[f"per_one{slot}"]
            d_buffer += each - each  # nothing is known if they are beyond float32

    def _of_pairs(
        self, which: int, load: Expr, found: Sums, sizes: Sizes, values: dict[str, Any], buffers: Sequence[Any],
        d_buffers: Sequence[Any | None],
    ) -> None:  # fmt: skip
        """What a captured tensor of pairs gets by one load."""
        pairs = self._kernel.pairs(sizes, buffers)
        d_buffer: Any = d_buffers[int(load.attr or 0)]
        read = {str(arg.attr) for arg in load.args if arg.op == "var"}
        heads, sequences = (1 if "h" in read else sizes.heads), (1 if "b" in read else sizes.sequences)
        tile_q, tile_kv = self._kernel.config["pairs_tile_q"], self._kernel.config["pairs_tile_kv"]
        values = values | {"d_buffer": d_buffer, "heads_in": heads, "sequences_in": sequences}
        values |= {f"d_buffer_s{d}": n for d, n in enumerate(d_buffer.stride())}
        values |= {f"d_buffer_n{d}": n for d, n in enumerate(d_buffer.shape)}
        printed = self._kernel.printed(
            ("pairs", pairs, found, which), lambda: of_pairs(pairs, self._kernel.scale, found, which)
        )
        numbers = self._kernel.numbers(sizes.group) | {
            "TILE_Q": tile_q,
            "TILE_KV": tile_kv,
            "PRECISION": self._kernel.precision,
        }
        tiles = -(-sizes.q_len // tile_q) * -(-sizes.kv_len // tile_kv)
        grid = (tiles, sizes.heads // heads, sizes.sequences // sequences)
        self._kernel.run("attend_pairs", printed, numbers, grid, values, "pairs_")


def add_sums(to: Any, sums: Any, load: Expr, axes: str) -> None:
    """Add ``sums``, of these axes (``bhq`` or ``bhk``), where a load has read: summed over the axes that it has not."""
    kept = [AXES[str(arg.attr)] for arg in load.args if arg.op == "var"]
    absent = [i for i, axis in enumerate(axes) if axis not in kept]
    found = sums.sum(absent) if absent else sums
    left = [axis for axis in axes if axis in kept]
    found = found.permute([left.index(axis) for axis in kept])
    part = to[tuple(int(arg.attr or 0) if arg.op == "const" else slice(None) for arg in load.args)]
    both = tuple(slice(0, min(n, m)) for n, m in zip(part.shape, found.shape, strict=True))
    part[both] += found[both]
