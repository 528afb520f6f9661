"""The plan cache: program text, dtype, head dims and device decide the kernel; these and the bucket of lengths its config."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from attnkit import backends
from attnkit.backends import Kernel
from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.plan.spec import Config, KernelSpec
from attnkit.tune.key import ANY, Lengths, bucket
from attnkit.tune.lookup import Served, mode, serve

# Every distinct program text keeps one entry; a model has a handful. The bound only stops a leak.
_MAX_ENTRIES = 4096


@dataclass(frozen=True)
class Prepared:
    """A kernel, and how it came to be chosen."""

    spec: KernelSpec
    backend: str
    served: Served
    kernel: Kernel
    rejected: dict[str, tuple[str, ...]]

    @property
    def config(self) -> Config:
        """The kernel's numbers."""
        return self.served.config


_Key = tuple[str, str, int, int, str, str, str]
_cache: dict[tuple[_Key, Lengths], Prepared] = {}
_kernels: dict[tuple[_Key, tuple[int, ...]], Kernel] = {}  # by config: most buckets have the same
_elsewhere: list[Callable[[], object]] = []
_lock = threading.RLock()  # a signal handler, or a finalizer, may come back here


def choose(spec: KernelSpec, backend: str = "auto") -> tuple[str, dict[str, tuple[str, ...]]]:
    """The backend that runs ``spec``, and why each other one does not.

    The reference backend computes in float64 and materialises every pair: it runs only when it is asked for.

    Raises:
        AttnkitNotImplementedError: AK501, no such backend; AK502, none can run the problem.
    """
    candidates = [n for n in backends.names() if n != "reference"] if backend == "auto" else [backend]
    rejected: dict[str, tuple[str, ...]] = {}
    chosen = None
    for name in candidates:
        candidate = backends.get(name)
        missing = candidate.available()
        reasons = (f"not available: {missing}",) if missing else candidate.supports(spec)
        if reasons:
            rejected[name] = reasons
        elif chosen is None:
            chosen = name
        else:
            rejected[name] = (f"{chosen} comes first",)
    if chosen is None:
        given = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in rejected.items())
        raise error(
            "AK502",
            where=f"backend {backend!r}",
            given=given,
            allowed="float32, bfloat16 or float16 tensors on the CPU or an NVIDIA GPU",
        )
    if backend == "auto":
        rejected["reference"] = ("runs only when it is asked for",)
    return chosen, rejected


def prepare(
    text: str, dtype: str, head_dim: int, v_head_dim: int, device: str = "cpu", backend: str = "auto",
    precision: str = "highest", lengths: Lengths = ANY,
) -> Prepared:  # fmt: skip
    """The kernel for a program text, built on first use. ``lengths`` of queries and keys are those of the call's tensors.

    Raises:
        AttnkitError: AK1xx or AK2xx, the text is not a valid program; AK5xx, no backend can run it.
    """
    program = (text, dtype, head_dim, v_head_dim, device, backend, precision)
    key = program, (bucket(lengths[0]), bucket(lengths[1]))
    found = _cache.get(key)
    if found is not None:
        return found
    spec = KernelSpec(parse(text), dtype, head_dim, v_head_dim, device, precision)
    name, rejected = choose(spec, backend)
    chosen = backends.get(name)
    served = serve(chosen, spec, lengths)
    config = program, tuple(served.config.values())
    kernel = _kernels.get(config)
    if kernel is None:
        kernel = chosen.build(spec, served.config)
    with _lock:
        if max(len(_cache), len(_kernels)) >= _MAX_ENTRIES:
            clear()
        kernel = _kernels.setdefault(config, kernel)
        if mode() in ("tune-missing", "retune"):
            from attnkit.runtime.first_call import at_first

            kernel = at_first(kernel, name, spec, served, lengths)
        return _cache.setdefault(key, Prepared(spec, name, served, kernel, rejected))


def clear() -> None:
    """Forget every prepared kernel, wherever it is kept."""
    with _lock:
        _cache.clear()
        _kernels.clear()
        for forget in _elsewhere:
            forget()


def when_cleared(forget: Callable[[], object]) -> None:
    """``forget`` is called by `clear`: by who keeps prepared kernels under keys of its own."""
    _elsewhere.append(forget)
