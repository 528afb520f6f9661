"""The suite for GPUs without one: what runs on the device runs here, on a clock of the tests' own."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.bench import gpu, peers, records, runner
from attnkit.bench.measure import Contender
from attnkit.bench.rows import Row, select, suites
from attnkit.bench.workloads import Shape, Workload, make_inputs

TINY = Shape(1, 2, 2, 40, 40, 16, 16)


class Event:
    """What `torch.cuda.Event` is: where a stream was, in milliseconds."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter() * 1e3

    def elapsed_time(self, other: "Event") -> float:
        return max(other.at - self.at, 1e-6)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as the device."""
    for name, small in (("DEVICE", "cpu"), ("_FLUSH_BYTES", 64), ("_COPY_BYTES", 64)):
        monkeypatch.setattr(gpu, name, small)
    monkeypatch.setattr(gpu, "_SQUARE", dict.fromkeys(gpu._SQUARE, 8))
    nothing: Callable[..., Any] = lambda *args: None  # noqa: E731
    for name, other in (("Event", Event), ("synchronize", nothing), ("reset_peak_memory_stats", nothing),
                        ("memory_allocated", lambda: 100), ("max_memory_allocated", lambda: 160)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, other)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("direction", ["fwd", "fwdbwd", "decode"])
def test_a_row_from_end_to_end(direction: Any) -> None:
    """The document is one like others': checked outputs, interleaved rounds, shares of what the device can do."""
    place = replace(gpu.PLACE, own=peers.CPU)
    shape = TINY if direction != "decode" else Shape(1, 4, 2, 1, 70, 16, 16)
    workload = Workload("full" if direction == "decode" else "causal", shape, direction=direction)
    row = Row(workload, tuple(peer for peer in peers.FUSED if peer is not peers.FLEX_GPU))
    document = runner.run([row], rounds=4, place=place)
    assert records.problems(document) == []
    assert document["machine"]["gpu"] is None
    found = {r["backend"]: r for r in document["records"]}
    assert {"cpu"} < found.keys() | {"flash2"}
    assert found["cpu"]["time_ms"]["n"] == 4
    assert found["cpu"]["peak_bytes"] == 60
    assert found["cpu"]["roofline"]["interleaved"]["n"] == 4
    left_out = {s["backend"]: s["reason"] for s in document["skipped"]}
    assert "not installed" in left_out["flashinfer"]
    assert "cudnn" in left_out  # has no CPU kernel, and says so itself


@pytest.mark.usefixtures("device")
def test_rounds_are_interleaved_and_each_begins_with_another() -> None:
    order: list[str] = []
    contenders = {name: Contender(lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    times = gpu.measure(contenders, seconds=0.0, rounds=3)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert "".join(order[-6:]) == "abbaab"
    times = gpu.measure(contenders, seconds=0.0)
    assert len(times["a"]) == 3  # at least


@pytest.mark.usefixtures("device")
def test_rows_are_called_once_before_they_are_measured() -> None:
    calls: list[str] = []

    def prepare(inputs: Any) -> Any:
        calls.append(inputs.workload.direction)
        return peers.CPU.prepare(inputs)

    rows = [Row(Workload("causal", TINY, direction=direction)) for direction in ("fwd", "fwdbwd")]
    assert gpu.warm(rows, replace(peers.CPU, prepare=prepare)) == 2
    assert calls == ["fwd", "fwdbwd"]


def test_where_there_is_no_gpu_every_row_says_so() -> None:
    document = runner.run(suites["gpu"], place=gpu.PLACE)
    assert records.problems(document) == []
    assert document["records"] == []
    assert {s["backend"] for s in document["skipped"]} == {"triton"}
    assert len(document["skipped"]) == len(suites["gpu"])
    assert "GPU" in document["skipped"][0]["reason"]


def test_the_suite_is_in_order_of_importance() -> None:
    names = [row.name for row in suites["gpu"]]
    directions = [row.workload.direction for row in suites["gpu"]]
    assert directions == sorted(directions, key=["fwd", "fwdbwd", "decode"].index)
    assert names[0] == "causal b2 h16 s8192 d128 bfloat16"
    assert {row.workload.dtype for row in select("gpu")} == {"bfloat16"}


@pytest.mark.parametrize("variant", ["full", "causal"])
def test_torch_kernels_that_a_cpu_has_too(variant: str) -> None:
    inputs = make_inputs(Workload(variant, TINY))
    peer = next(peer for peer in peers.FUSED if peer.name == "flash2")
    call = peer.prepare(inputs)
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=variant == "causal"
    )
    torch.testing.assert_close(call.output(call.run()), want)


def test_heads_that_are_folded() -> None:
    inputs = make_inputs(Workload("full", Shape(2, 4, 2, 1, 30, 16, 16), direction="decode"))
    call = peers.FOLDED_GPU.prepare(inputs)
    want = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True)
    torch.testing.assert_close(call.output(call.run()), want)


