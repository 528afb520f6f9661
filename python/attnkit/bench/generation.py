"""Suite generation: a Llama of random weights decodes on caches of codes, and a model that has learnt reads text on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import attnkit
from attnkit.bench import machine, training
from attnkit.bench.bars import verdict
from attnkit.bench.measure import Contender, Interval, interval, measure, ratio
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.report import drawing
from attnkit.bench.rows import Bar
from attnkit.bench.runner import Progress, use_threads

SDPA = "sdpa"
CODECS = ("bf16", "int8", "int4", "int2")
_PIECES = 16  # of the text that the model did not learn


@dataclass(frozen=True)
class Plan:
    """The Llama, in bfloat16: heads as those of Llama 3 8B, the rest narrow, so that the cache is half of what a step reads."""

    hidden: int = 1024
    mlp: int = 2816
    layers: int = 2
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 1024
    prompt: int = 8192
    decoded: int = 16  # tokens in a turn, which are taken back
    recipe: training.Recipe = field(default_factory=training.Recipe)


SMALL = Plan(64, 96, 2, 4, 2, 32, 128, 160, 4, training.Recipe(steps=2, batch=2, context=64))  # for tests


# --- decoding -----------------------------------------------------------------------------------------------


def _llama(plan: Plan, implementation: str) -> Any:
    transformers: Any = import_module("transformers")
    import_module("attnkit.integrations.transformers")  # registers "attnkit"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=plan.vocab, hidden_size=plan.hidden, intermediate_size=plan.mlp, num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads, num_key_value_heads=plan.kv_heads, head_dim=plan.head_dim,
        max_position_embeddings=plan.prompt + plan.decoded,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    return model.to(torch.bfloat16).eval()


def _decoder(model: Any, cache: Any, plan: Plan) -> Callable[[], None]:
    """A turn of greedy decoding behind a prompt, after which the cache is as it was."""
    ids = torch.randint(3, plan.vocab, (1, plan.prompt), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def turn() -> None:
        token = first
        for _ in range(plan.decoded):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        cache.crop(-plan.decoded)

    return turn


def _decoding(plan: Plan, seconds: float, rounds: int | None) -> Iterator[tuple[dict[str, Any], Interval]]:
    """What is noted of each cache, and how many times more tokens it gives a second than transformers' own beside sdpa."""
    from attnkit.integrations.transformers_cache import QuantizedCache

    ours, theirs = _llama(plan, "attnkit"), _llama(plan, SDPA)
    cache = import_module("transformers").DynamicCache(config=theirs.config)
    turns = {SDPA: Contender(_decoder(theirs, cache, plan), torch.no_grad)}
    held = {SDPA: sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))}
    for codec in CODECS:
        cache = QuantizedCache(ours.config, codec)
        turns[codec] = Contender(_decoder(ours, cache, plan), torch.no_grad)
        held[codec] = cache.nbytes
    times = measure(turns, seconds=seconds, rounds=rounds)
    for name in turns:
        per_second = interval([plan.decoded / t for t in times[name]])
        yield (
            {"cache": name, "tokens_per_s": asdict(per_second), "bytes": held[name]},
            ratio(times, SDPA, name),
        )


# --- what codes cost ----------------------------------------------------------------------------------------


def _token_by_token(codec: str, residual: int) -> training.Attend:
    """Causal attention as a decoder computes it: each token is appended to a cache, which its query then reads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, dim = k.shape
        cache = attnkit.KVCache(batch, heads, dim, max_len=length, codec=codec, residual=residual)
        queries = q.bfloat16() if codec == "bf16" else q  # plain elements are read by queries of their dtype
        rows = []
        for i in range(length):
            cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            rows.append(attnkit.attention(queries[:, :, i : i + 1], cache))
        return torch.cat(rows, dim=2).to(q.dtype)  # type: ignore[arg-type]

    return attend


def _learnt(plan: Plan, on_step: Callable[[int], None]) -> tuple[training.Model, Tensor]:
    """The model of suite training after its steps on most of the text, and pieces of the rest: bytes ``[n, context + 1]``."""
    text, pieces = training.held_out(plan.recipe, _PIECES)
    torch.manual_seed(0)
    model = training.Model.attending(plan.recipe, training.on_attnkit)
    learn = training.learner(model, plan.recipe)
    with torch.enable_grad():
        for i, batch in enumerate(training.batches(plan.recipe, text)):
            learn(batch)
            on_step(i + 1)
    return model, pieces


def _perplexity(model: training.Model, pieces: Tensor, attend: training.Attend) -> float:
    for part in model.modules():
        if isinstance(part, training.Attention):
            part.attend = attend
    with torch.no_grad():
        logits = model(pieces[:, :-1])
    return exp(float(functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())))


# --- the document -------------------------------------------------------------------------------------------


def run(
    plan: Plan | None = None,
    *,
    threads: int | None = None,
    seconds: float = 60.0,
    rounds: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Measure both; the result file's content.

    ``runs`` holds tokens a second and bytes of each cache, and the perplexity a byte by codec and residual. Nothing is promised of
    either: ``bars`` are ratios to look at.
    """
    plan = plan or Plan()
    document: Document = {
        "schema_version": SCHEMA_VERSION, "suite": "generation", "machine": machine.describe(),
        "commit": machine.commit(), "plan": asdict(plan), "records": [], "runs": [], "bars": [], "skipped": [],
    }  # fmt: skip
    with use_threads(threads) as used:
        document["threads"] = used
        progress("decoding", 0.0)
        for found, faster in _decoding(plan, seconds, rounds):
            document["runs"].append(found)
            if found["cache"] != SDPA:
                document["bars"].append(verdict(f"decoding on {found['cache']}", Bar(SDPA), faster))
        steps = plan.recipe.steps
        model, pieces = _learnt(plan, lambda done: progress("training", 0.3 + 0.4 * done / steps))
        exact = _perplexity(model, pieces, training.on_attnkit)
        document["runs"].append({"codec": "none", "residual": None, "perplexity": exact})
        cases = [("bf16", 128), ("int8", 128), *((codec, n) for codec in ("int4", "int2") for n in (128, 0))]
        for i, (codec, residual) in enumerate(cases):
            progress(f"perplexity {codec}", 0.7 + 0.3 * i / len(cases))
            perplexity = _perplexity(model, pieces, _token_by_token(codec, residual))
            document["runs"].append({"codec": codec, "residual": residual, "perplexity": perplexity})
            ratio_of = perplexity / exact
            worse = Interval(ratio_of, ratio_of, ratio_of, 1)
            title = f"perplexity on {codec}" + f", residual {residual}" * (codec in ("int4", "int2"))
            document["bars"].append(verdict(title, Bar("no cache"), worse))
    return document


def plot(document: Document, paths: list[Path]) -> None:
    """Tokens a second by cache, and perplexity by codec, into each of ``paths``.

    Raises:
        OSError, ValueError: as `report.drawing`.
    """
    with drawing(document, paths, (8, 2.8)) as figure:
        left, right = figure.subplots(1, 2)
        speeds = [r for r in document["runs"] if "cache" in r]
        left.barh([r["cache"] for r in speeds], [r["tokens_per_s"]["median"] for r in speeds])
        left.set_xlabel("tokens a second")
        costs = [r for r in document["runs"] if "codec" in r]
        names = [
            r["codec"] + ("" if r["residual"] is None else f", {r['residual']} newest exact") for r in costs
        ]
        right.barh(names, [r["perplexity"] for r in costs])
        right.set_xlabel("perplexity a byte")
        for axes in (left, right):
            axes.invert_yaxis()
