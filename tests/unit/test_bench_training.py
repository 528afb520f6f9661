"""Suites training and models: they train, time and judge what they say; how fast is not tested."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.bench import models, records, report, training
from attnkit.bench.architectures import TINY, architectures
from attnkit.bench.training import Recipe, Run

SMALL = Recipe(steps=2, batch=2, context=32, width=32, heads=2, layers=2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two spinning threads crawl where another test worker wants the same cores."""
    torch.set_num_threads(1)


# --- training -----------------------------------------------------------------------------------------------


def test_text_is_long_english_and_ends_where_the_book_does() -> None:
    text = training.TEXT.read_bytes().decode("utf-8")
    assert 200_000 < len(text.encode()) < 400_000
    assert text.startswith("THE FIRST BOOK OF OPTICKS")
    assert text.count(" the ") > 2000
    assert "SECOND BOOK" not in text
    assert "ranscriber" not in text


def test_entropy_after_one_byte() -> None:
    assert training.entropy_after_one(b"abababa") == 0.0
    assert training.entropy_after_one(b"aababb" * 1000) == pytest.approx(
        np.log(3) - 2 / 3 * np.log(2), abs=1e-3
    )
    assert 2.2 < training.entropy_after_one(training.TEXT.read_bytes()) < 2.5


def test_recipe_is_the_promised_one() -> None:
    recipe = Recipe()
    size = sum(p.numel() for p in training.Model.attending(recipe, training.on_torch).parameters())
    assert (recipe.steps, recipe.context) == (300, 256)
    assert 0.9e6 < size < 1.2e6


