"""Suite models: architectures of transformers with random weights, attnkit beside the implementation users have now.

Prefill, a decoding step, and a training step (forward and backward) of each, in interleaved rounds. The rival is
``"sdpa"``; ``"eager"`` where transformers has nothing else for a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import attnkit
from attnkit.bench import machine
from attnkit.bench.architectures import Architecture, Size, architectures
from attnkit.bench.checks import is_wrong
from attnkit.bench.measure import Contender, interval, measure, ratio
from attnkit.bench.peers import installed_version
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.runner import Progress, use_threads
from attnkit.errors import AttnkitError

STAGES = ("prefill", "decode", "training")
SIZE = Size(
    hidden=512, layers=4, heads=8, kv_heads=2, encoder_heads=8, head_dim=64, mlp=1536, vocab=1024, positions=2048,
    window=256, image=224, patch=16,
)  # fmt: skip
SECONDS = 300.0  # what measuring takes if nobody says, beside making the models
OURS, OWN = "attnkit", "cpu"  # the implementation's name, and the backend's in `skipped`


@dataclass(frozen=True)
class Lengths:
    """How much goes into the models: tokens of a prompt, tokens decoded after it in one turn, and batches."""

    prompt: int = 1024
    decoded: int = 16
    training: tuple[int, int] = (2, 512)  # sequences, tokens in each
    images: int = 8


@dataclass(frozen=True)
class Plan:
    """In what size everything is measured."""

    size: Size = SIZE
    lengths: Lengths = Lengths()
    dtype: str = "float32"


@dataclass(frozen=True)
class Job:
    """One stage of one architecture."""

    name: str
    stage: str

    @property
    def title(self) -> str:
        """For people and for patterns."""
        return f"{self.name} {self.stage}"


def jobs(patterns: Sequence[str] = ()) -> list[Job]:
    """Every stage that an architecture has (only decoders decode), narrowed to titles that have a pattern in them."""
    found = [
        Job(name, stage)
        for name, each in architectures(SIZE).items()
        for stage in STAGES
        if stage != "decode" or "decoder" in each.kind
    ]
    return [j for j in found if not patterns or any(fnmatchcase(j.title, f"*{p}*") for p in patterns)]


def make_inputs(arch: Architecture, stage: str, plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model's forward takes, random and the same every time."""
    generator, size, lengths = torch.Generator().manual_seed(1), plan.size, plan.lengths
    rows, tokens = lengths.training if stage == "training" else (1, lengths.prompt)

    def ids(length: int) -> Tensor:
        return torch.randint(3, size.vocab, (rows, length), generator=generator)

    def pixels() -> dict[str, Tensor]:
        shape = (lengths.images, 3, size.image, size.image)
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}

    if arch.kind == "vision":
        return pixels()
    if arch.kind == "two towers":
        return {"input_ids": ids(tokens), **pixels()}
    if arch.kind == "encoder-decoder":
        return {"input_ids": ids(tokens), "decoder_input_ids": ids(tokens // 4)}
    return {"input_ids": ids(tokens)}


@dataclass(frozen=True)
class Stage:
    """A model at work: ``run`` is what is timed, in ``context``; ``outputs`` is what it computed, to be compared."""

    run: Callable[[], Any]
    outputs: Callable[[Any], Tensor]
    context: Callable[[], Any] = torch.no_grad


def prepare(model: Any, arch: Architecture, stage: str, inputs: dict[str, Tensor], decoded: int) -> Stage:
    """A stage of a model, ready to run."""
    if stage == "decode":
        return _decoding(model, arch, inputs, decoded)
    caches = {"use_cache": stage == "prefill"} if "decoder" in arch.kind else {}
    name = "logits_per_image" if arch.kind == "two towers" else "logits"

    def logits() -> Tensor:
        found: Tensor = model(**inputs, **caches)[name]
        return found

    if stage == "prefill":
        return Stage(logits, lambda found: found)
    leaves = list(model.parameters())

    def gradients() -> tuple[Tensor | None, ...]:
        found = logits().float().flatten(0, -2)
        loss = functional.cross_entropy(found, torch.arange(len(found)) % found.shape[1])
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    return Stage(gradients, lambda found: _flat(g for g in found if g is not None), torch.enable_grad)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _decoding(model: Any, arch: Architecture, inputs: dict[str, Tensor], decoded: int) -> Stage:
    """Token after token with what a prompt left in the cache; each turn starts with a copy of that."""
    more: dict[str, Any] = {}
    with torch.no_grad():
        prompt = model(**inputs, use_cache=True)
    given = "input_ids"
    if arch.kind == "encoder-decoder":
        outputs: Any = import_module("transformers.modeling_outputs")
        more = {
            "encoder_outputs": outputs.BaseModelOutput(last_hidden_state=prompt.encoder_last_hidden_state)
        }
        given = "decoder_input_ids"
    tokens = inputs["input_ids"][:, :decoded]
    caches: list[Any] = []

    @contextmanager
    def copied() -> Iterator[None]:
        caches[:] = [copy.deepcopy(prompt.past_key_values)]
        with torch.no_grad():
            yield

    def decode() -> list[Tensor]:
        (cache,) = caches
        return [
            model(**{given: tokens[:, i : i + 1]}, **more, past_key_values=cache, use_cache=True).logits
            for i in range(decoded)
        ]

    return Stage(decode, _flat, copied)


def run(
    chosen: Sequence[Job],
    plan: Plan = Plan(),
    *,
    threads: int | None = None,
    seconds: float = SECONDS,
    rounds: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Measure jobs; the result file's content.

    ``runs`` holds the times in milliseconds (of one token, for decoding) and the relative error to the rival's output,
    ``bars`` the ratios and their geometric means, ``skipped`` the models that attnkit refuses, with the reason.
    """
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "suite": "models",
        "machine": machine.describe(),
        "commit": machine.commit(),
        "transformers": installed_version("transformers"),
        "plan": asdict(plan),
        "records": [],
        "runs": [], "bars": [], "skipped": [],
    }  # fmt: skip
    with use_threads(threads) as used:
        document["threads"] = used
        for i, job in enumerate(chosen):
            progress(job.title, i / len(chosen))
            try:
                document["runs"].append(_measure(job, plan, seconds / len(chosen), rounds))
            except AttnkitError as exc:
                reason = f"attnkit refuses: {' '.join(str(exc).split())}"
                document["skipped"].append({"workload": job.title, "backend": OWN, "reason": reason})
    document["bars"] = judge(document)
    return document


def _measure(job: Job, plan: Plan, seconds: float, rounds: int | None) -> dict[str, Any]:
    arch, dtype = architectures(plan.size)[job.name], getattr(torch, plan.dtype)
    rival = "sdpa" if arch.sdpa else "eager"
    inputs = make_inputs(arch, job.stage, plan, dtype)
    stages, outputs = {}, {}
    before = attnkit.installed_report()
    for implementation in (rival, OURS):
        model = arch.make(implementation).to(dtype)
        stage = stages[implementation] = prepare(model, arch, job.stage, inputs, plan.lengths.decoded)
        with stage.context():
            outputs[implementation] = stage.outputs(stage.run()).double()
    after = attnkit.installed_report()
    times = measure(
        {n: Contender(s.run, s.context) for n, s in stages.items()}, seconds=seconds, rounds=rounds
    )
    units = 1e3 / (plan.lengths.decoded if job.stage == "decode" else 1)
    return {
        "workload": job.title,
        "model": job.name,
        "stage": job.stage,
        "dtype": plan.dtype,
        "baseline": rival,
        "baseline_ms": asdict(interval(times[rival]).scaled(units)),
        "attnkit_ms": asdict(interval(times[OURS]).scaled(units)),
        "speedup": asdict(ratio(times, rival, OURS)),
        "error": _error(outputs[OURS], outputs[rival]),
        "kernel_runs": after.kernel_runs - before.kernel_runs,
        "left_to_torch": sum(after.torch.values()) - sum(before.torch.values()),
    }


def _error(ours: Tensor, rivals: Tensor) -> dict[str, float | None]:
    """How far the output is from the rival's: as in a record, null where something is not finite."""
    apart = ours - rivals
    if not bool(torch.isfinite(apart).all()):
        return {"max_abs": None, "rel_fro": None}
    return {"max_abs": float(apart.abs().max()), "rel_fro": float(apart.norm() / rivals.norm())}


def judge(document: Document) -> list[dict[str, Any]]:
    """Entries like those of `bars.judge`: no stage of any model is slower, and the geometric means.

    A mean's interval is the mean of the ends of its models' intervals: wider than 95 %.
    """
    entries = [_entry(r["workload"], r["baseline"], r["speedup"], _fault(r)) for r in document["runs"]]
    right = [r for r in document["runs"] if _fault(r) is None]
    for stage in (*STAGES, "all stages"):
        of_stage = [r["speedup"] for r in right if stage in (r["stage"], "all stages")]
        if of_stage:
            ends = {
                end: exp(sum(log(s[end]) for s in of_stage) / len(of_stage)) for end in ("median", "lo", "hi")
            }
            entries.append(_entry(f"geometric mean, {stage}", "sdpa or eager", {**ends, "n": len(of_stage)}))
    entries += [_entry(s["workload"], "sdpa or eager", None, s["reason"]) for s in document["skipped"]]
    return entries


def _fault(r: dict[str, Any]) -> str | None:
    """Why a run's times mean nothing."""
    if is_wrong(r["error"], r["dtype"]):
        return f"differs from {r['baseline']} by {r['error']['rel_fro']}"
    return None if r["kernel_runs"] and not r["left_to_torch"] else "torch computed it"


def _entry(
    workload: str, against: str, measured: dict[str, Any] | None, note: str | None = None
) -> dict[str, Any]:
    return {
        "workload": workload, "against": against, "least": 1.0, "most": None, "stretch": None,
        "measured": None if note else measured,
        "met": measured is not None and note is None and measured["median"] >= 1.0, "stretch_met": None, "note": note,
    }  # fmt: skip


def plot(document: Document, paths: list[Path]) -> None:
    """Each model's ratios with their intervals, a panel for each stage, into each of ``paths``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    from attnkit.bench.report import drawing

    names = list(dict.fromkeys(r["model"] for r in document["runs"]))
    with drawing(document, paths, (10, 1.6 + 0.22 * len(names))) as figure:
        for axes, stage in zip(figure.subplots(1, len(STAGES), sharey=True), STAGES, strict=True):
            runs = [r for r in document["runs"] if r["stage"] == stage]
            s = [r["speedup"] for r in runs]
            middle = [x["median"] for x in s]
            spread = [[x["median"] - x["lo"] for x in s], [x["hi"] - x["median"] for x in s]]
            colours = ["C0" if r["baseline"] == "sdpa" else "C1" for r in runs]
            at = [names.index(r["model"]) for r in runs]
            axes.barh(at, [x - 1 for x in middle], left=1, color=colours, xerr=spread if s else None)
            axes.axvline(1.0, color="black", linewidth=1)
            axes.set_title(stage)
            axes.set_xlabel("times faster than sdpa (red: eager)")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
