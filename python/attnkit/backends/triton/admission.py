"""Whether a config's numbers are right on the device at hand: asked once, with a small problem, against float64.

Compilers have turned single schedules into wrong code, and no machine that only compiles can tell. What is asked is a
program's class (how its tensors lie, what kinds of score and mask it has), not its own expressions; the answer is kept in
the folder of compiled kernels, for this device and these tools.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from attnkit import backends
from attnkit.backends.triton import launch
from attnkit.backends.triton.kernel import PRECISIONS, Phase, TritonKernel
from attnkit.backends.triton.schedule import Schedule
from attnkit.backends.triton.slopes import is_plain
from attnkit.backends.triton.words import BITS, RUN, laid_out
from attnkit.errors import error
from attnkit.ir.expr import topological
from attnkit.ir.program import Codec, Program
from attnkit.ir.text import parse
from attnkit.plan.ranges import stretch
from attnkit.plan.spec import Config, KernelSpec
from attnkit.variants import kv_quant
from attnkit.variants.kv_quant import E4M3, e4m3_bytes

# The fields of a phase, by what stands before their names.
_FIELDS: dict[Phase, tuple[str, ...]] = {
    "forward": ("",), "decode": ("decode_",), "backward": ("dq_", "dkv_", "pairs_"),
}  # fmt: skip
# How far results may be from float64, of the larger of 1 and their largest element: o and lse, gradients.
_TOLERANCES = {"ieee": (2e-5, 1e-4), "tf32": (2e-2, 5e-2), "float16": (5e-3, 2e-2), "bfloat16": (3e-2, 8e-2)}
_BATCH, _HEADS, _KV_HEADS, _PAGE, _SEED = 2, 2, 1, 16, 123456789
_known: dict[str, str] = {}  # what is wrong, if anything, by key


def admitted(spec: KernelSpec, config: Config, phase: Phase, like: Any) -> Config:
    """The config to run a phase with on the device of the tensor ``like``: this one, or one of narrower tiles.

    Raises:
        AttnkitNotImplementedError: AK505, neither computes what it should; AK506, nobody has asked yet, and a graph is captured.
    """
    wrong = _wrong(spec, config, phase, like)
    if not wrong:
        return config
    other = narrower(config, phase)
    wrong_too = _wrong(spec, other, phase, like)
    if wrong_too:
        given = f"{launch.device()}: {wrong}; with narrower tiles: {wrong_too}"
        raise error(
            "AK505", where="backend triton", given=given, allowed="what float64 gives, within rounding"
        )
    warnings.warn(
        f"attnkit: narrower tiles are used for {phase}: {wrong} ({launch.device()})",
        RuntimeWarning,
        stacklevel=2,
    )
    return other


def narrower(config: Config, phase: Phase) -> Config:
    """Half the tiles of queries and of keys, nothing in flight: other instructions, where the first may be wrong."""
    changes: Config = {}
    for kind in _FIELDS[phase]:
        changes |= {kind + tile: max(16, config[kind + tile] // 2) for tile in ("tile_q", "tile_kv")}
        changes[kind + "stages"] = 1
    return config | changes


def _wrong(spec: KernelSpec, config: Config, phase: Phase, like: Any) -> str:
    """What is wrong with a config, empty if nothing is; from memory, from the folder of kernels, or by trying."""
    spec = replace(spec, program=representative(spec.program))
    names = [kind + name for kind in _FIELDS[phase] for name in Schedule._fields]
    taken = {name: config[name] for name in (*names, "split_kv")}
    key = json.dumps([
        launch.device(), _tools(), phase, spec.program.text, spec.dtype, spec.head_dim, spec.v_head_dim, spec.precision, taken,
    ])  # fmt: skip
    if key not in _known:
        file = launch.kernel_cache() / f"admission-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        found = _read(file, key)
        if found is None:
            if launch.capturing():
                hint = "make the same call once before the capture; its answer is kept"
                given = f"a first {phase} of {spec.dtype}, while a graph is captured"
                raise error("AK506", where="backend triton", given=given, hint=hint)
            found = _tried(spec, config, phase, like)
            _write(file, {"schema_version": 1, "key": key, "wrong": found})
        _known[key] = found
    return _known[key]


def _read(file: Path, key: str) -> str | None:
    """An answer that is kept; None if there is none, or it is damaged or to another question."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return str(held["wrong"]) if held["key"] == key and held["schema_version"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, answer: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


