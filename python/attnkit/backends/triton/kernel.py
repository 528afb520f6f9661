"""One program on the GPU: what a call's tensors ask for is found once, then its kernels are launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from attnkit.analysis.canonical import canonical
from attnkit.backends.triton import launch
from attnkit.backends.triton.blocks import blocks, varies
from attnkit.backends.triton.forward import Shape, are_numbers, beside, codecs_of, forward
from attnkit.backends.triton.gradients import Gradients
from attnkit.backends.triton.merge import merge
from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import MENDED, padded
from attnkit.backends.triton.schedule import WARPS
from attnkit.backends.triton.source import Arguments
from attnkit.backends.triton.words import BITS, RUN
from attnkit.errors import error
from attnkit.ir.intervals import Interval, point
from attnkit.plan.dropout import Dropped
from attnkit.plan.spec import Config, KernelSpec
from attnkit.plan.triton import care

# What torch's word for float32 products is in Triton: TF32 where torch's own would be.
PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "tf32"}
_MAX_ENTRIES = 4096  # a decoder meets new lengths at every step; the bound only stops a leak
_DECODE_ROWS = 64  # queries of a kv head up to which a call is bound by reading keys


Phase = Literal["forward", "decode", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "decode", "backward")
# (spec, config, phase, a tensor on the device) -> the config to use there, or an error; see `admission.admitted`.
Admission = Callable[[KernelSpec, Config, Phase, Any], Config]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call: heads and lengths as the tensors have them, sequences as the program counts them."""

    sequences: int
    heads: int
    group: int
    entries: int  # of the batch in memory: 1 if packed
    q_len: int  # at most, of any sequence
    kv_len: int


