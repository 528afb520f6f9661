"""Suite variants: linear attention beside the same in torch, and beside our own dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.bench import machine
from attnkit.bench.ceilings import Ceilings
from attnkit.bench.measure import Contender, Interval, interval, measure, ratio
from attnkit.bench.peers import recurrences
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.report import drawing
from attnkit.bench.runner import use_threads

Progress = Callable[[str, float], None]
SECONDS = 60.0
_HEADS, _DIM, _LENGTH = 8, 64, 4096
_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_DENSE_TO = 16384  # longer, dense attention takes too long to wait for
OWN = "attnkit"
_WRONG = 1e-4  # relative error in the Frobenius norm


@dataclass(frozen=True)
class Member:
    """A member of the family: what it is given besides q, k, v, how torch has it, and the least ratios promised.

    ``products`` counts the products of tokens and state, ``chunk`` the tokens that are computed together.
    """

    gate: int  # dimensions; 0: none
    beta: bool
    peer: Callable[..., Tensor]
    forward: float
    both: float
    share: float | None
    products: int
    chunk: int = 64

    def flops(self, length: int) -> int:
        """Multiplications and additions forward: products with the state, and halves of chunks with themselves."""
        pairs = (1 + self.beta) * 2 * (self.chunk + 1)
        return length * _HEADS * _DIM * (2 * self.products * _DIM + pairs)


MEMBERS = {
    "linear": Member(0, False, recurrences.linear, 10, 8, 0.6, 2),
    "scalar gate": Member(3, False, recurrences.scalar_gate, 10, 8, 0.6, 2),
    "channel gate": Member(4, False, recurrences.channel_gate, 6, 5, None, 2, 16),
    "gated delta": Member(3, True, recurrences.gated_delta, 6, 5, None, 3),
}
_OVER_LENGTHS = ("linear", "gated delta")


@dataclass(frozen=True)
class Job:
    """One member in one direction, ``fwd`` or ``fwdbwd``, at one length; ``flat``: of the rows over lengths."""

    member: str
    direction: str
    length: int = _LENGTH
    flat: bool = False

    @property
    def title(self) -> str:
        """Unique within the suite."""
        return f"{self.member} b1 h{_HEADS} s{self.length} d{_DIM} {self.direction}" + (
            " over lengths" if self.flat else ""
        )


def jobs(patterns: Sequence[str] = ()) -> list[Job]:
    """The rows of the suite whose name has one of the patterns in it."""
    found = [Job(member, direction) for member in MEMBERS for direction in ("fwd", "fwdbwd")]
    found += [Job(member, "fwd", length, True) for member in _OVER_LENGTHS for length in _LENGTHS]
    return [job for job in found if not patterns or any(fnmatchcase(job.title, f"*{p}*") for p in patterns)]


def run(
    chosen: Sequence[Job],
    *,
    seed: int = 0,
    threads: int | None = None,
    seconds: float = SECONDS,
    rounds: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Measure jobs; the result file's content. ``runs`` holds times in milliseconds, ``bars`` what they are judged by."""
    document: Document = {
        "schema_version": SCHEMA_VERSION, "suite": "variants", "machine": machine.describe(), "commit": machine.commit(),
        "records": [], "runs": [], "bars": [], "skipped": [],
    }  # fmt: skip
    with use_threads(threads) as used:
        document["threads"] = used
        ceilings = Ceilings(used)
        for i, job in enumerate(chosen):
            progress(job.title, i / len(chosen))
            document["runs"].append(_measure(job, ceilings, seed, seconds / len(chosen), rounds))
    best = ceilings.best if ceilings.bursts else None
    document["ceilings"] = {
        "threads": used, "fma_gflops": best and best.gflops["float32"], "bf16_gflops": best and best.gflops.get("bfloat16"),
        "read_gbytes_per_s": best and best.read_gbytes_per_s, "bursts": len(ceilings.bursts),
    }  # fmt: skip
    document["bars"] = judge(document)
    return document


