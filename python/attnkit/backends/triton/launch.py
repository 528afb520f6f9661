"""Kernels of a printed text: interpreted, or compiled for a target and kept.

A compiled kernel is called directly, past Triton's own wrapper: what it was specialised on is decided here, from the
same descriptions that `make compile-check` compiles without a GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from attnkit.backends.triton.source import Arguments, load
from attnkit.errors import error

_ALIGNED = 16  # bytes, and elements of strides: what vector loads and asynchronous copies need
_TYPES = {
    "float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64", "bool": "i1",
    "uint8": "u8", "int8": "i8", "int16": "i16",
}  # fmt: skip
_compiling = threading.Lock()  # Triton's settings are the process's


class Described(NamedTuple):
    """What a kernel is compiled for in one argument: its type, whether 16 divides it, its value if that is 1."""

    type: str
    divisible: bool = False
    one: bool = False


class Target(NamedTuple):
    """What a kernel is compiled for: the number of the architecture (90) and how a program is laid out on it.

    A compiled kernel belongs to the device on which it was loaded.
    """

    arch: int
    warps: int
    stages: int
    device: int = 0


@dataclass(frozen=True)
class Program:
    """One kernel of a text: its entry, its arguments in order, and its numbers."""

    text: str
    entry: str
    arguments: Arguments
    constants: tuple[tuple[str, Any], ...]


def interpreted() -> bool:
    """Whether Triton runs its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def describe(arguments: Arguments, values: Sequence[Any]) -> tuple[Described, ...]:
    """What a call's arguments are. Sizes of sequences are not looked at: every length runs the same kernel."""
    found: list[Described] = []
    far: dict[str, bool] = {}  # tensors whose last element is beyond 32 bits: all offsets into them take 64
    for (name, kind), value in zip(arguments, values, strict=True):
        if kind == "pointer":
            far[name] = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) >= 2**31
            dtype = _TYPES[str(value.dtype).removeprefix("torch.")]
            found.append(Described("*" + dtype, value.data_ptr() % _ALIGNED == 0))
        elif kind == "float":
            found.append(Described("fp32"))
        else:
            special = kind == "stride"
            beyond = not -(2**31) <= value < 2**31
            width = "i64" if beyond or (special and far[name.rpartition("_s")[0]]) else "i32"
            found.append(Described(width, special and value % _ALIGNED == 0, special and value == 1))
    return tuple(found)


Launch = Callable[[Sequence[Any]], None]


def ready(program: Program, target: Target | None, grid: tuple[int, ...], values: Sequence[Any]) -> Launch:
    """What launches a kernel on the current stream, or interprets it (no target), for arguments like these."""
    grid = (*grid, 1, 1)[:3]
    constants = tuple(value for _, value in program.constants)
    if target is None:
        kernel, named = getattr(load(program.text), program.entry), dict(program.constants)
        return lambda args: kernel[grid](*args, **named)
    compiled = _compiled(program, describe(program.arguments, values), target)
    return lambda args: compiled[grid](*args, *constants)