@pytest.mark.parametrize(
    ("workload", "refused"),
    [
        (Workload("causal", TINY), set()),
        (Workload("causal", TINY, direction="fwdbwd"), {"flash_attn", "xformers", "flashinfer", "fla"}),
        (Workload("full", Shape(2, 4, 2, 1, 30, 16, 16), direction="decode"), {"fla"}),
        (Workload("causal", Shape(1, 2, 2, 4, 40, 16, 16)), {"cudnn", "flash2", "efficient", "flash_attn", "xformers", "flashinfer", "fla"}),
        (Workload("window", TINY), {"cudnn", "flash2", "efficient", "flash_attn", "xformers", "flashinfer", "fla"}),
    ],
)  # fmt: skip
def test_who_cannot_express_what(workload: Workload, refused: set[str]) -> None:
    assert {peer.name for peer in peers.FUSED if peer.refuses(workload)} == refused


# --- libraries that nobody has here: what they are given, as their documentation has it ---------------------


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Over ``[..., S, H, D]``, heads grouped or not."""
    k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], dim=-2) for t in (k, v))
    s = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("...hqk,...khd->...qhd", s.softmax(-1), v)


class Ragged:
    """FlashInfer's sequences one after the other."""

    def __init__(self, workspace: Tensor) -> None:
        assert workspace.dtype == torch.uint8

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, *,
             causal: bool, q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:  # fmt: skip
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.stretches = [
            [slice(*map(int, ends)) for ends in pairwise(starts)] for starts in (qo_indptr, kv_indptr)
        ]
        self.causal, self.dtypes = causal, (q_data_type, kv_data_type)
        self.heads = [(num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_qk)]

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q.dtype, k.dtype) == self.dtypes
        assert [t.shape[1:] for t in (q, k)] == self.heads
        each = zip(*self.stretches, strict=True)
        return torch.cat([eager(q[own], k[seen], v[seen], self.causal) for own, seen in each])


class Paged:
    """FlashInfer's caches in pages."""

    def __init__(self, workspace: Tensor, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
             head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.pages = [indices[slice(*map(int, ends))] for ends in pairwise(indptr)]
        self.last, self.page = last_page_len, (page_size, num_kv_heads, head_dim)
        self.q, self.dtypes = (len(last_page_len), num_qo_heads, head_dim), (q_data_type, kv_data_type)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        assert q.shape == self.q
        assert (q.dtype, cache[0].dtype) == self.dtypes
        assert all(t.shape[1:] == self.page for t in cache)
        found = []
        for one, pages, last in zip(q, self.pages, self.last, strict=True):
            tokens = len(pages) * self.page[0] - self.page[0] + int(last)
            k, v = (t[pages].flatten(0, 1)[:tokens] for t in cache)
            found.append(eager(one[None], k, v)[0])
        return torch.stack(found)


def grouped(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
    """xformers broadcasts nothing by itself; grouped heads have a dimension of their own."""
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    o = eager(*(t.flatten(2, -2) for t in (q, k, v)), causal=attn_bias is not None)
    return o.reshape(q.shape)


LIBRARIES: dict[str, dict[str, dict[str, Any]]] = {
    "flash_attn": {"flash_attn": {"flash_attn_func": eager}},
    "xformers": {"xformers": {}, "xformers.ops": {"LowerTriangularMask": object, "memory_efficient_attention": grouped}},
    "flashinfer": {"flashinfer": {"BatchPrefillWithRaggedKVCacheWrapper": Ragged, "BatchDecodeWithPagedKVCacheWrapper": Paged}},
    "fla": {"fla": {}, "fla.ops": {}, "fla.ops.attn": {"parallel_attn": partial(eager, causal=True)}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("workload", "wanted"),
    [
        (Workload("causal", Shape.of(2, 4, 40, 16)), set(LIBRARIES)),
        (Workload("full", Shape.of(2, 4, 40, 16)), {"flash_attn", "xformers", "flashinfer"}),
        (Workload("causal", Shape.of(2, 4, 40, 16, hkv=2)), set(LIBRARIES)),
        (Workload("full", Shape(3, 4, 2, 1, 48, 16, 16), direction="decode"), {"flash_attn", "xformers", "flashinfer"}),
        (Workload("full", Shape(2, 4, 4, 1, 30, 16, 16), direction="decode"), {"flash_attn", "xformers", "flashinfer"}),
    ],
)  # fmt: skip
def test_libraries_are_given_the_row(
    workload: Workload, wanted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(workload)
    want = eager(*(t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)), bool(workload.parameters))
    met = set()
    for peer in peers.FUSED:
        if peer.name not in LIBRARIES or peer.refuses(workload):
            continue
        for name, content in LIBRARIES[peer.name].items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        call = peer.prepare(inputs)
        torch.testing.assert_close(call.output(call.run()).transpose(1, 2), want)
        met.add(peer.name)
    assert met == wanted
