"""`explain`: what a call would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from attnkit.errors import error
from attnkit.ops.counts import recording


@dataclass(frozen=True)
class CallReport:
    """One attention call: what it is, where it would run, and why not elsewhere.

    ``blocks`` counts the tiles that are empty, partial and full, ``blocks_of`` says of which heads; ``config`` are the
    kernel's numbers, ``tuned`` says where those of each direction come from (``user``, ``project``, ``pack``, or ``cost model``:
    nobody has measured), and ``bucket`` for which numbers of queries and keys (0: any).
    """

    backend: str
    dtype: str
    device: str
    shapes: dict[str, list[int]]
    text: str = ""
    config: dict[str, int] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    bucket: tuple[int, int] = (0, 0)
    rejected: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    blocks_of: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        lines = [f"runs on {self.backend}: {self.dtype} on {self.device}, {shapes}"]
        lines += [f"  {note}" for note in self.notes]
        if self.config:
            lines.append("  config: " + ", ".join(f"{k}={v}" for k, v in self.config.items()))
        if self.tuned:
            lines.append(
                f"  tuned: {', '.join(f'{k} {v}' for k, v in self.tuned.items())} (bucket {_bucket(self.bucket)})"
            )
        if self.blocks:
            lines.append(
                f"  blocks: {', '.join(f'{n} {kind}' for kind, n in self.blocks.items())} ({self.blocks_of})"
            )
        lines += [f"  not on {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        lines += [f"  | {line}" for line in self.text.splitlines()]
        return "\n".join(lines)


def _bucket(lengths: tuple[int, int]) -> str:
    return " x ".join(str(n) if n else "any" for n in lengths)


@dataclass(frozen=True)
class Report:
    """All attention calls of one function, in order."""

    calls: tuple[CallReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) if self.calls else "no attention call was made"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {"calls": [asdict(call) for call in self.calls]}


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Call ``function(*args, **kwargs)`` and say what each attention call in it would do.

    No attention kernel runs: attention calls return zeros, everything else in the function is executed.

    Returns:
        The calls in their order, ``report.calls``; printed, a text for people.

    Raises:
        AttnkitError: whatever the calls themselves would raise.
    """
    if not callable(function):
        raise error(
            "AK402", where="function", given=type(function).__name__, allowed="a function to be called"
        )
    calls: list[CallReport] = []

    def record(
        *, prepared: Any, q: Any, k: Any, v: Any, buffers: list[Any], params: list[float], reason: str | None,
        note: str = "", config: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        shapes = {name: list(t.shape) for name, t in (("q", q), ("k", k), ("v", v))}
        dtype, device = str(q.dtype).removeprefix("torch."), q.device.type
        if prepared is None:
            calls.append(CallReport("torch", dtype, device, shapes, notes=(f"computed by torch: {reason}",)))
            return
        kernel = prepared.kernel
        whole = hasattr(kernel, "tiles") and not note
        blocks, blocks_of = kernel.tiles(q, k, buffers, params) if whole else ({}, "")
        calls.append(
            CallReport(
                prepared.backend,
                dtype,
                device,
                shapes,
                prepared.spec.program.text,
                prepared.config if config is None else config,
                {str(direction): layer for direction, layer in prepared.served.layers.items()},
                prepared.served.lengths,
                prepared.rejected,
                blocks,
                blocks_of,
                (note,) if note else (),
            )
        )

    with recording(record):
        function(*args, **kwargs)
    return Report(tuple(calls))