def test_batches_are_the_same_every_time_and_come_from_the_text() -> None:
    text = training.TEXT.read_bytes()
    one, again = (torch.stack(list(training.batches(SMALL, text))) for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == (2, 2, 33)
    assert all(bytes(row.tolist()) in text for row in one.flatten(0, 1))
    assert not torch.equal(one[0], one[1])


def test_first_losses_and_gradients_are_the_float64_models() -> None:
    """Both attentions against the same model in float64, computed with masks and matrices alone."""

    def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(later, float("-inf")).softmax(-1) @ v

    torch.manual_seed(3)
    batch = next(training.batches(SMALL, training.TEXT.read_bytes()))
    model = training.Model.attending(SMALL, plainly)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    found = {}
    for name, attend, dtype in (
        ("exact", plainly, torch.float64), ("torch", training.on_torch, torch.float32), ("attnkit", training.on_attnkit, torch.float32),
    ):  # fmt: skip
        twin = copy.deepcopy(model).to(dtype)
        for block in twin.blocks:
            block.attend = attend
        loss = torch.nn.functional.cross_entropy(twin(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        found[name] = torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]).double()
    apart = {name: (x - found["exact"]).norm() for name, x in found.items()}
    assert apart["attnkit"] <= 3 * apart["torch"]
    assert apart["attnkit"] < 1e-5 * found["exact"].norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_two_steps_lose_the_same_on_torch_and_on_attnkit(dtype: str, tolerance: float) -> None:
    first, second, ours = training.train(SMALL, dtype, seed=0)
    assert ours.losses == pytest.approx(first.losses, abs=tolerance)
    assert first.losses[0] != second.losses[0]
    assert first.losses[1] != first.losses[0]
    assert ours.kernel_runs == 2 * SMALL.layers * SMALL.steps
    assert first.kernel_runs == 0


def test_document_is_judged_drawn_and_strict_json(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    document = training.run(SMALL, progress=lambda *what: seen.append(what))
    document = json.loads(records.dumps(document))
    assert [(r["backend"], r["seed"], r["dtype"]) for r in document["runs"]] == [
        (backend, seed, dtype)
        for dtype in training.DTYPES
        for backend, seed in (("torch", 0), ("torch", 1), ("attnkit", 0))
    ]
    assert all(len(r["losses"]) == 2 for r in document["runs"])
    assert [bar["met"] for bar in document["bars"]] == [
        True,
        True,
        False,
        True,
    ] * 2  # nothing is learnt in two steps
    assert seen[-1] == ("training bfloat16", 1.0)
    report.bars_table(document)
    training.plot(document, [tmp_path / "p.svg"])
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert "attnkit, seed 0" in svg
    assert "interleaved rounds" not in svg


def test_a_curve_that_strays_is_noticed() -> None:
    first, second = (Run("torch", i, "float32", [5.0 - 0.1 * i, 4.0], [1.0, 1.0]) for i in (0, 1))
    recipe = replace(SMALL, steps=2)
    for losses, runs, met in (
        ([5.0, 4.01], 8, [True, True, False, True]),
        ([5.0, 4.2], 8, [False, False, False, True]),
        ([5.0, 4.0], 7, [True, True, False, False]),
        ([1.0, 1.0], 8, [False, False, True, True]),
    ):
        ours = Run("attnkit", 0, "float32", losses, [1.0, 1.0], runs)
        assert [bar["met"] for bar in training.judge(recipe, (first, second, ours))] == met


# --- models -------------------------------------------------------------------------------------------------

PLAN = models.Plan(TINY, models.Lengths(prompt=20, decoded=3, training=(2, 12), images=2))


def test_every_architecture_has_its_stages() -> None:
    found = models.jobs()
    names = architectures(TINY)
    assert len(names) >= 12
    assert {j.name for j in found} == set(names)
    for name, arch in names.items():
        stages = [j.stage for j in found if j.name == name]
        assert stages == [s for s in models.STAGES if s != "decode" or "decoder" in arch.kind]
    assert [j.title for j in models.jobs(["llama dec", "vit"])] == [
        "llama decode",
        "vit prefill",
        "vit training",
    ]


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "t5", "clip"])
def test_stages_run_on_attnkit_and_agree(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    chosen = models.jobs([f"{name} "])
    document = json.loads(records.dumps(models.run(chosen, PLAN, rounds=1, seconds=0)))
    arch = architectures(TINY)[name]
    assert [r["workload"] for r in document["runs"]] == [j.title for j in chosen]
    for r in document["runs"]:
        assert r["error"]["rel_fro"] < 1e-4
        assert r["baseline"] == ("sdpa" if arch.sdpa else "eager")
        assert r["left_to_torch"] == 0
    means = [bar["workload"] for bar in document["bars"] if "mean" in bar["workload"]]
    assert means == [f"geometric mean, {s}" for s in (*dict.fromkeys(j.stage for j in chosen), "all stages")]
    report.bars_table(document)
    models.plot(document, [tmp_path / "p.svg"])
    assert name in (tmp_path / "p.svg").read_text(encoding="utf-8")


def entry(workload: str, median: float, **changes: Any) -> dict[str, Any]:
    speedup = {"median": median, "lo": median / 2, "hi": median * 2, "n": 3}
    return {
        "workload": workload, "stage": workload.split()[1], "baseline": "sdpa", "dtype": "float32", "speedup": speedup,
        "error": {"max_abs": 0.0, "rel_fro": 0.0}, "kernel_runs": 1, "left_to_torch": 0, **changes,
    }  # fmt: skip


def test_means_are_geometric_and_wrong_models_do_not_count() -> None:
    wrong = {"max_abs": 1.0, "rel_fro": 0.5}
    runs = [entry("a prefill", 4.0), entry("b prefill", 1.0), entry("c prefill", 9.0, error=wrong),
            entry("d decode", 0.25), entry("e decode", 9.0, left_to_torch=2)]  # fmt: skip
    skipped = [{"workload": "f prefill", "backend": "cpu", "reason": "attnkit refuses: AK504"}]
    bars = {bar["workload"]: bar for bar in models.judge({"runs": runs, "skipped": skipped})}
    measured = {name: bar["measured"] and bar["measured"]["median"] for name, bar in bars.items()}
    assert measured == {
        "a prefill": 4.0, "b prefill": 1.0, "c prefill": None, "d decode": 0.25, "e decode": None,
        "geometric mean, prefill": pytest.approx(2.0), "geometric mean, decode": pytest.approx(0.25),
        "geometric mean, all stages": pytest.approx(1.0), "f prefill": None,
    }  # fmt: skip
    assert [name for name, bar in bars.items() if not bar["met"]] == [
        "c prefill", "d decode", "e decode", "geometric mean, decode", "f prefill",
    ]  # fmt: skip
    assert "differs from sdpa" in bars["c prefill"]["note"]