class Recording:
    """The launches of one call, to be made again with other tensors of the same shapes, strides and alignment.

    ``inputs`` are the tensors of the call by name, ``aliases`` other names of some; any other tensor among the arguments
    is memory of the call's own. Names decide, not tensors: the next call may give two where this one gave one twice.
    """

    def __init__(self, inputs: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
        self._inputs, self._aliases = inputs, aliases
        self._own: dict[int, tuple[str, Any]] = {}
        self._steps: list[tuple[Launch, list[Any], tuple[tuple[int, str], ...]]] = []

    def add(self, launch: Launch, arguments: Arguments, values: Sequence[Any]) -> None:
        """One more launch."""
        slots = []
        for i, ((name, kind), value) in enumerate(zip(arguments, values, strict=True)):
            if kind == "pointer":
                known = self._aliases.get(name, name)
                if self._inputs.get(known) is not value:
                    known = self._own.setdefault(id(value), (f"own {len(self._own)}", value))[0]
                slots.append((i, known))
            elif kind == "float" and name.startswith("p"):
                slots.append((i, name))
        taken = {i for i, _ in slots}
        fixed = [None if i in taken else value for i, value in enumerate(values)]
        self._steps.append((launch, fixed, tuple(slots)))

    def finish(self) -> None:
        """Forget the tensors, but for their shapes."""
        self._memory = [(name, tuple(t.shape), t.dtype) for name, t in self._own.values()]
        self._inputs, self._own = {}, {}

    def run(self, values: dict[str, Any]) -> None:
        """All launches, with the inputs and params of another call."""
        like = next(iter(values.values()))
        for name, shape, dtype in self._memory:
            values[name] = like.new_empty(shape, dtype=dtype)
        for launch, fixed, slots in self._steps:
            args = fixed.copy()
            for i, name in slots:
                args[i] = values[name]
            launch(args)


def signature(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """What decides which kernels a call launches, and with which numbers."""
    return tuple([(t.shape, t.stride(), t.dtype, t.data_ptr() % _ALIGNED == 0) for t in tensors])


@cache
def _compiled(program: Program, described: tuple[Described, ...], target: Target) -> Any:
    return compile_kernel(program, described, target)


def compile_kernel(program: Program, described: Sequence[Described], target: Target) -> Any:
    """Triton's ``CompiledKernel``, from the kernel cache or compiled now. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load(program.text), program.entry)
    if interpreted():
        raise error(
            "AK501", where="backend triton", given="TRITON_INTERPRET is set", hint="unset it to compile"
        )
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(program.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, ((name, _), each) in enumerate(zip(program.arguments, described, strict=True)):
        signature[name] = "constexpr" if each.one else each.type
        if each.one:
            constants[name] = 1
        elif each.divisible:
            attributes[(i,)] = [["tt.divisibility", _ALIGNED]]
    signature |= dict.fromkeys((name for name, _ in program.constants), "constexpr")
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": target.warps, "num_stages": target.stages}
    with _compiling, triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(kernel_cache())
        return triton.compile(source, target=GPUTarget("cuda", target.arch, 32), options=options)


def kernel_cache() -> Path:
    """The folder of compiled kernels. What lies there is run: it belongs to the user, and nobody else may write to it.

    Raises:
        AttnkitValueError: AK401, it is somebody else's, or others may write to it.
    """
    named = os.environ.get("ATTNKIT_KERNEL_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else base / "attnkit" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        given = f"{folder}, of user {found.st_uid}, mode {found.st_mode & 0o777:o}"
        allowed = "a folder of your own that nobody else may write to"
        raise error("AK401", where="the kernel cache", given=given, allowed=allowed, hint="chmod 700")
    return folder


def current_target(warps: int, stages: int) -> Target | None:
    """The device that the current stream runs on; None where kernels are interpreted."""
    if interpreted():
        return None
    from triton.runtime import driver

    return Target(architecture(), warps, stages, driver.active.get_current_device())


def device() -> str:
    """The current device, by name and architecture."""
    if interpreted():
        return "Triton's interpreter"
    from triton.runtime import driver

    return f"{driver.active.get_device_interface().get_device_name()}, sm_{architecture()}"


def capturing() -> bool:
    """Whether the current stream records a CUDA graph: nothing may be computed and looked at."""
    if interpreted():
        return False
    from triton.runtime import driver

    return bool(driver.active.get_device_interface().is_current_stream_capturing())


@cache
def tools() -> str:
    """What makes kernels of a text: Triton, and its assembler."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return f"Triton {triton.__version__}, ptxas {get_ptxas(90).version}"


def architecture() -> int:
    """The number of the current device's architecture, 90 for Hopper."""
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


def described_well(arguments: Arguments, types: Mapping[str, str]) -> tuple[Described, ...]:
    """Aligned tensors with rows of whole vectors and channels side by side: what a call should be."""
    found = []
    for name, kind in arguments:
        if kind == "stride":
            found.append(
                Described("i32", one=True)
                if name.endswith(("_sd", "_scales_ss", "table_ss"))
                else Described("i32", divisible=True)
            )
        elif kind == "pointer":
            found.append(Described(types[name], divisible=True))
        else:
            found.append(Described("fp32" if kind == "float" else "i32"))
    return tuple(found)


def dtype_of(like: Any, name: str) -> Any:
    """The dtype that ``tensor.float()`` and its like give: nothing here imports torch."""
    return getattr(like.new_empty(0), name)().dtype
