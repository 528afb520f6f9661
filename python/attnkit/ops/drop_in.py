"""The drop-in: torch's own attention op, overridden for the whole process, and an account of what went where."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import attnkit
from attnkit.errors import AttnkitError
from attnkit.ops import sdpa, torch_sdpa
from attnkit.ops.check import has_tangent
from attnkit.ops.counts import counts, recorder
from attnkit.ops.registry import is_transformed
from attnkit.ops.warm import is_plain, is_unwatched


@dataclass(frozen=True)
class InstalledReport:
    """What happened to the calls of torch's op since the first `install`.

    ``attnkit`` calls were computed by attnkit, ``kernel_runs`` kernels ran in all (a compiled graph runs kernels without
    another call), and ``torch`` counts, by reason, the calls that torch computed.
    """

    active: bool
    attnkit: int
    kernel_runs: int
    torch: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"attnkit {self.attnkit} calls ({self.kernel_runs} kernels run), torch {sum(self.torch.values())} calls"
        ]
        lines += [f"  torch, {reason}: {n}" for reason, n in sorted(self.torch.items(), key=lambda x: -x[1])]
        return "\n".join(lines)


def _override(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    if torch_sdpa.bypassed():
        return torch_sdpa.decompose(*args, scale=scale, enable_gqa=enable_gqa)
    if (found := sdpa.at_a_glance(*args, scale, enable_gqa)) is not None:
        counts.take()
        return found
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    unwatched = is_unwatched(tensors)
    if has_tangent(tensors) or (not unwatched and any(map(is_transformed, tensors))):
        form: sdpa.Form | str = "forward-mode derivatives and function transforms"
    else:
        form = sdpa.express(*args, scale, enable_gqa)
    if not isinstance(form, str):
        try:
            o = sdpa.run(form, query, unwatched)
        except AttnkitError as exc:
            if exc.code != "AK607":
                raise
            form = "tensor that is not aligned"  # which shows only in real memory, after tracing
        else:
            counts.take()
            return o
    if (record := recorder()) is not None:
        if is_plain(tensors):
            record(prepared=None, q=query, k=key, v=value, buffers=[], params=[], reason=form)
            heads = (query.shape[:-2],) if enable_gqa else (t.shape[:-2] for t in (query, key, value))
            lead = torch.broadcast_shapes(*heads)  # type: ignore[no-untyped-call]
            return query.new_zeros((*lead, query.shape[-2], value.shape[-1]))
        # A graph is being captured: it must not capture zeros. Of the several passes the first one tells.
        if isinstance(query, FakeTensor):
            record(prepared=None, q=query, k=key, v=value, buffers=[], params=[], reason=form)
    else:
        counts.decline(form)
    return torch_sdpa.decompose(*args, scale=scale, enable_gqa=enable_gqa)


class _Override:
    """The registration with torch's dispatcher, counted."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come back here
        self._library: Any = None
        self._tag = ""
        self.installs = 0

    @property
    def active(self) -> bool:
        """Whether torch's op is overridden now."""
        return self._library is not None

    def add(self) -> bool:
        """Count one more install; True if it was the first. An exception in between, such as Ctrl-C, undoes it."""
        with self._lock:
            if self._library is None:
                self._register()
            self.installs += 1
            return self.installs == 1

    def remove(self) -> bool:
        """Count one install less; True if it was the last."""
        with self._lock:
            if self._library is None:
                return False
            if self.installs > 1:
                self.installs -= 1
                return False
            self.installs = 0
            self._unregister()
            return True

    def _register(self) -> None:
        counts.reset()
        # torch keeps compiled graphs on disk, too: those of this process must not be found by one without us.
        self._tag = torch.compiler.config.cache_key_tag
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        try:
            torch.compiler.config.cache_key_tag = f"{self._tag} attnkit {attnkit.__version__}"
            for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
                self._library.impl("scaled_dot_product_attention", _override, key)
            torch_sdpa.forget_dispatch()
        except BaseException:
            self._unregister()
            raise

    def _unregister(self) -> None:
        torch.compiler.config.cache_key_tag = self._tag
        self._library._destroy()
        self._library = None
        torch_sdpa.forget_dispatch()


_registration = _Override()


def install() -> None:
    """Let attnkit compute torch's scaled_dot_product_attention in this process, wherever it means exactly the same.

    Calls that attnkit does not take (float64, forward-mode derivatives) go on to torch and are counted by reason in
    `installed_report`. Dropout draws other weights than torch's own does. Installs nest: the last `uninstall` removes the override. Compiled graphs are reset, because
    they keep what they captured.
    """
    first = _registration.add()
    try:
        if first:
            _forget_graphs()
    except BaseException:
        _registration.remove()
        raise


def uninstall() -> None:
    """Undo one `install`; without one, do nothing."""
    if _registration.remove():
        _forget_graphs()


def _forget_graphs() -> None:
    """Compiled graphs keep what they captured. Where nobody has compiled, the compiler is not imported for it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a ``with`` block."""
    install()
    try:
        yield
    finally:
        uninstall()


def installed_report() -> InstalledReport:
    """What went where since the first install."""
    return InstalledReport(_registration.active, counts.taken, counts.kernel_runs, dict(counts.declined))
