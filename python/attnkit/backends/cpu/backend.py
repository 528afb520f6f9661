"""The CPU engine as a backend: a program becomes verified bytecode; tensors go to the engine, which reads them by DLPack."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from attnkit.analysis.canonical import canonical
from attnkit.analysis.structure import Sizes, Structure
from attnkit.backends import Fingerprint, Kernel, refused
from attnkit.backends.cpu import recur, select
from attnkit.backends.cpu.engine import FAULTS, cpu_generation, cpu_model, engine, usable_cores
from attnkit.errors import AttnkitError, error, no_page
from attnkit.ir.program import Attend, Layout, Program, Recur
from attnkit.plan import carried
from attnkit.plan.blocks import block_of, tile_for
from attnkit.plan.bytecode import Bytecode, emit
from attnkit.plan.dropout import Dropped
from attnkit.plan.encoding import TILE, Encoding, encoding, is_approximate, number
from attnkit.plan.normalizers import is_unnormalized
from attnkit.plan.readouts import Results
from attnkit.plan.space import Direction, FieldKind
from attnkit.plan.spec import Config, Field, KernelSpec, Space

Store = tuple[Any, ...]  # a cache's k or v, as csrc/bind/cache.cc takes it
_UNSPLIT = 1 << 30  # more keys than there are
_DTYPES = ("float32", "bfloat16", "float16")
_ABOUT_TENSORS = ("AK606", "AK607")  # the others are about an instruction
# As csrc/bind counts them: these, the buffers, what the backward has besides, the gradients of buffers.
_TENSORS = ("q", "k", "v", "o", "lse", "sink")
_GRADIENTS = ("d_o", "d_lse", "dq", "dk", "dv", "d_sink")


class CpuBackend:
    """See `attnkit.backends.Backend`."""

    name = "cpu"

    def available(self) -> str | None:
        """None if the extension loads, else why it does not."""
        try:
            engine()
        except AttnkitError as exc:
            if exc.code != "AK501":
                raise  # a setting of the user's is wrong, which no other backend should hide
            return exc.given or exc.what
        return None

    def supports(self, spec: KernelSpec) -> tuple[str, ...]:
        """Float32, bfloat16 and float16 tensors on the CPU; heads of 1 to 4096 channels."""
        family = recur if _recurs(spec.program) else select if _only_selects(spec.program) else None
        of_program = None if family is None else family.reasons(spec)
        if carried.carries(spec.program):
            of_program = carried.reasons(spec.program)
        if is_approximate(spec.program) or is_unnormalized(spec.program):
            of_program = ()
        reasons = refused(
            spec, device="cpu", dtypes=_DTYPES, channels=4096, where="the CPU", of_program=of_program
        )
        return (*reasons, *_codec_reasons(spec.program))

    def space(self, spec: KernelSpec) -> Space:
        """Tile sizes, and how many keys are summed before they are merged.

        Weights and values are summed tile by tile: a shorter kv tile loses fewer bits, which bfloat16 does not have. Under a
        mask it has as many keys as queries, so that a diagonal crosses one tile of a row.
        Backwards, more keys at a time mean that queries are paired and dq is added to less often. (The engine makes a sequence's
        blocks of keys even, up to this size, and shorter under a mask.) Tiles end where a mask's blocks end: one that lies
        across two of them would be computed for both.
        """
        if _recurs(spec.program) or _only_selects(spec.program):
            return {}  # how many tokens are computed together is the call's to say
        mask = spec.program.attend.mask
        q_block, kv_block = block_of(mask, "q_idx"), block_of(mask, "kv_idx")
        if spec.dtype == "bfloat16":
            tile_kv = tile_for(kv_block, 128 if mask is None else 96, 128)
            backward_tile_q, backward_tile_kv = 96, 192
        else:
            tile_kv = tile_for(kv_block, 64, 64)
            # Without AVX-512 the first cache is 32 KB: of float32, two tiles should not be much more.
            backward_tile_q = 96 if engine().current_isa().startswith("avx512") else 48
            backward_tile_kv = 128 if mask is None else 96
        backward_tile_q = tile_for(q_block, backward_tile_q, 96)
        backward_tile_kv = tile_for(kv_block, backward_tile_kv, backward_tile_kv)

        def field(kind: FieldKind, default: int, values: set[int], direction: Direction = "forward") -> Field:
            return Field(kind, default, tuple(sorted(values | {default})), direction)

        tiles_kv = field("numeric", tile_kv, {32, 64, 96, 128, 192})
        splits = Field("numeric", 1024, (512, 1024, 2048, 4096))
        if spec.program.attend.skip is not None:  # what was met before is all of the row
            tiles_kv, splits = Field("numeric", TILE, (TILE,)), Field("numeric", _UNSPLIT, (_UNSPLIT,))
        return {
            "tile_q": field("schedule", tile_for(q_block, 96, 128), {16, 32, 48, 64, 96, 128}),
            "tile_kv": tiles_kv,
            "split_kv": splits,
            "backward_tile_q": field("numeric", backward_tile_q, {32, 48, 64, 96}, "backward"),
            "backward_tile_kv": field("numeric", backward_tile_kv, {32, 48, 64, 96, 128, 192}, "backward"),
        }

    def fingerprint(self) -> Fingerprint:
        """The processor, the instruction set in use and the cores; the kernels' sources and their compiler."""
        device = {
            "name": cpu_model(),
            "model": cpu_generation(),
            "isa": engine().current_isa(),
            "cores": str(usable_cores()),
        }
        return Fingerprint(device, {"kernels": engine().kernels, "compiler": engine().compiler})

    def build(self, spec: KernelSpec, config: Config) -> Kernel:
        """Compile the program's score and mask to bytecode and bind the sizes that never change."""
        if _recurs(spec.program):
            return recur.RecurKernel(spec, config)
        if _only_selects(spec.program):
            return select.SelectKernel(spec, config)
        if carried.carries(spec.program):
            from attnkit.backends.cpu.carried import CarriedKernel  # which is a kernel of this file

            return CarriedKernel(spec, config)
        if any(x.codec is not None for x in spec.program.inputs):
            from attnkit.backends.cpu.cache import CacheKernel  # which is a kernel of this file

            return CacheKernel(spec, config)
        return CpuKernel(spec, config)