class TritonKernel:
    """One program; see `attnkit.backends.Kernel`. The host looks at no tensor's elements."""

    def __init__(self, spec: KernelSpec, config: Config, admitted: Admission | None = None) -> None:
        """``admitted`` is asked before a phase's first launch on a device; nobody is where it is None."""
        self._admitted, self._asked = admitted, set[tuple[Phase, Any]]()
        self.spec, self.config, self.precision = spec, config, PRECISIONS[spec.precision]
        self.program = canonical(spec.program)
        self.attend = attend = self.program.attend
        self.scale = spec.head_dim**-0.5 if attend.scale is None else attend.scale
        self.q_layout, self.kv_layout = self.program.inputs[attend.q], self.program.inputs[attend.k]
        self.codecs, self.beside = codecs_of(self.program), beside(self.program)
        # Where a number that kernels take comes of what a call brings, its launches are its own.
        param = attend.dropout is not None and attend.dropout.op == "param"
        self._changes = param
        self._recorded: dict[Any, launch.Recording] = {}
        slots = {
            "sinks": attend.normalizer.sink,
            "lengths": self.kv_layout.lengths,
            "cu_q": self.q_layout.lengths,
            "table": self.kv_layout.table,
        }
        slots["cu_kv"] = self.kv_layout.lengths
        self._aliases = {name: f"b{slot}" for name, slot in slots.items() if slot is not None}
        self._pairs: dict[Any, Pairs] = {}
        self._gradients = Gradients(self)
        self._printed: dict[Any, tuple[str, Arguments]] = {}

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int = 0,
        seed: Any = None,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Compute ``o`` (and ``lse`` if given) in place, on the current stream. ``seed``: an int, or an int64 tensor.

        ``beside`` belongs to codes in ``k`` and ``v``. Int8, or uint8 that is e4m3: ``k_scales``, a factor for each row,
        ``[B, Hkv, Skv]``, ``[pages, Hkv, page_size]``. Words of int4 and int2 (`words`): ``k_scales``, ``k_newest [B, Hkv, slots, D]``,
        and ``coded_of [B]``, how many tokens are codes. Likewise of values; elements beside codes have nothing.

        Raises:
            AttnkitTypeError: AK404, the program's keys are codes and not what belongs to them came, or the other way round.
        """
        if beside.keys() != self.beside:
            names = ", ".join(sorted(self.beside))
            given, allowed = ", ".join(sorted(beside)), f"codes and {names}" if names else "no codes"
            raise error(
                "AK404", where="k and v", given=f"{k.dtype} and {given or 'nothing'}", allowed=allowed
            )
        if o.numel() == 0:
            return
        inputs = {"q": q, "k": k, "v": v, "o": o} | {f"b{i}": b for i, b in enumerate(buffers)}
        inputs |= beside
        inputs |= {name: t for name, t in (("lse", lse), ("seed_at", seed)) if t is not None}
        self.repeat(inputs, params, seed, partial(self._launch, inputs, lse, buffers, params, seed))

    def repeat(
        self, inputs: dict[str, Any], params: Sequence[float], seed: Any, make: Callable[[launch.Recording | None], None]
    ) -> None:  # fmt: skip
        """Make the launches of an earlier call with tensors like these again; else ``make`` them, and keep them."""
        if self._changes or isinstance(seed, int):
            make(None)
            return
        q = inputs["q"]
        key = (q.device, *inputs, *launch.signature(inputs.values()))
        found = self._recorded.get(key)
        if found is not None:
            found.run(inputs | {f"p{i}": x for i, x in enumerate(params)})
            return
        recording = launch.Recording(inputs, self._aliases)
        make(recording)
        recording.finish()
        if len(self._recorded) >= _MAX_ENTRIES:
            self._recorded.clear()
        self._recorded[key] = recording

    def _launch(
        self, inputs: dict[str, Any], lse: Any | None, buffers: list[Any], params: list[float], seed: Any,
        recording: launch.Recording | None,
    ) -> None:  # fmt: skip
        q, k, v, o = (inputs[name] for name in "qkvo")
        sizes = self.sizes(q, k, buffers)
        decode = sizes.q_len * sizes.group <= _DECODE_ROWS and sizes.kv_len > self.config["split_kv"]
        self.admit("decode" if decode else "forward", q)
        values = self.values(sizes, buffers, params, seed, q=q, k=k, v=v, o=o) | {"recording": recording}
        values |= self._beside(inputs)
        if lse is not None:
            values |= {"lse": lse, "lse_sb": lse.stride(0), "lse_sh": lse.stride(1)}
        if decode:
            self._decode(sizes, values, o, lse, buffers)
            return
        pairs = self.pairs(sizes, buffers)
        shape = Shape(need_lse=lse is not None, lists=self.attend.mask is not None and pairs.stretch is None)
        values |= self.lists(pairs, sizes, values, q) if shape.lists else {}
        grid = self.rows(sizes, self.config["tile_q"], "q"), sizes.heads
        if "flag" in self.care:
            values["flags"] = q.new_empty(grid, dtype=launch.dtype_of(q, "int"))
        numbers = self.numbers(sizes.group) | {"PRECISION": self.precision} | self._page(values)
        for care_of in self.care:
            each = replace(shape, care=care_of)
            printed = self.printed(
                ("forward", pairs, each), lambda each=each: forward(pairs, self.scale, each)
            )
            shares = (self.config["tile_q"] // MENDED,) if care_of == "mend" else ()
            self.run("attend", printed, numbers, (*grid, *shares), values)

    def admit(self, phase: Phase, like: Any) -> None:
        """Ask whether this config computes a phase rightly on the device of a tensor, once; it may become another one."""
        if self._admitted is not None and (phase, like.device) not in self._asked:
            self.config = self._admitted(self.spec, self.config, phase, like)
            self._asked.add((phase, like.device))

    @property
    def wide(self) -> bool:
        """Whether heads are so wide that registers are short of room for more than sums."""
        return max(self.spec.head_dim, self.spec.v_head_dim) > 128

    @property
    def care(self) -> tuple[Literal["", "flag", "mend"], ...]:
        """The launches of a forward, by `Shape.care`; int8 codes are numbers, and nothing made of them is made again."""
        return ("flag", "mend") if self.wide and not are_numbers(self.codecs) else ("",)

    def _decode(
        self, sizes: Sizes, values: dict[str, Any], o: Any, lse: Any | None, buffers: Sequence[Any]
    ) -> None:
        """The query heads of a kv head are rows of one tile, and the keys are split between programs."""
        pairs = self.pairs(sizes, buffers)
        shape = Shape(need_lse=False, grouped=True, split=True)
        split_kv, tile_q = self.config["split_kv"], self.config["decode_tile_q"]
        splits = -(-sizes.kv_len // split_kv)
        batch, heads, q_total, width = o.shape
        parts = o.new_empty((splits, batch, heads, q_total, width), dtype=launch.dtype_of(o, "float"))
        tops, totals = (parts.new_empty((splits, batch, heads, q_total)) for _ in range(2))
        values |= {"tops": tops, "totals": totals}
        values |= dict(zip(("row_split", "row_sb", "row_sh"), tops.stride()[:3], strict=True))
        names = dict(zip(("o_split", "o_sb", "o_sh", "o_ss", "o_sd"), parts.stride(), strict=True))
        rows = self.rows(replace(sizes, q_len=sizes.q_len * sizes.group), tile_q, "q")
        if self.q_layout.kind == "packed":
            rows = sizes.q_len * sizes.group // tile_q + sizes.sequences
        tiles = {"q_tiles": -(-sizes.q_len * sizes.group // tile_q)}
        numbers = self.numbers(sizes.group) | {"TILE_Q": tile_q, "TILE_KV": self.config["decode_tile_kv"]}
        numbers |= {"PRECISION": self.precision, "SPLIT_KV": split_kv} | self._page(values)
        printed = self.printed(("decode", pairs, shape), lambda: forward(pairs, self.scale, shape))
        grid = (rows, sizes.heads // sizes.group, splits)
        self.run(
            "attend",
            printed,
            numbers,
            grid,
            values | tiles | names | {"o": parts},
            "decode_",
        )
        merged = {"parts": parts, "splits": splits, "q_total": q_total}
        merged |= {f"part_{name[2:]}": n for name, n in names.items() if name.startswith("o_")}
        if lse is not None:
            merged |= {"whole_sb": lse.stride(0), "whole_sh": lse.stride(1)}
        sink, need_lse = self.attend.normalizer.sink is not None, lse is not None
        printed = self.printed(("merge", need_lse), lambda: merge(sink, need_lse, self.attend.unnormalized))
        numbers = {"V_HEAD_DIM": self.spec.v_head_dim, "V_PADDED": padded(self.spec.v_head_dim)}
        self.run("merge", printed, numbers, (batch * q_total, heads), values | merged, "merge_")

    def backward(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any,
        buffers: list[Any],
        params: list[float],
        d_o: Any,
        d_lse: Any | None,
        dq: Any,
        dk: Any,
        dv: Any,
        d_buffers: list[Any | None],
        threads: int = 0,
        seed: Any = None,
    ) -> None:
        """Compute the gradients in place, on the current stream, from a call's inputs, outputs and their cotangents.

        ``d_buffers`` (None where no gradient is needed) are contiguous and zero before; so are rows of ``dq``, ``dk`` and ``dv``
        that belong to no sequence.

        Raises:
            AttnkitNotImplementedError: AK503, keys lie in pages, or are codes.
        """
        self._gradients.run((q, k, v, o, lse), buffers, params, d_o, d_lse, (dq, dk, dv), d_buffers, seed)

    def sweeps(self, kind: str) -> tuple[dict[str, int], ...]:
        """The launches of a backward kernel: sums of wide heads do not fit the registers beside each other."""
        if kind == "dq":
            return ({},)
        return ({"ONLY": 1}, {"ONLY": 2}) if self.wide else ({"ONLY": 0},)

    def lists(
        self, pairs: Pairs, sizes: Sizes, values: dict[str, Any], like: Any, kind: str = ""
    ) -> dict[str, Any]:
        """The lists of tiles of a call, made now; ``kind`` names the kernel whose tiles they are of."""
        tile_q, tile_kv = self.config[kind + "tile_q"], self.config[kind + "tile_kv"]
        own, other = ("q", "kv") if pairs.streamed == "kv_idx" else ("kv", "q")
        lengths, tile = {"q": sizes.q_len, "kv": sizes.kv_len}, {"q": tile_q, "kv": tile_kv}
        by_sequence, by_head = varies(pairs)
        per_head = self.rows(sizes if by_sequence else replace(sizes, sequences=1), tile[own], own)
        length = -(-lengths[other] // tile[other])
        heads = sizes.heads if by_head else 1
        integers = launch.dtype_of(like, "int")
        lists = like.new_empty((heads * per_head, length), dtype=integers)
        counts = like.new_empty((heads * per_head, 2), dtype=integers)
        per_sequence = -(-lengths[own] // tile[own])
        found = {
            "lists": lists, "counts": counts, "list_length": length, "list_sh": per_head if by_head else 0,
            "list_sb": per_sequence if by_sequence else 0, "q_tiles": -(-sizes.q_len // tile_q),
            "kv_tiles": -(-sizes.kv_len // tile_kv),
        }  # fmt: skip
        printed = self.printed(("blocks", pairs), lambda: blocks(pairs))
        numbers = {"TILE_Q": tile_q, "TILE_KV": tile_kv}
        self.run("blocks", printed, numbers, (per_head, heads), values | found, "blocks_")
        return found

    def pairs(self, sizes: Sizes, buffers: Sequence[Any], streamed: str = "kv_idx") -> Pairs:
        """What the kernels of a call print about pairs, as careful as its sizes ask for."""
        shapes = [tuple(b.shape) for b in buffers]
        roots = [root for root in (self.attend.score, self.attend.mask) if root is not None]
        if (
            not buffers
        ):  # nothing is read by index: a bound will do for lengths, and a decoder meets few bounds
            sizes = replace(sizes, q_len=_bound(sizes.q_len), kv_len=_bound(sizes.kv_len))
        key = (sizes, streamed, *shapes)
        found = self._pairs.get(key)
        if found is None:
            counts = {"b": sizes.sequences, "h": sizes.heads, "q_idx": sizes.q_len, "kv_idx": sizes.kv_len}
            box = {name: Interval(0, max(n - 1, 0)) for name, n in counts.items()}
            ragged = self.kv_layout.lengths is not None or not buffers
            packed = self.q_layout.kind == "packed" or not buffers
            box["q_len"] = Interval(0, sizes.q_len) if packed else point(sizes.q_len)
            box["kv_len"] = Interval(0, sizes.kv_len) if ragged else point(sizes.kv_len)
            if len(self._pairs) >= _MAX_ENTRIES:
                self._pairs.clear()
            found = self._pairs[key] = Pairs(self.program, streamed, *care(self.program, roots, box, shapes))
        return found

    def numbers(self, group: int) -> dict[str, Any]:
        """The numbers of a kernel over tiles of pairs."""
        return {
            "TILE_Q": self.config["tile_q"], "TILE_KV": self.config["tile_kv"],
            "HEAD_DIM": self.spec.head_dim, "V_HEAD_DIM": self.spec.v_head_dim,
            "PADDED": padded(self.spec.head_dim), "V_PADDED": padded(self.spec.v_head_dim), "GROUP": group,
        }  # fmt: skip

    def printed(self, key: Any, text: Any) -> tuple[str, Arguments]:
        found = self._printed.get(key)
        return found if found is not None else self._printed.setdefault(key, text())

    def run(
        self, entry: str, printed: tuple[str, Arguments], numbers: dict[str, Any], grid: tuple[int, ...],
        values: dict[str, Any], kind: str = "",
    ) -> None:  # fmt: skip
        text, arguments = printed
        program = launch.Program(text, entry, arguments, tuple(numbers.items()))
        target = launch.current_target(*self.layout(kind))
        args = [values[name] for name, _ in arguments]
        ready = launch.ready(program, target, grid, args)
        ready(args)
        recording = values.get("recording")
        if recording is not None:
            recording.add(ready, arguments, args)

    def _page(self, values: dict[str, Any]) -> dict[str, int]:
        return {"PAGE": values["PAGE"]} if "PAGE" in values else {}

    def layout(self, kind: str) -> tuple[int, int]:
        """Warps and stages of a kernel."""
        return self.config.get(kind + "warps") or WARPS[kind], self.config.get(kind + "stages", 2)

    def rows(self, sizes: Sizes, tile: int, own: str) -> int:
        """How many tiles of queries or keys there are in all sequences, at most."""
        length = sizes.q_len if own == "q" else sizes.kv_len
        if self.q_layout.kind == "packed":
            return length // tile + sizes.sequences
        return -(-length // tile) * sizes.sequences

    def sizes(self, q: Any, k: Any, buffers: Sequence[Any]) -> Sizes:
        packed = self.q_layout.kind == "packed"
        sequences = len(buffers[self.q_layout.lengths or 0]) - 1 if packed else q.shape[0]
        kv_len = self._tokens(k)
        if self.kv_layout.table is not None:  # of pages: as many as the table has room for
            kv_len *= buffers[self.kv_layout.table].shape[1]
        return Sizes(sequences, q.shape[1], q.shape[1] // k.shape[1], q.shape[0], q.shape[2], kv_len)

    def _tokens(self, k: Any) -> int:
        """Tokens of a batch entry, or of a page."""
        return int(k.shape[2]) * (RUN if self.codecs[0] in BITS else 1)

    def _beside(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of what belongs to codes."""
        values = {name: inputs[name] for name in self.beside}
        first = "p" if self.kv_layout.table is not None else "b"
        for x, codec in zip("kv", self.codecs, strict=True):
            strides = {"scales": first + "h" + ("g" if codec in BITS else "s"), "newest": "bhsd"}
            for name, dims in strides.items():
                if f"{x}_{name}" in values:
                    steps = zip(dims, values[f"{x}_{name}"].stride(), strict=False)
                    values |= {f"{x}_{name}_s{d}": n for d, n in steps}
            if codec in BITS:
                values["ring"] = values[f"{x}_newest"].shape[2]
        return values

    def values(
        self, sizes: Sizes, buffers: Sequence[Any], params: Sequence[float], seed: Any, **tensors: Any
    ) -> dict[str, Any]:
        """Every argument that a kernel may have, by name."""
        values: dict[str, Any] = {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "sequences": sizes.sequences}
        values["q_tiles"] = -(-sizes.q_len // self.config["tile_q"])
        for name, tensor in tensors.items():
            values[name] = tensor
            first = "p" if self.kv_layout.table is not None and name in ("k", "v") else "b"
            values |= {f"{name}_s{d}": n for d, n in zip(first + "hsd", tensor.stride(), strict=True)}
        for i, buffer in enumerate(buffers):
            values[f"b{i}"] = buffer
            values |= {f"b{i}_s{d}": n for d, n in enumerate(buffer.stride())}
            values |= {f"b{i}_n{d}": n for d, n in enumerate(buffer.shape)}
        values |= {f"p{i}": float(x) for i, x in enumerate(params)}
        if self.q_layout.kind == "packed":
            values |= {
                "cu_q": buffers[self.q_layout.lengths or 0],
                "cu_kv": buffers[self.kv_layout.lengths or 0],
            }
        elif self.kv_layout.lengths is not None:
            values["lengths"] = buffers[self.kv_layout.lengths]
        if self.kv_layout.table is not None:
            table = buffers[self.kv_layout.table]
            values |= {"table": table, "table_sb": table.stride(0), "table_ss": table.stride(1)}
            values["PAGE"] = self._tokens(tensors["k"])
        if self.attend.normalizer.sink is not None:
            values["sinks"] = buffers[self.attend.normalizer.sink]
        dropout = self.attend.dropout
        if dropout is not None:
            values["dropped_below"], values["kept_times"] = Dropped.of(dropout, params)
            held = isinstance(seed, int)
            values["seed_at"] = (
                tensors["q"].new_full((1,), _signed(seed), dtype=launch.dtype_of(tensors["q"], "long"))
                if held
                else seed
            )
        return values


def _bound(length: int) -> int:
    """The next power of two."""
    return 1 << max(length - 1, 0).bit_length()


def _signed(seed: int) -> int:
    """The int64 of the same bits."""
    return (seed + 2**63) % 2**64 - 2**63
