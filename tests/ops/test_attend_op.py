"""torch.ops.attnkit.attend as a citizen of torch: opcheck, fake tensors, compile, export, transforms, threads."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkit as ak
import attnkit.ops  # defines torch.ops.attnkit

attend = torch.ops.attnkit.attend.default
BATCH, HEADS, LENGTH, DIM = 2, 4, 11, 8


class Case(NamedTuple):
    """A program with what it takes. Packed programs have one batch entry."""

    text: str
    buffers: tuple[Tensor, ...] = ()
    params: tuple[float, ...] = ()
    batch: int = BATCH


def program(
    body: str = "",
    *,
    q: str = "bhsd",
    kv: str = "bhsd",
    buffers: str = "",
    params: str = "",
    scale: str = "default",
) -> str:
    return (
        f"attnkit 1\nprogram (q: {q}, k: {kv}, v: {kv}) buffers({buffers}) params({params}) {{\n"
        f"  o, lse = attend(q, k, v, scale = {scale}) {{\n{body}\n}}\n  return o, lse\n}}\n"
    )


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BIAS = torch.linspace(-2, 2, HEADS * LENGTH * LENGTH).sin().view(HEADS, LENGTH, LENGTH)
EVERYTHING = """
    t0 = b0[h, q_idx, kv_idx] + float(b1[q_idx] == b1[kv_idx])
    score = p0 * tanh((s + t0) / p0)
    mask = b2[b, kv_idx] | (kv_idx <= q_idx)
    normalizer = softmax(sink = b3)"""
CASES = {
    "plain": Case(program()),
    "scale": Case(program(scale="0.3")),
    "causal": Case(program("mask = kv_idx <= q_idx + (kv_len - q_len)")),
    "top left": Case(program("mask = kv_idx <= q_idx")),
    "score": Case(program("score = 20.0 * tanh(s / 20.0) - float(abs(q_idx - kv_idx))")),
    "buffers, a param and a sink": Case(
        program(EVERYTHING, buffers="b0: f32[3], b1: i64[1], b2: bool[2], b3: f32[1]", params="p0: f32"),
        (BIAS, torch.arange(LENGTH) // 3, torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3 == 0, torch.zeros(HEADS)),
        (5.0,),
    ),
    "strided buffer": Case(program("score = s + b0[h, kv_idx, q_idx]", buffers="b0: f32[3]"), (BIAS.mT,)),
    "padded": Case(program(kv="padded[b0]", buffers="b0: i32[1]"), (i32(3, LENGTH),)),
    "packed": Case(
        program("mask = kv_idx <= q_idx", q="packed[b0]", kv="packed[b0]", buffers="b0: i32[1]"), (i32(0, 4, 4, LENGTH),), batch=1
    ),
}  # fmt: skip
EXPRESSIBLE = ("plain", "scale", "causal", "top left")  # torch's own op can stand in for the missing backward


@pytest.fixture
def inputs(randn: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """q, k, v for a case; strided ones have every dimension out of order."""

    def make(case: Case, *, strided: bool = False, kv_heads: int = HEADS, v_dim: int = DIM) -> list[Tensor]:
        shapes = [
            (case.batch, HEADS, LENGTH, DIM),
            (case.batch, kv_heads, LENGTH, DIM),
            (case.batch, kv_heads, LENGTH, v_dim),
        ]
        if not strided:
            return [randn(*shape) for shape in shapes]
        return [randn(*shape[::-1], 2)[..., 0].permute(3, 2, 1, 0) for shape in shapes]  # fmt: skip

    return make


def arguments(case: Case, tensors: list[Tensor], need_lse: bool) -> tuple[Any, ...]:
    return (*tensors, case.text, list(case.buffers), list(case.params), None, need_lse)


# --- opcheck ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_lse", [False, True], ids=["o", "o, lse"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, need_lse: bool, inputs: Any) -> None:
    torch.library.opcheck(attend, arguments(CASES[name], inputs(CASES[name]), need_lse))


def test_opcheck_of_strided_grouped_and_uneven_tensors(inputs: Any) -> None:
    case = CASES["causal"]
    torch.library.opcheck(attend, arguments(case, inputs(case, strided=True, kv_heads=2, v_dim=5), True))


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_opcheck_with_gradients(name: str, inputs: Any) -> None:
    tensors = [t.requires_grad_() for t in inputs(CASES[name])]
    torch.library.opcheck(attend, arguments(CASES[name], tensors, False))


# --- fake tensors -----------------------------------------------------------------------------------------


def same_metadata(fake: Tensor, real: Tensor) -> None:
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert fake.stride() == real.stride()
    assert fake.device == real.device
    assert fake.storage_offset() == real.storage_offset()


@pytest.mark.parametrize("need_lse", [False, True], ids=["o", "o, lse"])
@pytest.mark.parametrize("form", ["contiguous", "strided", "grouped", "no query", "no key"])
def test_fake_tensors_are_like_real_ones(form: str, need_lse: bool, inputs: Any) -> None:
    case = CASES["causal"]
    tensors = inputs(case, strided=form == "strided", kv_heads=1 if form == "grouped" else HEADS, v_dim=5)
    if form == "no query":
        tensors[0] = tensors[0][:, :, :0]
    if form == "no key":
        tensors[1:] = [t[:, :, :0] for t in tensors[1:]]
    real = attend(*arguments(case, tensors, need_lse))
    with FakeTensorMode() as mode:
        fake = attend(*arguments(case, [mode.from_tensor(t) for t in tensors], need_lse))
    meta = attend(*arguments(case, [t.to("meta") for t in tensors], need_lse))
    for f, m, r in zip(fake, meta, real, strict=True):
        same_metadata(f, r)
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())
    assert real[1].numel() == (real[0].shape[:3].numel() if need_lse else 0)


def test_fake_tensors_are_checked_like_real_ones(inputs: Any) -> None:
    q, k, v = (t.to("meta") for t in inputs(CASES["plain"]))
    for wrong in ([q[0], k, v], [q, k.double(), v], [q, k[:, :3], v[:, :3]], [q, k[:1], v[:1]]):
        with pytest.raises(ak.AttnkitError):
            attend(*arguments(CASES["plain"], wrong, False))


# --- torch.compile ----------------------------------------------------------------------------------------

TABLE = torch.linspace(-1, 1, 128 * 128).view(128, 128)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
IDS = torch.arange(128, dtype=torch.int32) // 7
CAP = 20.0
PARAM = ak.param("cap", 8.0)


def alibi(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s - SLOPES[h] * (q_idx - kv_idx).abs()


def softcap(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return CAP * torch.tanh(s / CAP)


def relative(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s + TABLE[q_idx, kv_idx]


def document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return IDS[q_idx] == IDS[kv_idx]


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx - kv_idx < 9) & (kv_idx <= q_idx)


def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx < 5) | (kv_idx <= q_idx)


INVERTED = ~ak.window(3, 3) | document  # dynamo knows no `~` on objects: such masks are made outside


def defined_inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
    bound, slopes = 3.5, SLOPES * 2

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(kv_idx > q_idx, s - bound, s.clamp(max=bound)) * slopes[h]

    return ak.attention(q, k, v, score=score, mask=lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 != 1)


def returns_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o, lse = ak.attention(q, k, v, mask=ak.causal(), return_lse=True)
    return o * lse.unsqueeze(-1)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "plain": ak.attention,
    "alibi": lambda q, k, v: ak.attention(q, k, v, score=alibi),
    "softcap": lambda q, k, v: ak.attention(q, k, v, score=softcap),
    "relative bias": lambda q, k, v: ak.attention(q, k, v, score=relative),
    "documents": lambda q, k, v: ak.attention(q, k, v, mask=document),
    "window": lambda q, k, v: ak.attention(q, k, v, mask=window),
    "prefix": lambda q, k, v: ak.attention(q, k, v, mask=prefix),
    "param": lambda q, k, v: ak.attention(q, k, v, score=lambda s, *_: PARAM * torch.tanh(s / PARAM)),
    "defined inside": defined_inside,
    "o and lse": returns_both,
    "ready-made": lambda q, k, v: ak.attention(
        q, k, v, score=ak.alibi(SLOPES), mask=(ak.causal() & ak.window(7, None)) | ak.prefix(4)
    ),
    "inverted": lambda q, k, v: ak.attention(q, k, v, mask=INVERTED),
    "ak.bias": lambda q, k, v: ak.attention(q, k, v, score=ak.bias(TABLE), normalizer=ak.softmax(SLOPES)),
    "dense": lambda q, k, v: ak.dense_attention(
        q, k, v, causal=True, window=(9, None), softcap=20.0, alibi_slopes=SLOPES, sink=SLOPES, score=relative, mask=document
    ),
    "padded": lambda q, k, v: ak.dense_attention(q, k, v, kv_lens=i32(5, 7)),
    "ak sdpa": lambda q, k, v: ak.scaled_dot_product_attention(q, k, v, is_causal=True),
    "ak sdpa, mask": lambda q, k, v: ak.scaled_dot_product_attention(q, k, v, TABLE[None, : q.shape[2], : q.shape[2]]),
    "installed": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "installed, mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, IDS[: q.shape[2], None] > IDS[: q.shape[2]]),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_without_breaks_or_recompiles(name: str, dynamic: bool | None, qkv: Any) -> None:
    """Automatic: of static shapes at first, and once more where they change."""
    function = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), ak.installed():
        for most, length in ((1 if dynamic is None else 2, 23), (2, 31), (2, 97), (2, 64)):
            q, k, v = qkv(BATCH, HEADS, length, DIM)
            assert torch.equal(compiled(q, k, v), function(q, k, v))
            assert counter.frame_count <= most
        report = ak.installed_report()
    assert report.kernel_runs == 8
    assert not report.torch


def test_compiled_code_sees_what_changes(qkv: Any) -> None:
    q, k, v = qkv(length=23)
    slopes, table = SLOPES.clone(), {"cap": 3.0}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cap = table["cap"]
        return ak.attention(
            q, k, v, score=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap) * slopes[h]
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    seen: list[Tensor] = []

    def compare() -> None:
        result = compiled(q, k, v)
        assert torch.equal(result, function(q, k, v))
        assert not any(torch.equal(result, other) for other in seen)
        seen.append(result)

    with torch.no_grad():
        compare()
        slopes.mul_(3)
        compare()
        assert counter.frame_count == 1  # what a tensor holds is no part of the program
        for cap in (1.5, 0.5, 2.0):
            table["cap"] = cap
            compare()


def test_a_param_compiles_nothing_anew(qkv: Any) -> None:
    q, k, v = qkv(length=23)
    cap = ak.param("cap", 1.0)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.attention(q, k, v, score=lambda s, *_: cap * torch.tanh(s / cap))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    with torch.no_grad():
        for value in (1.0, 2.0, 0.5, 4.0, 3.0, 7.0, 1.5, 9.0, 11.0, 2.5):  # more than torch's limit of graphs
            cap.value = value
            torch.testing.assert_close(compiled(q, k, v), function(q, k, v), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


def test_compile_says_where_an_error_is(qkv: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: kv_idx if q_idx > 3 else q_idx)

    with pytest.raises(Exception, match="AK301"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(*qkv())


def test_compile_with_gradients(qkv: Any) -> None:
    def loss(attention: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
        fresh = [t.clone().requires_grad_() for t in tensors]
        attention(*fresh).square().sum().backward()
        return [t.grad for t in fresh if t.grad is not None]

    tensors = qkv()
    compiled = torch.compile(
        lambda q, k, v: ak.dense_attention(q, k, v, causal=True), backend="aot_eager", fullgraph=True
    )
    expected = loss(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tensors)
    for actual, wanted in zip(loss(compiled, tensors), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


class Block(nn.Module):
    """An attention layer of a small model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.register_buffer("slopes", SLOPES.clone())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        o = ak.dense_attention(q, k, v, causal=True, alibi_slopes=self.slopes)
        assert isinstance(o, Tensor)
        return o.transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_compile_with_inductor(randn: Any) -> None:
    torch.manual_seed(0)
    block = Block().eval()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (17, 30):
            x = randn(2, length, HEADS * DIM)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-6)