def _inputs(job: Job, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    member, tokens = MEMBERS[job.member], (1, _HEADS, job.length)
    given = {x: torch.randn(*tokens, _DIM, generator=generator) for x in "qkv"}
    if member.beta:
        given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
    if member.gate:
        given["gate"] = -0.1 * torch.rand((*tokens, _DIM)[: member.gate], generator=generator)
    if member.beta:
        given["beta"] = torch.rand(tokens, generator=generator)
    return given


def _measure(job: Job, ceilings: Ceilings, seed: int, seconds: float, rounds: int | None) -> dict[str, Any]:
    member, given = MEMBERS[job.member], _inputs(job, seed)
    backward = job.direction == "fwdbwd"
    leaves = [t.requires_grad_(backward) for t in given.values()]
    cotangent = torch.ones(1, _HEADS, job.length, _DIM)

    def ours() -> Tensor:
        plain = {} if member.gate or member.beta else {"feature_map": "identity", "normalize": False}
        return attnkit.linear_attention(**given, **plain)  # type: ignore[arg-type, return-value]

    def dense() -> Any:
        return attnkit.dense_attention(given["q"], given["k"], given["v"], causal=True)

    def contender(call: Callable[[], Any], inputs: list[Tensor]) -> Contender:
        if not backward:
            return Contender(call, torch.no_grad)
        return Contender(lambda: torch.autograd.grad(call(), inputs, cotangent), torch.enable_grad)

    calls = {OWN: contender(ours, leaves)}
    if not job.flat:
        calls["torch"] = contender(lambda: member.peer(**given), leaves)
    if job.length <= _DENSE_TO:
        calls["dense"] = contender(dense, leaves[:3])
    errors = {} if job.flat else _errors(job, given, ours, backward)
    first = len(ceilings.bursts)
    times = measure(calls, seconds=seconds, rounds=rounds, after_round=ceilings.burst)
    peaks = [burst.gflops["float32"] for burst in ceilings.bursts[first:]]
    flops = member.flops(job.length)
    share = interval([flops / t / peak * 1e-9 for t, peak in zip(times[OWN], peaks, strict=True)])
    return {
        "workload": job.title, "member": job.member, "direction": job.direction, "length": job.length, "flat": job.flat,
        "ms": {name: asdict(interval(t).scaled(1e3)) for name, t in times.items()},
        "speedup": {name: asdict(ratio(times, name, OWN)) for name in times if name != OWN},
        "share": None if backward else asdict(share), "error": errors,
    }  # fmt: skip


def _errors(
    job: Job, given: dict[str, Tensor], ours: Callable[[], Tensor], backward: bool
) -> dict[str, float]:
    """Relative errors of results (and gradients) against torch's formulation in float64."""
    member = MEMBERS[job.member]
    wide = {name: t.detach().double().requires_grad_(backward) for name, t in given.items()}

    def results(o: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [o, *(torch.autograd.grad(o.sum(), leaves) if backward else ())]

    exact = [t.detach() for t in results(member.peer(**wide), list(wide.values()))]
    found = {}
    for name, o in ((OWN, ours()), ("torch", member.peer(**given))):
        mine = [t.detach() for t in results(o, list(given.values()))]
        found[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True))
    return found


def judge(document: Document) -> list[dict[str, Any]]:
    """Entries like those of `bars.judge`: ratios to torch, shares of the ceiling, and flatness over lengths."""
    entries = []

    def entry(
        workload: str, against: str, least: float | None, most: float | None, found: dict[str, Any] | None
    ) -> None:
        value = None if found is None else found["median"]
        met = value is not None and (least is None or value >= least) and (most is None or value <= most)
        entries.append({
            "workload": workload, "against": against, "least": least, "most": most, "stretch": None, "measured": found,
            "met": met, "stretch_met": None, "note": None if value is not None else "wrong, or not measured",
        })  # fmt: skip

    for r in document["runs"]:
        member = MEMBERS[r["member"]]
        if r["flat"]:
            continue
        right = all(error < _WRONG for error in r["error"].values())
        least = member.forward if r["direction"] == "fwd" else member.both
        entry(r["workload"], "torch", least, None, r["speedup"]["torch"] if right else None)
        if member.share is not None and r["share"] is not None:
            entry(r["workload"], "ceiling", member.share, None, r["share"] if right else None)
    for name in _OVER_LENGTHS:
        per_token = [r["ms"][OWN]["median"] / r["length"] for r in document["runs"]
                     if r["flat"] and r["member"] == name and r["length"] >= _LENGTH]  # fmt: skip
        if len(per_token) > 1:
            spread = [x / min(per_token) for x in per_token]
            found = Interval(max(spread), min(spread), max(spread), len(spread))
            entry(
                f"{name}, {_LENGTH} tokens and more",
                "time a token, most over least",
                None,
                1.15,
                asdict(found),
            )
    return entries


def plot(document: Document, paths: list[Path]) -> None:
    """Time a token against length, beside dense attention, into each of ``paths``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    with drawing(document, paths, (6, 3.6)) as figure:
        axes = figure.subplots()
        rows = [r for r in document["runs"] if r["flat"]]
        for name in _OVER_LENGTHS:
            mine = [r for r in rows if r["member"] == name]
            axes.plot(
                [r["length"] for r in mine],
                [1e3 * r["ms"][OWN]["median"] / r["length"] for r in mine],
                "o-",
                label=name,
            )
        dense = [r for r in rows if r["member"] == _OVER_LENGTHS[0] and "dense" in r["ms"]]
        axes.plot([r["length"] for r in dense], [1e3 * r["ms"]["dense"]["median"] / r["length"] for r in dense], "o--",
                  color="black", label="dense, causal")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"µs a token, {_HEADS} heads of {_DIM}")
        axes.grid(axis="y")
        axes.legend()
