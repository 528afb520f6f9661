"""Gradients of every weight of whole models on attnkit, against eager's in float64."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.reference.philox import kept
from attnkit.ops.seeds import draw

pytest.importorskip("transformers")
from transformers import AttentionInterface

import attnkit.integrations.transformers
from attnkit.bench.architectures import TINY, Architecture, architectures

pytestmark = pytest.mark.shows

ARCHITECTURES = architectures(TINY)
IGNORED = -100  # the target of padding, for cross entropy
EPSILON = torch.finfo(torch.float32).eps
CASES = [
    (name, lengths)
    for name, arch in ARCHITECTURES.items()
    for lengths in ((37, 37, 37), (37, 7, 20))
    if arch.kind != "vision" or lengths == (37, 37, 37)  # pictures have one size
]


def inputs_and_targets(
    arch: Architecture, tokens: Any, lengths: tuple[int, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """What goes into a model, and a target for every output that is no padding."""
    pixels = torch.randn(3, 3, TINY.image, TINY.image, generator=torch.Generator().manual_seed(2))
    if arch.kind == "vision":
        return {"pixel_values": pixels}, torch.arange(3)
    if arch.kind == "two towers":
        return {"pixel_values": pixels, **tokens(*lengths)}, torch.arange(len(lengths)) % 3
    batch = tokens(*lengths, left=arch.kind == "decoder")
    if arch.kind == "encoder-decoder":
        batch["decoder_input_ids"] = tokens(*[11] * len(lengths))["input_ids"]
        return batch, batch["decoder_input_ids"].flip(1)
    return batch, batch["input_ids"].flip(1).masked_fill(batch["attention_mask"] == 0, IGNORED)


def gradients(
    model: Callable[..., Any], weights: list[tuple[str, Tensor]], inputs: dict[str, Tensor], targets: Tensor
) -> dict[str, Tensor]:
    with torch.enable_grad():
        out = model(**inputs)
        logits = out["logits_per_image" if "logits_per_image" in out else "logits"]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED
        )
        found = torch.autograd.grad(loss, [w for _, w in weights], allow_unused=True)
    return {name: g for (name, _), g in zip(weights, found, strict=True) if g is not None}


@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_gradients_of_every_weight(
    name: str, lengths: tuple[int, ...], make: Any, exact: Any, tokens: Any
) -> None:
    """The error of all of them together is at most three times eager's own in float32, and of each one.

    One alone may be zero but for rounding, such as that of a bias of keys, which no softmax can see: a unit of rounding
    of the whole is let pass.
    """
    inputs, targets = inputs_and_targets(ARCHITECTURES[name], tokens, lengths)
    truth = exact(name)
    expected = gradients(truth, list(truth.parameters()), inputs, targets)
    eager, model = make(name, "eager"), make(name)
    eagers = gradients(eager, list(eager.named_parameters()), inputs, targets)
    before = ak.installed_report()
    ours = gradients(model, list(model.named_parameters()), inputs, targets)
    after = ak.installed_report()
    assert after.kernel_runs - before.kernel_runs == 2 * ARCHITECTURES[name].calls
    assert after.torch == before.torch
    assert ours.keys() == eagers.keys() == expected.keys()
    size = whole(expected)
    assert whole({w: ours[w] - g for w, g in expected.items()}) <= 3 * whole(
        {w: eagers[w] - g for w, g in expected.items()}
    )
    for weight, g in expected.items():
        apart, eagers_apart = (ours[weight] - g).norm(), (eagers[weight] - g).norm()
        assert apart <= 3 * eagers_apart + EPSILON * size, weight
    touched = [weight for weight, g in expected.items() if g.norm() > 1e-4 * size]
    assert len(touched) > len(expected) // 2  # of which a lost gradient would be noticed


def whole(found: dict[str, Tensor]) -> Tensor:
    """The norm of all weights' gradients together."""
    return torch.stack([g.norm().double() for g in found.values()]).norm()


@pytest.fixture
def _torch_is_deterministic() -> Iterator[None]:
    """Torch adds up the gradients of experts' biases with atomics, in any order, unless it is told not to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_torch_is_deterministic")
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2"])
def test_checkpointed_layers_and_repeats_give_the_same(name: str, make: Any, tokens: Any) -> None:
    inputs, targets = inputs_and_targets(ARCHITECTURES[name], tokens, (37, 7, 20))
    model = copy.deepcopy(make(name))
    weights = list(model.named_parameters())
    first = gradients(model, weights, inputs, targets)
    again = gradients(model, weights, inputs, targets)
    model.activation_checkpointing_enable()
    model.train()  # layers are recomputed in training alone
    runs = ak.installed_report().kernel_runs
    recomputed = gradients(model, weights, inputs, targets)
    assert ak.installed_report().kernel_runs - runs == 3 * ARCHITECTURES[name].calls
    for found in (again, recomputed):
        assert all(torch.equal(g, found[w]) for w, g in first.items())


def materialised(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
                 scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention as it is written down, with the weights that attnkit drops for the number it would draw."""
    group = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(group, 1).mT) * (
        query.shape[3] ** -0.5 if scaling is None else scaling
    )
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    if (seed := draw(dropout, query)) is not None:
        keep = [kept(int(seed), b, tuple(scores.shape[1:]), dropout) for b in range(scores.shape[0])]
        weights = weights * torch.from_numpy(np.stack(keep)) / (1 - dropout)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_that_drop_attention_weights(name: str, checkpointed: bool, make: Any, tokens: Any) -> None:
    """In training mode, against float64 with the same weights dropped."""
    batch = tokens(17, 17)
    found, runs = [], ak.installed_report().kernel_runs
    AttentionInterface.register("materialised", materialised)
    for implementation, dtype in (
        ("materialised", torch.float64),
        ("materialised", torch.float32),
        ("attnkit", torch.float32),
    ):
        model = copy.deepcopy(make(name)).to(dtype).train()
        model.set_attn_implementation(implementation)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for module in model.modules():
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.25
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.25
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        weights = list(model.named_parameters())
        found.append(gradients(model, weights, batch, batch["input_ids"].flip(1)))
    assert ak.installed_report().kernel_runs > runs
    expected, naive, ours = found
    assert whole({w: ours[w] - g for w, g in expected.items()}) <= 3 * whole(
        {w: naive[w] - g for w, g in expected.items()}
    )
    torch.manual_seed(1)
    other = gradients(model, weights, batch, batch["input_ids"].flip(1))
    assert whole({w: other[w] - g for w, g in expected.items()}) > 0.01 * whole(expected)