# --- export, transforms, modes ----------------------------------------------------------------------------

# torch about itself
LEAF_SPEC = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
SCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")


@LEAF_SPEC
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # entering a mode is one
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_functions(strict: bool, randn: Any) -> None:
    """Strict export traces with dynamo, the other runs the Python under modes of its own."""
    table, ids = randn(HEADS, 64), torch.arange(64) // 5

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                s = s + table[h, j] * 2 - (1 - i) / 7
                s += -abs(i - j)
                return torch.where(ids[i] == ids[j], s, s - 1)

            return ak.attention(
                q, q, q, score=score, mask=lambda b, h, i, j: (i >= j) & ~(j == 3) | (j % 4 > 1)
            )

    q = randn(1, HEADS, 17, 8)
    exported = torch.export.export(
        Attention(), (q,), dynamic_shapes={"q": {2: torch.export.Dim("S", max=64)}}, strict=strict
    )
    for x in (q, randn(1, HEADS, 29, 8)):
        assert torch.equal(exported.module()(x), Attention()(x))


@LEAF_SPEC
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # entering a mode is one
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_flag_that_depends_on_a_length(strict: bool, randn: Any) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            o = ak.scaled_dot_product_attention(q, q, q, is_causal=q.shape[2] > 1)
            return o + ak.dense_attention(q, q, q, causal=q.shape[2] > 1)  # type: ignore[operator]

    q = randn(1, HEADS, 17, 8)
    lengths = {"q": {2: torch.export.Dim("S", min=2, max=64)}}
    exported = torch.export.export(Attention(), (q,), dynamic_shapes=lengths, strict=strict)
    for x in (q, randn(1, HEADS, 29, 8)):
        assert torch.equal(exported.module()(x), Attention()(x))