@cache
def _tools() -> str:
    """What made the kernels: Triton, its assembler, and the templates."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return f"{launch.tools()}, {hashlib.sha256(b''.join(texts)).hexdigest()[:16]}"


def representative(program: Program, stored: bool = True) -> Program:
    """The program of a class: its layouts, and a score, mask, sink and dropout of the same kinds, of no tensors but its own.

    Without ``stored`` keys and values lie in order, as what their codes mean.
    """
    attend = program.attend
    kv = program.inputs[attend.k]
    layouts = {
        "packed": ("packed[b0]", "packed[b1]"),
        "padded": ("bhsd", "padded[b0]"),
        "paged": ("bhsd", "paged[b0, b1]"),
    }
    q, k = layouts.get(kv.kind, ("bhsd", "bhsd"))
    buffers = {"packed": ["i32[1]", "i32[1]"], "padded": ["i32[1]"], "paged": ["i32[2]", "i32[1]"]}.get(
        kv.kind, []
    )
    body = []
    loads = [node for node in topological([attend.score]) if node.op == "load"]
    if loads:
        plain = all(is_plain(node, kv.kind == "packed") for node in loads if node.dtype == "float")
        body.append(
            f"score = s - b{len(buffers)}[{'h' if plain else '(q_idx + kv_idx) % 2'}] * abs(q_idx - kv_idx)"
        )
        buffers.append("f32[1]")
    elif attend.score.op != "var":
        body.append("score = 8 * tanh(s / 8)")
    if attend.mask is not None:
        known = stretch(attend.mask, "kv_idx") is not None
        body.append(
            f"mask = {'kv_idx <= q_idx + (kv_len - q_len)' if known else '(q_idx + 2 * kv_idx) % 3 != 0'}"
        )
    sink = attend.normalizer.sink is not None
    kind = attend.normalizer.kind
    body.append(f"normalizer = {kind}(sink = b{len(buffers)})" if sink else f"normalizer = {kind}")
    buffers += ["f32[1]"] * sink
    if not stored:
        k = k.replace("paged[b0, b1]", "padded[b1]")
    codecs = [program.inputs[i].codec if stored else None for i in (attend.k, attend.v)]
    k, v = (k if c is None else f"{k} {c.name}({c.axis}, {c.group})" for c in codecs)
    declared = ", ".join(f"b{i}: {kind}" for i, kind in enumerate(buffers))
    dropout = ", dropout = 0.25" if attend.dropout is not None else ""
    lines, results = "\n".join(body), ", ".join(attend.usual_outputs)
    return parse(
        f"attnkit 1\nprogram (q: {q}, k: {k}, v: {v}){f' buffers({declared})' if declared else ''} {{\n"
        f"{results} = attend(q, k, v, scale = default{dropout}) {{\n{lines}\n}}\nreturn {results}\n}}\n"
    )


@dataclass
class _Problem:
    """Tensors on the device, and the keys and values that they mean, in order, in float64 on the host.

    ``beside`` belongs to codes.
    """

    q: Any
    k: Any
    v: Any
    beside: dict[str, Any]
    buffers: list[Any]
    means: tuple[Any, Any]


def _problem(program: Program, spec: KernelSpec, like: Any, q_len: int, kv_len: int) -> _Problem:
    """Rows that nearly tie and rows that decide, rows that see nothing, and no numbers in slots that do not count."""
    rng = np.random.default_rng(_SEED)
    kv = program.inputs[program.attend.k]
    batch = 1 if kv.kind == "packed" else _BATCH
    q = rng.standard_normal((batch, _HEADS, q_len, spec.head_dim))
    codecs = [layout.codec for layout in program.inputs[1:]]
    groups = [codec.group for codec in codecs if codec is not None and codec.name in BITS]
    columns, page = -(-kv_len // max(groups, default=_PAGE)), max(groups, default=_PAGE)
    ragged = kv.kind in ("padded", "paged")
    slots = columns * page if ragged else kv_len
    k, v = (rng.standard_normal((batch, _KV_HEADS, slots, d)) for d in (spec.head_dim, spec.v_head_dim))
    q[:, :, ::7] *= 8
    k[:, :, 1::5] = k[:, :, : len(k[0, 0, 1::5])]
    integers = launch.dtype_of(like, "int")
    lengths = np.array([kv_len, kv_len // 3])
    buffers: list[Any] = [lengths] if ragged else []
    if kv.kind == "packed":
        buffers = [[0, q_len // 3, q_len], [0, kv_len // 2, kv_len]]
    for x in (k, v) if ragged else ():
        x[np.broadcast_to((np.arange(slots) >= lengths[:, None])[:, None], x.shape[:3])] = np.nan
    coded = np.maximum(lengths - 9, 0) // page * page
    held, beside, means = [], {"coded_of": like.new_tensor(coded, dtype=integers)} if groups else {}, []
    for name, x, codec in zip("kv", (k, v), codecs, strict=True):
        if codec is not None and codec.name in BITS:
            stored, of_x, meant = _in_words(x, codec, name == "k", coded, like)
        else:
            stored, of_x, meant = _stored(x, codec, like)
        held.append(stored)
        beside |= {f"{name}_{what}": t for what, t in of_x.items()}
        means.append(meant)
    if kv.kind == "paged":
        table = rng.permutation(batch * columns).reshape(batch, -1)
        buffers = [table, lengths]
        held = [_paged(x, table) for x in held]
        beside |= {name: _paged(x, table) for name, x in beside.items() if name.endswith("scales")}
    buffers = [like.new_tensor(b, dtype=integers) for b in buffers]
    buffers += [
        like.new_tensor(rng.standard_normal(_HEADS), dtype=launch.dtype_of(like, "float"))
        for b in program.buffers
        if b.dtype == "f32"
    ]
    return _Problem(like.new_tensor(q), held[0], held[1], beside, buffers, (means[0], means[1]))


def _stored(x: Any, codec: Codec | None, like: Any) -> tuple[Any, dict[str, Any], Any]:
    """Keys or values as a kernel gets them, what belongs to them, and what they mean. Rows that are none hold what comes out of them."""
    if codec is None:
        held = like.new_tensor(x)
        return held, {}, held.double().cpu()
    if codec.name == "fp8":
        scales = like.new_full((1, x.shape[1], 1), 0.03, dtype=launch.dtype_of(like, "float")).expand(
            x.shape[:3]
        )
        factor = scales.double().cpu()[..., None]
        codes = e4m3_bytes(x / factor.numpy())
        means = factor.new_tensor(E4M3[codes])
        return like.new_tensor(codes, dtype=launch.dtype_of(like, "byte")), {"scales": scales}, means * factor
    scales = like.new_tensor(np.abs(x).max(-1) / 127, dtype=launch.dtype_of(like, "bfloat16"))
    factor = scales.double().cpu()[..., None]
    codes = np.nan_to_num(np.clip(np.rint(x / factor.numpy()), -127, 127), nan=99)
    held = like.new_tensor(codes, dtype=launch.dtype_of(like, "char"))
    return held, {"scales": scales}, held.double().cpu() * factor


def _in_words(x: Any, codec: Codec, keys: bool, coded: Any, like: Any) -> tuple[Any, dict[str, Any], Any]:
    """The same of int4 and int2: those before ``coded`` of a row are codes, the next ones the newest."""
    x = kv_quant.to_bfloat16(x)
    found = kv_quant.quantise(x, codec)
    words, scales = laid_out(found.codes, found.scale, found.zero, BITS[codec.name], keys)
    ring = codec.group + RUN
    newest = np.full((*x.shape[:2], ring, x.shape[3]), np.nan)
    means = kv_quant.decode(found, codec)
    for b, first in enumerate(coded):
        left = means[b, :, first:] = x[b, :, first:]
        left = left[:, :ring]
        newest[b, :, np.arange(first, first + left.shape[1]) % ring] = left.swapaxes(0, 1)
    half, double = (launch.dtype_of(like, name) for name in ("bfloat16", "double"))
    beside = {"scales": like.new_tensor(scales, dtype=half), "newest": like.new_tensor(newest, dtype=half)}
    return (
        like.new_tensor(words, dtype=launch.dtype_of(like, "int")),
        beside,
        like.new_tensor(means, dtype=double).cpu(),
    )


def _paged(x: Any, table: Any) -> Any:
    """Rows ``[B, H, S, ...]`` in pages ``[pages, H, page, ...]``."""
    parts = x.unflatten(2, (table.shape[1], -1)).transpose(1, 2)
    pages = parts.new_empty((table.size, *parts.shape[2:]))
    pages[pages.new_tensor(table.reshape(-1), dtype=launch.dtype_of(x, "long"))] = parts.flatten(0, 1)
    return pages


def _tried(spec: KernelSpec, config: Config, phase: Phase, like: Any) -> str:
    """What a config computes wrongly, or how it fails."""
    fields = _FIELDS[phase]
    tile_q, tile_kv = (max(config[kind + tile] for kind in fields) for tile in ("tile_q", "tile_kv"))
    kv_len = config["split_kv"] + 77 if phase == "decode" else 2 * tile_kv + 9
    q_len = 3 if phase == "decode" else max(tile_q, kv_len) + 5
    problem = _problem(spec.program, spec, like, q_len, kv_len)
    try:
        found = _results(TritonKernel(spec, config), problem, phase)
    except Exception as exc:  # a compiler's, a driver's: this config does not run here
        said = str(exc).strip().splitlines()
        return f"{type(exc).__name__}: {said[0] if said else ''}"
    program = representative(spec.program, stored=False)
    oracle: Any = backends.get("reference").build(
        KernelSpec(program, "float64", spec.head_dim, spec.v_head_dim), {}
    )
    doubles = _Problem(
        problem.q.double().cpu(), *problem.means, {}, [b.cpu() for b in problem.buffers], problem.means
    )
    expected = _results(oracle, doubles, phase)
    forward, backward = _TOLERANCES[PRECISIONS[spec.precision] if spec.dtype == "float32" else spec.dtype]
    if "lse" not in program.attend.outputs:
        del found["lse"]
    for name, mine in found.items():
        worst = _distance(mine.double().cpu().numpy(), expected[name].numpy())
        if not worst <= (forward if name in ("o", "lse") else backward):
            return f"{name} is off by {worst:.3g}"
    return ""


def _results(kernel: Any, problem: _Problem, phase: Phase) -> dict[str, Any]:
    """What a kernel makes of a problem, by name."""
    q, k, v, buffers = problem.q, problem.k, problem.v, problem.buffers
    beside = {"beside": problem.beside} if problem.beside else {}
    o = q.new_full((*q.shape[:3], problem.means[1].shape[3]), float("nan"))
    lse = q.new_full(q.shape[:3], float("nan"), dtype=launch.dtype_of(q, "float"))
    kernel(q, k, v, o, lse, buffers, [], 1, _SEED, **beside)
    if phase != "backward":
        return {"o": o, "lse": lse}
    gradients = [x.new_zeros(x.shape) for x in (q, k, v)]
    captured = [b.new_zeros(b.shape) if b.is_floating_point() else None for b in buffers]
    d_o = o.new_tensor(np.random.default_rng(1).standard_normal(o.shape))
    kernel.backward(q, k, v, o, lse, buffers, [], d_o, None, *gradients, captured, 1, _SEED)
    found = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return found | {f"gradient of b{i}": d for i, d in enumerate(captured) if d is not None}


def _distance(found: Any, expected: Any) -> float:
    """The largest difference, of the larger of 1 and the largest element; infinite where one is a number alone."""
    known = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), known) or not np.array_equal(
        np.isneginf(found), np.isneginf(expected)
    ):
        return float("inf")
    size = np.abs(np.where(known, expected, 0)).max(initial=1)
    return float(np.abs(np.where(known, found, 0) - np.where(known, expected, 0)).max(initial=0) / size)