def _recurs(program: Program) -> bool:
    return any(isinstance(op, Recur) for op in program.ops)


def _only_selects(program: Program) -> bool:
    return not any(isinstance(op, Attend) for op in program.ops)


class CpuKernel:
    """One program on the engine. Calling it reads and writes tensors in place; it allocates nothing of their size."""

    def __init__(self, spec: KernelSpec, config: Config) -> None:
        self.spec = spec
        self.config = config
        self._canonical = canonical(spec.program)
        self.bytecode, self.program = self._compile(self._canonical.attend, None)
        self._backwards: dict[frozenset[int], tuple[Bytecode, Any]] = {}
        attend = spec.program.attend
        self.scale = spec.head_dim**-0.5 if attend.scale is None else attend.scale
        self._sink = attend.normalizer.sink
        self._dropout = attend.dropout
        self._q_layout: Layout = spec.program.layout(attend.q)
        self._kv_layout: Layout = spec.program.layout(attend.k)
        self._table = self._kv_layout.table
        self._attend = engine().attend
        self.sizes = config["tile_q"], config["tile_kv"], config["split_kv"]
        self._encoding: Encoding | None = encoding(spec.program)
        self._skip = attend.skip
        # Where there is nothing but tensors: the same, without the other arguments.
        plain = not spec.program.buffers and not spec.program.num_params and self._dropout is None
        self.launch: Any = None
        if plain and self._encoding is None and self._skip is None and attend.carry is None:
            self.launch = engine().Launch(self.program, self.scale, *self.sizes).run

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int,
        seed: int | None = None,
    ) -> None:
        """Compute ``o`` (and ``lse`` if given) in place.

        Raises:
            AttnkitError: AK502, sizes beyond 32 bits; AK601, a load of an existing pair reads outside its buffer;
                AK602, a token without a page; AK603, out of memory; AK604, an integer leaves 32 bits; AK605, an integer divisor may be zero;
                AK606, AK607, a tensor without memory or not aligned.
        """
        try:
            if self.launch is not None:
                fault, about = self.launch(q, k, v, o, lse, threads)
            else:
                fault, about = self._attend(
                    self.program, q, k, v, o, lse, self.scale, None if self._sink is None else buffers[self._sink],
                    self._sequences(q, k, buffers), buffers, params,
                    self._dropped(params, seed), threads, *self.sizes,
                    None if self._table is None else buffers[self._table], *self._approximately(params),
                )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc
        if fault:
            raise self._fault(fault, about, self.bytecode, k, buffers)

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
        threads: int,
        seed: int | None = None,
    ) -> None:
        """Compute the gradients in place, from the inputs of a call, what it returned, and the cotangents of that.

        ``dq`` is float32; ``d_buffers`` (float32, contiguous, None where no gradient is needed) are zero before, and so are
        the rows of ``dq``, ``dk`` and ``dv`` that belong to no sequence.

        Raises:
            AttnkitError: as the call; AK502 too where the derivative needs more tiles at once than the engine has.
        """
        try:
            if self.launch is not None:
                fault, about = self.launch_backward(q, k, v, o, lse, d_o, d_lse, dq, dk, dv, threads)
            else:
                program = self.backward_program(d_buffers)[1]
                sink, d_sink = (
                    (None, None) if self._sink is None else (buffers[self._sink], d_buffers[self._sink])
                )
                fault, about = engine().attend_backward(
                    program, q, k, v, o, lse, self.scale, sink, self._sequences(q, k, buffers), buffers, params,
                    self._dropped(params, seed), d_o, d_lse, dq, dk, dv, d_sink, d_buffers,
                    threads, *self._backward_sizes, self._encoding,
                )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc
        if fault:
            raise self.error(FAULTS[fault], about, self.backward_program(d_buffers)[0], len(buffers))

    def readout(
        self,
        q: Any,
        k: Any,
        lse: Any,
        results: Results,
        buffers: list[Any],
        params: list[float],
        threads: int,
    ) -> None:
        """Write what is wanted of the weights ``exp(score - lse)``; see csrc/cpu/readout.h.

        Raises:
            AttnkitError: as the call.
        """
        try:
            fault, about = engine().readout(
                self.program, q, k, lse, self.scale, self._sequences(q, k, buffers), buffers, params, tuple(results), threads,
                self.config["tile_kv"], None if self._table is None else buffers[self._table],
            )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc
        if fault:
            raise self._fault(fault, about, self.bytecode, k, buffers)

    @cached_property
    def launch_backward(self) -> Any:
        """`backward` where there is nothing but tensors."""
        return engine().LaunchBackward(self.backward_program([])[1], self.scale, *self._backward_sizes).run

    @cached_property
    def _backward_sizes(self) -> tuple[int, int]:
        return self.config["backward_tile_q"], self.config["backward_tile_kv"]

    def backward_program(self, d_buffers: list[Any | None]) -> tuple[Bytecode, Any]:
        """The bytecode and the engine's program that give these gradients, compiled on first use."""
        wanted = frozenset(i for i, d in enumerate(d_buffers) if d is not None)
        found = self._backwards.get(wanted)
        return (
            self._backwards.setdefault(wanted, self._compile(self._canonical.attend, wanted))
            if found is None
            else found
        )

    def _compile(self, attend: Attend, gradients: frozenset[int] | None) -> tuple[Bytecode, Any]:
        """The bytecode, and the engine's program; ``gradients`` as `emit` has it."""
        code = emit(attend, self._canonical, engine().opcodes(), gradients)
        try:
            program = engine().Program(
                code.code, code.score, code.mask, code.num_buffers, code.num_params, code.slope, code.loads,
                code.slope_f, attend.carry is not None, attend.unnormalized,
            )  # fmt: skip
        except ValueError as exc:
            raise error("AK502", where="backend cpu", given=str(exc)) from exc
        return code, program

    def _approximately(self, params: list[float]) -> tuple[Encoding | None, float] | tuple[()]:
        if self._skip is None:
            return () if self._encoding is None else (self._encoding, 0.0)
        return self._encoding, number(self._skip, params)

    def _run_stores(
        self, q: Any, k: Store, v: Store, num_coded: Any | None, o: Any, lse: Any | None, buffers: list[Any],
        params: list[float], dropout: tuple[int, int, float] | None, threads: int, *carry: Any,
    ) -> tuple[int, int]:  # fmt: skip
        """What the engine says of attention to a cache that keeps codes."""
        lengths = self._kv_layout.lengths
        assert lengths is not None
        try:
            return engine().attend_cache(  # type: ignore[no-any-return]
                self.program, q, k, v, o, lse, self.scale, None if self._sink is None else buffers[self._sink],
                buffers[lengths], num_coded, buffers, params, dropout, threads, *self.sizes,
                None if self._table is None else buffers[self._table], *carry,
            )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc

    def _dropped(self, params: list[float], seed: int | None) -> tuple[int, int, float] | None:
        """Seed, threshold and factor, as csrc/cpu/problem.h has them."""
        if self._dropout is None:
            return None
        return (seed or 0) % 2**64, *Dropped.of(self._dropout, params)

    def _sequences(self, q: Any, k: Any, buffers: list[Any]) -> list[tuple[int, int, int, int, int]] | None:
        """(batch, q start, q length, kv start, kv length) of every sequence; None means one per batch entry."""
        if self._kv_layout.lengths is None:
            return None
        kv = buffers[self._kv_layout.lengths].tolist()
        if self._kv_layout.kind in ("padded", "paged"):
            return [(b, 0, q.shape[2], 0, n) for b, n in enumerate(kv)]
        assert self._q_layout.lengths is not None  # the verifier allows packed k only beside packed q
        cu = buffers[self._q_layout.lengths].tolist()
        return [(0, cu[i], cu[i + 1] - cu[i], kv[i], kv[i + 1] - kv[i]) for i in range(len(cu) - 1)]

    def structure(self, sizes: Sizes, buffers: list[Any], params: list[float]) -> Structure:
        """The block structure of the mask for ``sizes.batch`` sequences of these lengths.

        Raises:
            AttnkitValueError: AK604, an integer leaves 32 bits; AK605, an integer divisor may be zero.
        """
        fault, where, batch, heads, offsets, runs = engine().block_runs(self.program, *sizes, buffers, params)
        if fault:
            raise self.error(FAULTS[fault], where, self.bytecode, len(buffers))
        return Structure(sizes._replace(batch=batch, heads=heads), offsets, runs)

    def tiles(self, q: Any, k: Any, buffers: list[Any], params: list[float]) -> tuple[dict[str, int], str]:
        """How many tiles a call finds empty, partial and full, by the engine's own analysis; and which those are of.

        Of packed and padded batches only the first sequence is looked at. Of queries that are gathered by the blocks of keys
        that they chose it is those of gathered queries, in tasks of as many as there are.
        """
        sequences = self._sequences(q, k, buffers)
        batch, heads, q_len, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        if sequences is not None:
            batch = 1
            _, _, q_len, _, kv_len = sequences[0] if sequences else (0, 0, 0, 0, 0)
        if q_len == 0 or kv_len == 0:
            return {}, ""
        sizes = Sizes(batch, heads, q_len, kv_len, self.config["tile_q"], self.config["tile_kv"])
        found = self.structure(sizes, buffers, params)
        tiles, of = found.by_kind, found.of_heads + ("" if sequences is None else ", in the first sequence")
        plain = self._table is None and self._encoding is None and self._skip is None
        if plain and self.program.chooses:
            gathered = engine().gathered_tiles(self.program, *found.sizes, buffers, params)
            if gathered is not None:
                full, partial = gathered
                tiles = {"empty": sum(tiles.values()) - full - partial, "partial": partial, "full": full}
                of += f", queries gathered by the blocks of {self.program.chooses} keys that they chose"
        return tiles, of

    def _no_page(self, b: int, k: Any, buffers: list[Any]) -> AttnkitError:
        assert self._table is not None
        assert self._kv_layout.lengths is not None
        length = int(buffers[self._kv_layout.lengths][b])
        return missing_page(buffers[self._table], b, length, k.shape[2], k.shape[0])

    def _fault(self, fault: int, about: int, bytecode: Bytecode, k: Any, buffers: list[Any]) -> AttnkitError:
        if FAULTS[fault] == "AK602":
            return self._no_page(about, k, buffers)
        return self.error(FAULTS[fault], about, bytecode, len(buffers))

    def error(self, code: str, about: int, bytecode: Bytecode, num_buffers: int) -> AttnkitError:
        """The error for a fault of the engine: about an instruction, a tensor, or nothing in particular (-1)."""
        names = (*_TENSORS, *(f"buffer b{i}" for i in range(num_buffers)), *_GRADIENTS)
        if about < 0:
            where = "backend cpu"
        elif code in _ABOUT_TENSORS:
            where = names[about] if about < len(names) else f"gradient of buffer b{about - len(names)}"
        else:
            opcode = int(bytecode.code[about, 0])
            name = next(name for name, number in engine().opcodes().items() if number == opcode)
            where = f"score or mask, instruction {about} ({name}) of `attnkit dump --stage bytecode`"
        return error(code, where=where)


def _codec_reasons(program: Program) -> list[str]:
    """Why codecs of inputs are not those of a cache."""
    reasons = []
    for i, layout in enumerate(program.inputs):
        codec = layout.codec
        if codec is None:
            continue
        known = {
            "int8": codec.axis == "token" and codec.group == 0,
            "fp8": codec.axis == "head",
            "int4": codec.axis == ("channel" if i == 1 else "token") and codec.group % 32 == 0,
        }
        name = {"int2": "int4"}.get(codec.name, codec.name)
        if layout.kind not in ("padded", "paged") or not known[name]:
            reasons.append(
                f"input {i} is {layout.kind} {codec.name}({codec.axis}, {codec.group}), of no cache"
            )
    return reasons


def missing_page(table: Any, row: int, length: int, page_size: int, pages: int) -> AttnkitError:
    """The error for a row of so many tokens, one of which the page table gives no page."""
    held = table[row, : -(-length // page_size)].tolist()
    at = next(i for i, page in enumerate(held) if not 0 <= page < pages)
    return no_page(row, at, held[at], pages)


def too_large(exc: ValueError) -> AttnkitError:
    return error("AK502", where="backend cpu", given=str(exc), allowed="sizes that fit 32 bits")


backend = CpuBackend()
