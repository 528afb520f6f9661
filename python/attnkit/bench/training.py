"""Suite training: a small language model trained on torch's attention and on attnkit's, and how far their losses part.

Three models learn in turn, step by step, from the same batches: on torch from one seed and from the next, and on attnkit
from the first. What two seeds differ by is noise; attnkit is to differ from torch by less. The text is the first book of
Newton's Opticks (see data/README.md), read as bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnkit
from attnkit.bench import machine
from attnkit.bench.measure import interval, ratio
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.runner import Progress, use_threads

TEXT = Path(__file__).parent / "data" / "opticks.txt"
DTYPES = ("float32", "bfloat16")
BYTES = 256
_DATA_SEED = 0  # of the batches: the same for every model, whatever its own seed
_LAST = 20  # steps at whose end the model has learnt what it has
_WARM_STEPS = 5  # left out of the times: the first ones pay for what is only done once

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The model, about a million parameters, and how it is trained."""

    steps: int = 300
    batch: int = 8
    context: int = 256
    width: int = 128
    heads: int = 2
    layers: int = 5
    learning_rate: float = 3e-3
    warmup: int = 30  # steps in which the learning rate rises to that
    slowest: float = (
        1e-3  # of the angles by which positions turn queries and keys, those of the last dimensions
    )


def on_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's own op."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def on_attnkit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by attnkit."""
    o = attnkit.attention(q, k, v, mask=attnkit.causal())
    assert isinstance(o, Tensor)  # lse was not asked for
    return o


class Attention(nn.Module):
    """Attention of rotated queries and keys. ``[B, S, W]`` to the same."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: Recipe, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = recipe.heads, attend
        self.qkv = nn.Linear(recipe.width, 3 * recipe.width, bias=False)
        self.merge = nn.Linear(recipe.width, recipe.width, bias=False)
        half = recipe.width // recipe.heads // 2
        angles = torch.arange(recipe.context)[:, None] * recipe.slowest ** (torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary positions: pairs of dimensions turned by an angle that grows with the position."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = self.attend(self._rotated(q), self._rotated(k), v)
        out: Tensor = self.merge(o.transpose(1, 2).reshape(batch, length, -1))
        return out


class _Block(nn.Module):
    """What mixes tokens, and a multilayer perceptron; each on normalised inputs, and added to them."""

    def __init__(self, recipe: Recipe, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        width = recipe.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixer = mixer()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        more: Tensor = self.mlp(self.norms[1](x))
        return x + more


class Model(nn.Module):
    """A decoder of bytes: ``[B, S]`` bytes (int64) to logits ``[B, S, 256]`` of the next ones.

    ``mixers``, one for each layer, make what mixes tokens: ``[B, S, W]`` to the same.
    """

    def __init__(self, recipe: Recipe, mixers: Sequence[Callable[[], nn.Module]]) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, recipe.width)
        self.blocks = nn.Sequential(*(_Block(recipe, mixer) for mixer in mixers))
        self.norm = nn.LayerNorm(recipe.width)
        self.out = nn.Linear(recipe.width, BYTES, bias=False)

    @classmethod
    def attending(cls, recipe: Recipe, attend: Attend) -> Model:
        """One of attention alone."""
        return cls(recipe, [lambda: Attention(recipe, attend)] * recipe.layers)

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.out(self.norm(self.blocks(self.bytes(ids))))
        return out


def learner(
    model: nn.Module, recipe: Recipe, precision: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[Tensor], float]:
    """What trains a model on a batch ``[B, S + 1]``, forwards in ``precision``, and gives its loss in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95))
    warming = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / recipe.warmup))

    def step(batch: Tensor) -> float:
        optimizer.zero_grad()
        with precision():
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        warming.step()
        return float(loss.detach())

    return step