@LEAF_SPEC
def test_export(randn: Any) -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), randn(2, 17, HEADS * DIM)
    with torch.no_grad():
        exported = torch.export.export(
            block, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
        )
        assert [n.target for n in exported.graph.nodes].count(attend) == 1
        for shape in ((2, 17), (3, 29)):
            x = randn(*shape, HEADS * DIM)
            assert torch.equal(exported.module()(x), block(x))
            assert torch.equal(exported.run_decompositions().module()(x), block(x))


@LEAF_SPEC
def test_export_of_installed_sdpa(qkv: Any) -> None:
    class Sdpa(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = qkv()
    with torch.no_grad():
        torchs = Sdpa()(q, k, v)
        with ak.installed():
            ours = Sdpa()(q, k, v)
            exported = torch.export.export(Sdpa(), (q, k, v)).run_decompositions().module()
            assert torch.equal(exported(q, k, v), ours)
            assert ak.installed_report().kernel_runs == 2
        assert torch.equal(
            exported(q, k, v), torchs
        )  # the program is torch's: who computes it, the process says


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_change_nothing(mode: Any, inputs: Any) -> None:
    case = CASES["causal"]
    tensors = inputs(case)
    expected = attend(*arguments(case, tensors, True))
    with mode():
        actual = attend(*arguments(case, [t.clone() for t in tensors], True))
    assert all(map(torch.equal, actual, expected))
    assert not any(t.requires_grad for t in actual)


def test_make_fx_records_the_op(inputs: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    case = CASES["causal"]
    tensors = inputs(case)
    graph = make_fx(lambda *t: attend(*arguments(case, list(t), True)), tracing_mode="symbolic")(*tensors)
    assert [n.target for n in graph.graph.nodes].count(attend) == 1
    assert all(map(torch.equal, graph(*tensors), attend(*arguments(case, tensors, True))))


@pytest.mark.parametrize("position", range(4), ids=["q", "k", "v", "buffer"])
def test_tensor_subclasses_go_through_the_dispatcher(position: int, inputs: Any) -> None:
    case = CASES["strided buffer"]
    tensors = [*inputs(case), *case.buffers]
    expected = attend(*arguments(case, tensors[:3], False))[0]
    tensors[position] = Wrapper(tensors[position])
    actual = attend(*tensors[:3], case.text, tensors[3:], [], None, False)[0]
    assert torch.equal(actual.inside if isinstance(actual, Wrapper) else actual, expected)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own: the kernel must never be given it."""

    inside: Tensor

    @staticmethod
    def __new__(cls: type["Wrapper"], inside: Tensor) -> "Wrapper":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype
        )
        made.inside = inside
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inside, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, cls, func(*args, **kwargs))


def test_views_that_torch_resolves_late(randn: Any) -> None:
    """A lazily negated tensor and a tensor of implicit zeros hold other values than their memory does."""
    q, k, v = (randn(1, 2, 9, 16) for _ in range(3))
    negated = torch.view_as_complex(randn(1, 2, 9, 16, 2)).conj().imag
    assert negated.is_neg()
    zeros = torch._efficientzerotensor((1, 2, 9, 16))
    for odd in (negated, zeros):
        plain = odd.resolve_neg() if odd is negated else torch.zeros(1, 2, 9, 16)
        for function in (ak.attention, ak.scaled_dot_product_attention):
            torch.testing.assert_close(function(odd, k, v), function(plain, k, v), rtol=0, atol=0)
            torch.testing.assert_close(function(q, odd, v), function(q, plain, v), rtol=0, atol=0)
            torch.testing.assert_close(function(q, k, odd), function(q, k, plain), rtol=0, atol=0)
        biased = [ak.attention(q, k, v, score=ak.bias(x[..., :9])) for x in (odd, plain)]
        assert torch.equal(*biased)


@SCRIPT
def test_forward_derivatives_are_never_dropped(qkv: Any) -> None:
    """Jacobian-vector products: right, or a typed error, but not silently without a tangent."""
    import torch.autograd.forward_ad as forward_ad

    q, k, v = qkv()
    for function in (ak.attention, ak.scaled_dot_product_attention):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError):
            function(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        with pytest.raises(NotImplementedError):
            torch.func.jvp(lambda q, f=function: f(q, k, v), (q,), (torch.ones_like(q),))


def test_functional_gradients_are_torchs(qkv: Any) -> None:
    q, k, v = qkv()
    gradients = [
        torch.func.grad(lambda q, f=f: f(q, k, v).square().sum())(q)
        for f in (ak.attention, F.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(*gradients)


def test_inside_transforms_of_other_tensors(qkv: Any) -> None:
    """A transform wraps every tensor in its reach, also those it asks nothing of: a wrapper has no memory to read."""
    q, k, v = qkv()

    def attention(**keywords: Any) -> Tensor:
        with torch.no_grad():
            o = ak.attention(q, k, v, **keywords)
        assert isinstance(o, Tensor)
        return o

    for keywords in ({}, {"mask": ak.causal(), "score": ak.softcap(3.0)}, {"score": ak.alibi(SLOPES)}):
        o = attention(**keywords)
        found = torch.func.grad(lambda w, kw=keywords: (attention(**kw) * w).sum())(torch.tensor(2.0))
        torch.testing.assert_close(found, o.sum())

    def weighted(q: Tensor, slopes: Tensor) -> Tensor:
        with torch.no_grad():
            o = ak.attention(q, k, v, score=ak.alibi(slopes))
        return (o * q).sum() * slopes[0]

    expected = ak.attention(q, k, v, score=ak.alibi(SLOPES)) * SLOPES[0]
    torch.testing.assert_close(torch.func.grad(weighted)(q, SLOPES), expected)
    assert torch.func.grad(weighted, argnums=1)(q, SLOPES).count_nonzero() == 1


def test_threads(inputs: Any) -> None:
    tensors = {name: inputs(case) for name, case in CASES.items()}
    expected = {name: attend(*arguments(CASES[name], t, True)) for name, t in tensors.items()}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            for name, t in tensors.items():
                if not all(map(torch.equal, attend(*arguments(CASES[name], t, True)), expected[name])):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
