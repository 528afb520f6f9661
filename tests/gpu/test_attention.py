"""Default kernels on a GPU against the float64 oracle and reference: correctness before anything is timed.

In the order of what matters most; `run.py` runs these files one by one and keeps what they said.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import backends, testing
from attnkit.backends.triton import admission, check
from attnkit.backends.triton.kernel import PHASES, Phase
from attnkit.plan.space import default_config
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv
from attnkit.testing.floats import rounded

DTYPES = ["bfloat16", "float16", "float32"]
SHAPES = {
    "square": Dims(2, 4, 2, 300, 300, 64, 64),
    "wide": Dims(1, 4, 4, 257, 300, 128, 128),
    "wider": Dims(1, 2, 1, 200, 130, 256, 256),
    "mla": Dims(1, 2, 2, 130, 200, 192, 128),
    "odd": Dims(1, 3, 1, 77, 129, 40, 72),
    "decode": Dims(2, 8, 2, 1, 3000, 128, 128),
}
Call = dict[str, Any]


def _captured(dims: Dims, rng: np.random.Generator) -> tuple[Any, list[Any]]:
    """Slopes of heads, and ids of documents for queries and keys."""
    slopes = rng.uniform(0.01, 0.5, dims.q_heads).astype(np.float32)
    return slopes, [np.sort(rng.integers(0, 3, n)).astype(np.int32) for n in (dims.q_len, dims.kv_len)]


def _mods(name: str, captured: tuple[Any, list[Any]], device: str = "cuda") -> tuple[Call, Call]:
    """The keywords of `ak.attention`, with what they capture on a device, and those of the oracle."""
    slopes, ids = captured
    on = {"slopes": torch.from_numpy(slopes).to(device), "ids": [torch.from_numpy(x).to(device) for x in ids]}
    table: dict[str, tuple[Call, Call]] = {
        "full": ({}, {}),
        "causal": ({"mask": ak.causal()}, {"mask": lambda p: p.kv_idx <= p.position}),
        "window": ({"mask": ak.window(40, 9)}, {"mask": lambda p: abs(2 * (p.kv_idx - p.position) + 31) <= 49}),
        "alibi": (
            {"score": ak.alibi(on["slopes"])}, {"score": lambda s, p: s - slopes[p.h] * abs(p.position - p.kv_idx)},
        ),
        "softcap": ({"score": ak.softcap(3.0)}, {"score": lambda s, p: 3 * np.tanh(s / 3)}),
        "document": (
            {"mask": ak.document(*on["ids"])}, {"mask": lambda p: ids[0][p.q_idx] == ids[1][p.kv_idx]},
        ),
        "sink": ({"normalizer": ak.softmax(on["slopes"])}, {"sink": slopes}),
    }  # fmt: skip
    return table[name]


MODS = ["full", "causal", "window", "alibi", "softcap", "document", "sink"]


@pytest.fixture
def compare(rng: np.random.Generator) -> Callable[..., None]:
    """Forward against the oracle, through both gates."""

    def run(name: str, dims: Dims, dtype: str, plant: bool = False) -> None:
        arrays = [rounded(x, dtype) for x in qkv("gaussian", rng, dims, dtype)]
        call, oracle = _mods(name, _captured(dims, rng))
        if plant:
            arrays[2][0, 0, -3:], arrays[1][0, 0, -2:] = np.nan, np.inf
        tensors = [torch.from_numpy(x).to(getattr(torch, dtype)).cuda() for x in arrays]
        o, lse = ak.attention(*tensors, return_lse=True, **call)
        expected = testing.attention(*arrays, dtype=dtype, **oracle)
        testing.check(o.float().cpu().numpy(), lse.cpu().numpy(), expected, kernel="triton", mostly_dead=True)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODS)
def test_forward(name: str, shape: str, dtype: str, compare: Callable[..., None]) -> None:
    compare(name, SHAPES[shape], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_reaches_those_who_see_it(dtype: str, compare: Callable[..., None]) -> None:
    compare("causal", SHAPES["square"], dtype, plant=True)
    compare("causal", SHAPES["wider"], dtype, plant=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "decode"])
@pytest.mark.parametrize("name", MODS)
def test_backward(name: str, shape: str, dtype: str, rng: np.random.Generator) -> None:
    """Gradients, as close to float64 as twice the naive computation in their dtype."""
    dims = SHAPES[shape]
    captured = _captured(dims, rng)
    arrays = qkv("gaussian", rng, dims, dtype)
    d_o = torch.from_numpy(rng.standard_normal((*arrays[0].shape[:3], dims.v_head_dim)))

    def gradients(device: str, kind: torch.dtype, backend: str) -> list[Any]:
        tensors = [torch.from_numpy(x).to(kind).to(device).requires_grad_() for x in arrays]
        o = ak.attention(*tensors, backend=backend, **_mods(name, captured, device)[0])
        o.backward(d_o.to(kind).to(device))
        return [t.grad.double().cpu() for t in tensors]

    want = gradients("cpu", torch.float64, "reference")
    got = gradients("cuda", getattr(torch, dtype), "auto")
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    for mine, other in zip(got, want, strict=True):
        assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_table_of_distances(dtype: str, rng: np.random.Generator) -> None:
    """Close to float64, and the same bits every time: programs add to it as they come."""
    dims = SHAPES["square"]
    arrays = qkv("gaussian", rng, dims, dtype)
    learned = rng.standard_normal((dims.q_heads, 41)).astype(np.float32)
    d_o = torch.from_numpy(rng.standard_normal((*arrays[0].shape[:3], dims.v_head_dim)))

    def gradient(device: str, kind: torch.dtype, backend: str) -> Any:
        q, k, v = (torch.from_numpy(x).to(kind).to(device) for x in arrays)
        table = torch.from_numpy(learned).to(device).requires_grad_()
        score = lambda s, b, h, i, j: s + table[h, torch.clamp(i - j, -20, 20) + 20]  # noqa: E731
        o = ak.attention(q, k, v, score=score, mask=ak.causal(), backend=backend)
        return torch.autograd.grad(o, table, d_o.to(kind).to(device))[0].cpu()

    got = [gradient("cuda", getattr(torch, dtype), "auto") for _ in range(3)]
    assert all(torch.equal(got[0], other) for other in got[1:])
    want = gradient("cpu", torch.float64, "reference")
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert (got[0] - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("codec", ["bf16", "f16", "f32", "int8", "fp8", "int4", "int2"])
def test_caches(codec: str, page_size: int | None, rng: np.random.Generator) -> None:
    """What is appended are the codes of the CPU; attention to them is that to what they mean."""
    dims = SHAPES["decode"]
    dtype = {"f16": "float16", "f32": "float32"}.get(codec, "bfloat16")
    q, k, v = (torch.from_numpy(rounded(x, dtype)) for x in qkv("gaussian", rng, dims, dtype))
    made = [
        ak.KVCache(2, 2, 128, max_len=4096, codec=codec, page_size=page_size, device=device)
        for device in ("cpu", "cuda")
    ]
    lens = torch.tensor([2990, 2000], dtype=torch.int32)
    for cache in made:
        device = cache.lengths.device
        for part in (slice(0, 2990), slice(2990, 2991)):
            new = [x[:, :, part].to(getattr(torch, dtype)).to(device) for x in (k, v)]
            cache.append(*new, lens=lens.to(device) if part.start == 0 else None)
    means = [x.float().cpu() for x in made[1].dequantize()]
    for mine, other in zip(means, made[0].dequantize(), strict=True):
        assert torch.equal(mine, other.float())
    if codec in ("int4", "int2"):  # which are decoded to elements of q's dtype
        means = [x.to(getattr(torch, dtype)).float() for x in means]
    for q_len in (1, 40):
        queries = q.expand(2, 8, q_len, 128)
        o, lse = ak.attention(
            queries.to(getattr(torch, dtype)).cuda(), made[1], mask=ak.causal(), return_lse=True
        )
        expected = testing.attention(
            queries.numpy(), *(x.numpy() for x in means), dtype=dtype, kv_lens=(lens + 1).numpy(),
            mask=lambda p: p.kv_idx <= p.position,
        )  # fmt: skip
        testing.check(o.float().cpu().numpy(), lse.cpu().numpy(), expected, kernel="triton")


CLASSES = [(name, 128) for name in check.PROGRAMS if name not in ("window", "bias")]  # as causal, as alibi
CLASSES += [("causal", 64), ("causal", 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), CLASSES)
@pytest.mark.parametrize("phase", PHASES)
def test_classes_of_kernels(name: str, phase: Phase, width: int, dtype: str) -> None:
    """What is asked of a config before it is used, of keys that are codes and of pages too: the default is admitted."""
    if phase == "backward" and name in check.FORWARD:
        return
    spec = KernelSpec(check.program(name), dtype, width, width, "cuda")
    config = default_config(backends.get("triton").space(spec))
    like = torch.empty(0, dtype=getattr(torch, dtype), device="cuda")
    assert admission.admitted(spec, config, phase, like) == config


def test_the_same_bits_every_time(rng: np.random.Generator) -> None:
    q, k, v = (
        torch.from_numpy(x).cuda().half().requires_grad_() for x in qkv("gaussian", rng, SHAPES["square"])
    )
    results = []
    for _ in range(3):
        o = ak.attention(q, k, v, mask=ak.causal())
        results.append([o, *torch.autograd.grad(o.sum(), (q, k, v))])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_dropout_draws_the_bits_of_the_cpu(rng: np.random.Generator) -> None:
    from attnkit.backends.reference.philox import kept

    q, k = (torch.zeros(1, 2, 130, 16).cuda() for _ in range(2))
    v = torch.eye(130)[None, None].expand(1, 2, 130, 130).cuda()
    text = (
        "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n"
        " o, lse = attend(q, k, v, dropout = 0.3) {\n normalizer = softmax\n }\n return o\n}\n"
    )
    seed = torch.tensor(1234567890123, device="cuda")
    o, _ = torch.ops.attnkit.attend(q, k, v, text, [], [], seed, False)
    assert torch.equal(
        o.cpu() != 0, torch.from_numpy(kept(1234567890123, 0, (2, 130, 130), 0.3).copy())[None]
    )


def test_a_graph_can_hold_it(rng: np.random.Generator) -> None:
    """No host waits for the device, so a CUDA graph can be captured and replayed on other values."""
    q, k, v = (torch.from_numpy(x).cuda().half() for x in qkv("gaussian", rng, SHAPES["square"]))
    ids = torch.zeros(300, dtype=torch.int32, device="cuda")
    call = lambda: ak.attention(q, k, v, mask=ak.document(ids) & ak.causal())  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    ids[150:] = 1
    q.normal_()
    graph.replay()
    assert torch.equal(o, call())


def test_the_drop_in(rng: np.random.Generator) -> None:
    q, k, v = (torch.from_numpy(x).cuda().half() for x in qkv("gaussian", rng, SHAPES["wide"]))
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with ak.installed():
        got = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert ak.installed_report().attnkit >= 1
    assert (got.float() - want).abs().max() < 5e-3