@dataclass
class Run:
    """One model on its way: its losses and the seconds of its steps so far."""

    backend: str
    seed: int
    dtype: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kernel_runs: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.backend}, seed {self.seed}"

    def trainer(self, recipe: Recipe) -> Callable[[Tensor], None]:
        """Make the model; a function that trains it on one batch ``[B, S + 1]`` and notes what that gave."""
        torch.manual_seed(self.seed)
        model = Model.attending(recipe, on_attnkit if self.backend == "attnkit" else on_torch)
        learn = learner(model, recipe, self._precision)

        def step(batch: Tensor) -> None:
            before, start = attnkit.installed_report().kernel_runs, time.perf_counter()
            self.losses.append(learn(batch))
            self.seconds.append(time.perf_counter() - start)
            self.kernel_runs += attnkit.installed_report().kernel_runs - before

        return step

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast("cpu", getattr(torch, self.dtype))


def batches(recipe: Recipe, text: bytes) -> Iterator[Tensor]:
    """``[batch, context + 1]`` bytes from random places of the text, for every step; the same every time."""
    data = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    starts = np.random.default_rng(_DATA_SEED).integers(
        0, len(data) - recipe.context, (recipe.steps, recipe.batch)
    )
    for of_batch in starts.tolist():
        yield torch.stack([data[i : i + recipe.context + 1] for i in of_batch])


def held_out(recipe: Recipe, pieces: int) -> tuple[bytes, Tensor]:
    """Most of the text, to learn from, and pieces of its last tenth, evenly spread: bytes ``[pieces, context + 1]``."""
    text = TEXT.read_bytes()
    cut = len(text) * 9 // 10
    rest = torch.from_numpy(np.frombuffer(text, np.uint8)[cut:].astype(np.int64))
    starts = torch.linspace(0, len(rest) - recipe.context - 1, pieces).long().tolist()
    return text[:cut], torch.stack([rest[i : i + recipe.context + 1] for i in starts])


def train(
    recipe: Recipe, dtype: str, seed: int, on_step: Callable[[int], None] = lambda i: None
) -> tuple[Run, Run, Run]:
    """Train the three models in ``dtype`` (through autocast where it is not float32), interleaved step by step.

    Returns:
        On torch from ``seed``, on torch from ``seed + 1``, on attnkit from ``seed``.
    """
    runs = (Run("torch", seed, dtype), Run("torch", seed + 1, dtype), Run("attnkit", seed, dtype))
    with torch.enable_grad():
        trainers = [run.trainer(recipe) for run in runs]
        for i, batch in enumerate(batches(recipe, TEXT.read_bytes())):
            for j in range(len(runs)):
                trainers[(i + j) % len(runs)](batch)
            on_step(i + 1)
    return runs


def entropy_after_one(text: bytes) -> float:
    """Nats a byte that stay unknown to whoever knows the byte before alone: to a model that does not attend, in short."""
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    pairs = np.bincount(BYTES * data[:-1] + data[1:], minlength=BYTES * BYTES).reshape(BYTES, BYTES)
    ones = np.broadcast_to(pairs.sum(1, keepdims=True), pairs.shape)
    seen = pairs > 0
    return float(-(pairs[seen] * np.log(pairs[seen] / ones[seen])).sum() / pairs.sum())


def distances(ours: Sequence[float], torchs: Sequence[float]) -> list[float]:
    """How far two curves of losses are apart at each step."""
    return [abs(a - b) for a, b in zip(ours, torchs, strict=True)]


def judge(recipe: Recipe, runs: tuple[Run, Run, Run]) -> list[dict[str, Any]]:
    """Entries like those of `bars.judge`: attnkit's distance from torch against that of two seeds, and whose kernels ran.

    And whether attention is of use to the model at all: its last losses against those of a table of pairs of bytes.
    """
    first, second, ours = runs
    mine, noise = distances(ours.losses, first.losses), distances(second.losses, first.losses)
    last = float(np.mean(ours.losses[-_LAST:]))
    calls = 2 * recipe.layers * recipe.steps  # a forward and a backward each
    return [
        _bar(
            ours.dtype, "two seeds of torch: mean distance of losses", mine, noise, lambda x: sum(x) / len(x)
        ),
        _bar(ours.dtype, "two seeds of torch: greatest distance", mine, noise, max),
        _entry(
            ours.dtype,
            "the entropy of a byte after one: last losses",
            last / entropy_after_one(TEXT.read_bytes()),
            most=1.0,
        ),
        _entry(ours.dtype, "attnkit's kernels: share of the calls", ours.kernel_runs / calls, least=1.0),
    ]


