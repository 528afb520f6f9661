"""Real models from transformers, unchanged, under `ak.installed`: the same results, all attention done by attnkit."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit.bench.minilm import PACKAGE, read_sentences

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.shows


def llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=211, n_embd=64, n_layer=3, n_head=4, n_positions=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def bert() -> Any:
    return transformers.BertConfig(
        vocab_size=211, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip


def vit() -> Any:
    return transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=40, patch_size=8,
        initializer_range=0.2, num_labels=17,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "LlamaForCausalLM"),
    "gpt2": (gpt2, "GPT2LMHeadModel"),
    "bert": (bert, "BertForMaskedLM"),
    "vit": (vit, "ViTForImageClassification"),
}
LAYERS = 3


@pytest.fixture(scope="module")
def model() -> Callable[[str], Any]:
    """``model(name)``: random weights, the same each time."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            torch.manual_seed(0)
            config, kind = MODELS[name]
            made[name] = getattr(transformers, kind)._from_config(config(), attn_implementation="sdpa").eval()
        return made[name]

    return make


@contextlib.contextmanager
def all_by_attnkit(calls: int | None = None) -> Iterator[None]:
    """Inside, every attention call is attnkit's: ``calls`` of them, at least one if not given."""
    with ak.installed():
        yield
        report = ak.installed_report()
    assert report.torch == {}
    assert report.attnkit == report.kernel_runs
    assert report.attnkit == calls if calls is not None else report.attnkit > 0


@pytest.fixture
def compare(judge: Callable[..., None]) -> Callable[..., None]:
    """``compare(model, inputs, live)``: logits on attnkit against torch's; ``live [B, S]`` picks what is no padding."""

    def run(model: nn.Module, inputs: dict[str, Tensor], live: Tensor | None = None) -> None:
        wide = copy.deepcopy(model).double()
        exact = wide(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).logits
        torchs = model(**inputs).logits
        with all_by_attnkit(LAYERS):
            ours = model(**inputs).logits
        judge(*(x if live is None else x[live] for x in (ours, torchs, exact)))

    return run


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_language_models(name: str, model: Any, tokens: Any, compare: Any) -> None:
    inputs = tokens(33, 33, 33)
    compare(model(name), inputs)
    compare(model(name), {"input_ids": inputs["input_ids"]})


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_16_bit_models(name: str, dtype: torch.dtype, how: str, model: Any, tokens: Any) -> None:
    """The drop-in's error against float64 is at most twice that of torch's op in the same dtype."""
    inputs = tokens(33, 20, left=True)
    live = inputs["attention_mask"].bool()
    one = copy.deepcopy(model(name))
    if how == "weights":
        one = one.to(dtype)

    def logits() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            return one(**inputs).logits[live].double()

    torchs = logits()
    with all_by_attnkit(LAYERS):
        ours = logits()
    exact = one.double()(**inputs).logits[live]
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm()
    assert 0 < (ours - exact).norm() <= 0.2 * exact.norm()


def test_vision_model(model: Any, compare: Any) -> None:
    compare(
        model("vit"), {"pixel_values": torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))}
    )


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padded_batches(name: str, left: bool, model: Any, tokens: Any, compare: Any) -> None:
    inputs = tokens(33, 7, 1, 20, left=left)
    compare(model(name), inputs, live=inputs["attention_mask"].bool())
    compare(model(name), inputs)  # padding too: what is computed there is torch's business, and ours to match


@pytest.mark.parametrize("lengths", [(17,), (17, 17), (17, 4, 9)], ids=["one", "batch", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_generation_token_for_token(
    name: str, lengths: tuple[int, ...], model: Any, tokens: Any
) -> None:
    inputs = tokens(*lengths, left=True)
    settings: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    torchs = model(name).generate(**inputs, **settings)
    with all_by_attnkit():
        ours = model(name).generate(**inputs, **settings)
    assert torch.equal(ours.sequences, torchs.sequences)
    assert ours.sequences.shape[1] > max(lengths) + 4
    assert len(ours.sequences.unique()) > 10  # not one token for ever
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(torchs.logits), rtol=1e-4, atol=1e-4)


def test_generation_with_static_cache(model: Any, tokens: Any) -> None:
    inputs = tokens(17, 4, left=True)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    torchs = model("llama").generate(**inputs, **settings)
    with all_by_attnkit():
        ours = model("llama").generate(**inputs, **settings)
    assert torch.equal(ours, torchs)


def test_compiled_model(model: Any, tokens: Any) -> None:
    inputs = tokens(33, 7)
    compiled = torch.compile(model("bert"), backend="aot_eager", fullgraph=True)
    torchs = model("bert")(**inputs).logits
    with ak.installed():
        ours = compiled(**inputs).logits
        again = compiled(**inputs).logits
        report = ak.installed_report()
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, again)
    assert (report.kernel_runs, report.torch) == (2 * LAYERS, {})


def test_training(model: Any, tokens: Any) -> None:
    """Gradients are attnkit's own; how near they are to float64 is test_model_gradients' matter."""
    twin = copy.deepcopy(model("llama")).train()
    inputs = tokens(17, 9)

    def gradients() -> list[Tensor]:
        twin.zero_grad()
        twin(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in twin.parameters()]

    with torch.enable_grad():
        expected = gradients()
        with ak.installed():
            actual = gradients()
            report = ak.installed_report()
    distance, size = (
        sum(float(t.double().square().sum()) for t in tensors) ** 0.5
        for tensors in ([a - b for a, b in zip(actual, expected, strict=True)], expected)
    )
    assert distance <= 1e-4 * size
    assert report.torch == {}


def test_minilm_embeds_sentences_as_torch_does() -> None:
    """A pretrained model on real sentences, in batches padded to their longest."""
    folder = pytest.importorskip(PACKAGE).MODEL_DIR
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    sentences = read_sentences()
    assert len(set(sentences)) >= 200

    def embed() -> Tensor:
        pooled = []
        for at in range(0, len(sentences), 32):
            batch = tokenizer(sentences[at : at + 32], padding=True, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            pooled.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(pooled).double()

    torchs = embed()
    with all_by_attnkit():
        ours = embed()
    assert torchs.shape == (len(sentences), 384)
    cosines = nn.functional.cosine_similarity(torchs, ours, dim=1)
    assert cosines.min() >= 0.999999
    others = nn.functional.cosine_similarity(torchs[:-1], torchs[1:], dim=1)
    assert others.max() < 0.9999  # the sentences are not all alike to the model
