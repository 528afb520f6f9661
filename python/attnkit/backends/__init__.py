"""Backends turn a KernelSpec into a callable kernel. One folder each; they never import each other.

A backend answers four questions (`Backend`). In-tree backends are listed in `_HOMES`; others register under the
entry point group ``attnkit.backends``, as ``name = "module:object"``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

from attnkit.errors import error
from attnkit.plan.spec import Config, KernelSpec, Space

_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

# The kernel of `attend`: (q, k, v, o, lse or None, buffers, params, threads, seed or None). Tensors are torch's, used
# through data_ptr, shape and stride alone, and checked by the caller; the seed of dropout is an int.
Kernel = Callable[..., None]


class Fingerprint(NamedTuple):
    """What times depend on besides the problem: the device, and what built the kernels. Names and values of both."""

    device: dict[str, str]
    toolchain: dict[str, str]


class Backend(Protocol):
    """What a backend promises. One that also answers ``fingerprint() -> Fingerprint`` takes part in tuning."""

    name: str

    def available(self) -> str | None:
        """None if this machine can run the backend, else the reason why not."""

    def supports(self, spec: KernelSpec) -> tuple[str, ...]:
        """Empty if the backend can run ``spec``, else every reason why it cannot."""

    def space(self, spec: KernelSpec) -> Space:
        """The fields that may be tuned for ``spec``, with their defaults."""

    def build(self, spec: KernelSpec, config: Config) -> Kernel:
        """A kernel for ``spec``."""


def refused(
    spec: KernelSpec, *, device: str, dtypes: Collection[str], channels: int, where: str,
    of_program: tuple[str, ...] | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Why a backend cannot run ``spec``; empty if it can. Of programs it knows plain attention, unless `of_program` says more.

    It takes tensors of these ``dtypes`` on ``device``, which people call ``where``, and heads of up to so many ``channels``.
    """
    program, reasons = spec.program, list(of_program or ())
    if of_program is None and not (program.is_attention and program.attend.plain):
        reasons.append("the program is more than softmax attention with a score, a mask, a sink and dropout")
    if spec.device != device:
        reasons.append(f"tensors are on {spec.device}, not on {where}")
    if spec.dtype not in dtypes:
        reasons.append(f"dtype is {spec.dtype}, none of {', '.join(dtypes)}")
    if not (1 <= spec.head_dim <= channels and 1 <= spec.v_head_dim <= channels):
        reasons.append(f"head dims are {spec.head_dim} and {spec.v_head_dim}, not within 1..{channels}")
    scale = program.scale
    if scale is not None and scale > _FLOAT32_MAX:
        reasons.append(f"scale is {scale}, beyond float32")
    return tuple(reasons)


class _Broken:
    """Stands for a backend of somebody else's whose module does not load."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def available(self) -> str | None:
        return self._reason

    def supports(self, spec: KernelSpec) -> tuple[str, ...]:
        return (self._reason,)

    def space(self, spec: KernelSpec) -> Space:
        return {}

    def build(self, spec: KernelSpec, config: Config) -> Kernel:
        raise error("AK501", where=f"backend {self.name!r}", given=self._reason)


_HOMES = {name: f"attnkit.backends.{name}:backend" for name in ("cpu", "triton", "reference")}


@cache
def names() -> tuple[str, ...]:
    """The names of all backends, in-tree first."""
    return (*_HOMES, *sorted(e.name for e in entry_points(group="attnkit.backends") if e.name not in _HOMES))


@cache
def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        AttnkitNotImplementedError: AK501, there is no such backend.
    """
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        backend: Any = getattr(import_module(module), attribute)
    else:
        found = [e for e in entry_points(group="attnkit.backends") if e.name == name]
        if not found:
            raise error("AK501", where="backend", given=repr(name), allowed=", ".join(("auto", *names())))
        try:
            backend = found[0].load()
        except Exception as exc:  # whatever it is, the other backends still work
            backend = _Broken(name, f"{type(exc).__name__}: {exc}")
    return backend  # type: ignore[no-any-return]