def _bar(
    dtype: str, against: str, mine: list[float], noise: list[float], of: Callable[[list[float]], float]
) -> dict[str, Any]:
    measured = of(mine) / of(noise) if any(noise) else float(any(mine))
    return _entry(dtype, against, measured, most=1.0, note=f"{of(mine):.3g} of {of(noise):.3g}")


def _entry(
    dtype: str, against: str, measured: float, *, least: float | None = None, most: float | None = None,
    note: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "workload": f"training {dtype}",
        "against": against,
        "least": least,
        "most": most,
        "stretch": None,
        "measured": {"median": measured, "lo": measured, "hi": measured, "n": 1},
        "met": (least is None or measured >= least) and (most is None or measured <= most),
        "stretch_met": None,
        "note": note,
    }


def run(
    recipe: Recipe,
    *,
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Train in every dtype; the result file's content.

    ``runs`` holds each model's losses and seconds a step, ``bars`` the judgement, ``speedups`` torch's time for a step
    over attnkit's, from one seed, step by step.
    """
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "suite": "training",
        "how": "three models trained in turn, step by step, on the same batches",
        "machine": machine.describe(),
        "commit": machine.commit(),
        "text": TEXT.name,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in Model.attending(recipe, on_torch).parameters()),
        "records": [],
        "runs": [], "bars": [], "speedups": {}, "skipped": [],
    }  # fmt: skip
    with use_threads(threads) as used:
        document["threads"] = used
        for i, dtype in enumerate(dtypes):

            def on_step(done: int, i: int = i, dtype: str = dtype) -> None:
                progress(f"training {dtype}", (i + done / recipe.steps) / len(dtypes))

            runs = train(recipe, dtype, seed, on_step)
            document["runs"] += [_record(each) for each in runs]
            document["bars"] += judge(recipe, runs)
            times = {each.name: _warm(each) for each in runs}
            document["speedups"][dtype] = asdict(ratio(times, runs[0].name, runs[2].name))
    return document


def _warm(run: Run) -> list[float]:
    return run.seconds[min(_WARM_STEPS, len(run.seconds) - 1) :]


def _record(run: Run) -> dict[str, Any]:
    return {
        "backend": run.backend,
        "seed": run.seed,
        "dtype": run.dtype,
        "seconds_per_step": asdict(interval(_warm(run))),
        "kernel_runs": run.kernel_runs,
        "losses": run.losses,
    }


def plot(document: Document, paths: list[Path]) -> None:
    """The losses in each dtype, and below them the distances that `judge` compares, into each of ``paths``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    from attnkit.bench.report import drawing

    dtypes = list(dict.fromkeys(r["dtype"] for r in document["runs"]))
    with drawing(document, paths, (max(8.0, 4.5 * len(dtypes)), 5.4)) as figure:
        grid = figure.subplots(2, len(dtypes), sharex=True, sharey="row", squeeze=False)
        for (above, below), dtype in zip(grid.T, dtypes, strict=True):
            first, second, ours = (r for r in document["runs"] if r["dtype"] == dtype)
            for r, line in ((first, "-"), (second, "-"), (ours, "--")):
                above.plot(r["losses"], line, label=f"{r['backend']}, seed {r['seed']}", linewidth=1)
            for r, colour, label in (
                (second, "C1", "torch, two seeds"),
                (ours, "C2", "attnkit and torch, one seed"),
            ):
                apart = distances(r["losses"], first["losses"])
                below.plot(apart, color=colour, label=label, linewidth=1)
            below.set_yscale("log")
            above.set_title(dtype)
            below.set_xlabel("step")
            for axes in (above, below):
                axes.grid(axis="y")
                axes.legend()
        grid[0, 0].set_ylabel("loss, nats a byte")
        grid[1, 0].set_ylabel("distance of two losses")
