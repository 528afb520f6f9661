"""Quantised KV caches: the codecs by hand, what they promise, the cache step by step, and attention over them."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit import testing
from attnkit.backends import reference
from attnkit.backends.reference import gradients, run
from attnkit.ir.program import Codec
from attnkit.ir.text import parse
from attnkit.variants import dense, kv_quant
from attnkit.variants.kv_quant import BITS, FP8, INT8, KIVI2, KIVI4, decode, has_zero, quantise

pytestmark = pytest.mark.shows

ASYMMETRIC = [
    Codec(f"int{bits}", axis, group)
    for bits in (2, 4)
    for axis, group in (("token", 3), ("token", 0), ("channel", 8))
]
SYMMETRIC = [INT8, Codec("int8", "token", 4), Codec("int8", "channel", 4)]


def tokens(rng: np.random.Generator, tokens: int = 11, channels: int = 11) -> Any:
    """Channels of very different size and offset, as keys have them; groups of 3 and 8 leave no group of one."""
    x = rng.standard_normal((2, 2, tokens, channels))
    return x * np.exp(2 * rng.standard_normal(channels)) + 5 * rng.standard_normal(channels)


def per_element(encoded: Any, codec: Codec) -> tuple[Any, Any]:
    """Scale and zero of every element."""
    one = 0x38 if codec.name == "fp8" else 1
    ones = encoded._replace(codes=np.full_like(encoded.codes, one), zero=None)
    zero = encoded._replace(codes=np.zeros_like(encoded.codes))
    return decode(ones, codec), decode(zero, codec)


# --- numbers ----------------------------------------------------------------------------------------------


def test_a_group_by_hand() -> None:
    """[0, 1, 2.2, 3] in two bits: zero 0, scale 1, codes 0 1 2 3, the byte 0xE4."""
    x = np.array([0, 1, 2.2, 3]).reshape(1, 1, 4, 1)
    encoded = quantise(x, Codec("int2", "channel", 4))
    assert encoded.codes.ravel().tolist() == [0, 1, 2, 3]
    assert (encoded.scale.item(), encoded.zero.item()) == (1, 0)  # type: ignore[union-attr]
    assert kv_quant.pack(encoded.codes, 2, axis=2).ravel().tolist() == [0xE4]


def test_ties_by_hand() -> None:
    """Halves: int8 goes away from zero, int4 to even."""
    x = np.array([127, 0.5, 1.5, -0.5, -2.5]).reshape(1, 1, 1, 5)
    y = np.array([0, 15, 0.5, 1.5, 2.5]).reshape(1, 1, 1, 5)
    for codes in (quantise(x, INT8).codes, reference.encode(x, INT8).codes):
        assert codes.ravel().tolist() == [127, 1, 2, -1, -3]
    int4 = Codec("int4", "token", 0)
    for codes in (quantise(y, int4).codes, reference.encode(y, int4).codes):
        assert codes.ravel().tolist() == [0, 15, 0, 2, 2]


def test_bfloat16_is_torchs(rng: np.random.Generator) -> None:
    x = (rng.standard_normal(4000) * np.exp2(rng.integers(-130, 120, 4000))).astype(np.float32)
    x = np.concatenate([x, [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf]]).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().double().numpy()
    np.testing.assert_array_equal(kv_quant.to_bfloat16(x), expected)
    finite = x[np.isfinite(x)].astype(np.float64)
    down = np.array([kv_quant.rounded_down_to_bfloat16(one) for one in finite])
    np.testing.assert_array_equal(down, kv_quant.to_bfloat16(down))
    assert (down <= finite).all()
    nearest = kv_quant.to_bfloat16(finite)
    np.testing.assert_array_equal(down[nearest <= finite], nearest[nearest <= finite])


def test_e4m3_is_torchs(rng: np.random.Generator) -> None:
    """Every byte means what torch means by it; rounding agrees, ties too; torch does not saturate, we do."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    means = bytes_.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(kv_quant.E4M3, means)
    values = np.sort(means[:127])
    x = np.concatenate(
        [rng.standard_normal(2000) * 100, rng.standard_normal(2000) / 100, (values[1:] + values[:-1]) / 2]
    )
    x = np.concatenate([x, -x, [0.0, -0.0, np.nan]])
    x = np.where(abs(x) > 448, 0, x).astype(np.float32)
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(kv_quant.e4m3_bytes(x), expected)
    far = kv_quant.e4m3_bytes(np.array([449.0, 1e30, np.inf, -464.0, -np.inf]))
    np.testing.assert_array_equal(kv_quant.E4M3[far], [448, 448, 448, -448, -448])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [2, 3])
def test_packing_is_little_endian(rng: np.random.Generator, bits: int, axis: int) -> None:
    """Element e is at bits ``bits * (e % (32 / bits))`` of 32-bit words; unpacking gives the codes back."""
    codes = rng.integers(0, 2**bits, (1, 2, 32, 16)).astype(np.uint8)
    packed = kv_quant.pack(codes, bits, axis)
    np.testing.assert_array_equal(kv_quant.unpack(packed, bits, axis, codes.shape[axis]), codes)
    line = np.moveaxis(packed, axis, -1)[0, 1, 3].tobytes()
    words = np.frombuffer(line, "<u4")
    fields = [int(words[e * bits // 32]) >> e * bits % 32 & 2**bits - 1 for e in range(codes.shape[axis])]
    assert fields == np.moveaxis(codes, axis, -1)[0, 1, 3].tolist()
    odd = codes[:, :, :5, :7]
    np.testing.assert_array_equal(
        kv_quant.unpack(kv_quant.pack(odd, bits, axis), bits, axis, odd.shape[axis]), odd
    )


def test_bits_per_element() -> None:
    """What api.md says a cache holds, at D = 128 and groups of 32."""
    assert kv_quant.bits_per_element(INT8, 1000, 128) == 8.125
    assert [kv_quant.bits_per_element(codec, 32, 128) for codec in (*KIVI4, *KIVI2)] == [5, 5, 3, 3]


# --- what a codec promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*ASYMMETRIC, *SYMMETRIC], ids=kv_quant.written)
def test_within_half_a_scale(rng: np.random.Generator, codec: Codec) -> None:
    """Also where the offset is large: zeros are rounded down, so nothing is out of reach."""
    for offset in (0.0, 100.0, -1000.0):
        x = tokens(rng) + offset
        encoded = quantise(x, codec)
        scale, zero = per_element(encoded, codec)
        assert (abs(x - decode(encoded, codec)) <= scale / 2 * (1 + 1e-12)).all()
        assert (scale > 0).all()
        np.testing.assert_array_equal(kv_quant.to_bfloat16(scale), scale)
        np.testing.assert_array_equal(kv_quant.to_bfloat16(zero), zero)
        assert encoded.codes.max() <= (2 ** BITS[codec.name] - 1 if has_zero(codec) else 127)


@pytest.mark.parametrize("codec", [*ASYMMETRIC, *SYMMETRIC], ids=kv_quant.written)
def test_constant_groups(codec: Codec) -> None:
    """Code 0 and scale 0, no 0 / 0; the constant comes back, to bfloat16. int8 has no zero point: zeros alone."""
    constants = [0.0, 1.5, -3.0, 0.1] if has_zero(codec) else [0.0]
    for constant in constants:
        encoded = quantise(np.full((1, 1, 5, 6), constant), codec)
        assert not encoded.codes.any()
        assert not encoded.scale.any()
        np.testing.assert_allclose(decode(encoded, codec), constant, rtol=2**-7)
    if has_zero(codec):
        np.testing.assert_array_equal(decode(quantise(np.full((1, 1, 5, 6), 1.5), codec), codec), 1.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", [*KIVI4, INT8], ids=kv_quant.written)
def test_what_is_not_finite_destroys_its_block_alone(
    rng: np.random.Generator, codec: Codec, bad: float
) -> None:
    x = rng.standard_normal((1, 2, 70, 40))
    clean = decode(quantise(x, codec), codec)
    x[0, 1, 33, 35] = bad
    got = decode(quantise(x, codec), codec)
    rows, columns = kv_quant.block(codec, 70, 40)
    i, j = 33 // rows * rows, 35 // columns * columns
    hit = np.zeros(x.shape, bool)
    hit[0, 1, i : i + rows, j : j + columns] = True
    assert np.isnan(got[hit]).all()
    np.testing.assert_array_equal(got[~hit], clean[~hit])


def test_fp8_saturates_and_takes_its_scale_as_given(rng: np.random.Generator) -> None:
    x = tokens(rng) * 100
    plain = decode(quantise(x, FP8), FP8)
    assert abs(plain).max() == 448 < abs(x).max()
    scale = abs(x).max(axis=(0, 2, 3)) / 448  # per head
    calibrated = decode(quantise(x, FP8, scale), FP8)
    large = abs(x) > scale[:, None, None] * 2.0**-6  # normal numbers: 3 bits and the hidden one
    assert (abs(calibrated - x)[large] <= 2.0**-4 * abs(x)[large]).all()


# --- the cache, step by step ------------------------------------------------------------------------------


@pytest.mark.parametrize("codecs", [KIVI4, KIVI2], ids=["int4", "int2"])
def test_one_by_one_is_bulk(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """Appending tokens singly, in uneven chunks, or all at once gives the same codes, and the split that is promised."""
    residual, group = 40, 32
    k, v = rng.standard_normal((2, 1, 2, 170, 40))
    bulk = kv_quant.Cache(codecs, residual, group)
    bulk.append(k, v)
    quantised = kv_quant.quantised_length(170, residual, group)
    assert quantised == 128
    for chunks in ([1] * 170, [7, 100, 3, 60]):
        cache = kv_quant.Cache(codecs, residual, group)
        for start, size in zip(np.cumsum([0, *chunks[:-1]]), chunks, strict=True):
            cache.append(k[:, :, start : start + size], v[:, :, start : start + size])
            held = cache.residual[0].shape[2]  # type: ignore[index]
            assert held == start + size - kv_quant.quantised_length(start + size, residual, group)
            assert held < residual + group
            assert held >= min(residual, start + size)
        for got, want, x, codec in zip(cache.encoded(), bulk.encoded(), (k, v), codecs, strict=True):
            for a, b, c in zip(got, want, quantise(x[:, :, :quantised], codec), strict=True):
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a, c)
        for a, b, x in zip(cache.residual, bulk.residual, (k, v), strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, x[:, :, quantised:])


def test_rolling_back_is_exact(rng: np.random.Generator) -> None:
    """Up to R tokens may be taken back; what is appended in their place leaves no trace of them."""
    k, v = rng.standard_normal((2, 1, 1, 120, 32))
    draft = rng.standard_normal((2, 1, 1, 40, 32))
    cache, straight = (kv_quant.Cache(KIVI2, 40, 32) for _ in range(2))
    cache.append(k[:, :, :90], v[:, :, :90])
    cache.append(*draft)
    cache.truncate(40)
    cache.append(k[:, :, 90:], v[:, :, 90:])
    straight.append(k, v)
    for got, want in zip(cache.encoded(), straight.encoded(), strict=True):
        np.testing.assert_array_equal(decode(got, KIVI2[0]), decode(want, KIVI2[0]))
    with pytest.raises(ValueError, match="in the residual"):
        cache.truncate(90)


# --- attention --------------------------------------------------------------------------------------------


def attention(rng: np.random.Generator, kv_len: int = 64, channels: int = 32) -> Any:
    q = rng.standard_normal((2, 4, 3, channels))
    k, v = rng.standard_normal((2, 2, 2, kv_len, channels))
    return q, k * np.exp(rng.standard_normal(channels)) + 3 * rng.standard_normal(channels), v


@pytest.mark.parametrize("codecs", [KIVI4, KIVI2], ids=["int4", "int2"])
def test_folding_zero_points_and_scales(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """No token is ever decoded: K's scales go into q, its zeros into a number per group; V's scales into the weights."""
    q, k, v = attention(rng)
    ck, cv = (quantise(x, codec) for x, codec in zip((k, v), codecs, strict=True))
    expected, expected_lse = kv_quant.naive(q, [(decode(ck, codecs[0]), decode(cv, codecs[1]))], causal=False)
    assert ck.zero is not None
    assert cv.zero is not None
    g = 32
    for b, h in np.ndindex(q.shape[:2]):
        n = h // 2
        logits = np.concatenate(
            [
                (q[b, h] * ck.scale[b, n, t]) @ ck.codes[b, n, t * g : (t + 1) * g].T.astype(float)
                + (q[b, h] @ ck.zero[b, n, t])[:, None]
                for t in range(k.shape[2] // g)
            ],
            axis=1,
        )
        p = np.exp(logits * q.shape[3] ** -0.5)
        total = p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.log(total[:, 0]), expected_lse[b, h], rtol=1e-12, atol=1e-12)
        folded = (p * cv.scale[b, n, :, 0]) @ cv.codes[b, n].astype(float) + p @ cv.zero[b, n]
        np.testing.assert_allclose(folded / total, expected[b, h], rtol=1e-12, atol=1e-12)


def test_folding_token_scales(rng: np.random.Generator) -> None:
    """int8: the key's scale multiplies its column of logits, the value's its column of weights. fp8: scale and epilogue."""
    q, k, v = attention(rng)
    ck, cv = quantise(k, INT8), quantise(v, INT8)
    expected, _ = kv_quant.naive(q, [(decode(ck, INT8), decode(cv, INT8))], causal=False)
    logits = (q[0, 0] @ ck.codes[0, 0].T.astype(float)) * ck.scale[0, 0, :, 0] * 32**-0.5
    p = np.exp(logits)
    np.testing.assert_allclose(
        (p * cv.scale[0, 0, :, 0]) @ cv.codes[0, 0] / p.sum(axis=1, keepdims=True), expected[0, 0]
    )
    fk, fv = quantise(k, FP8, 0.5), quantise(v, FP8, 0.25)
    expected, _ = kv_quant.naive(q, [(decode(fk, FP8), decode(fv, FP8))], causal=False)
    means_k, means_v = (decode(quantise(x / s, FP8), FP8) for x, s in ((k, 0.5), (v, 0.25)))
    got, _ = dense.naive(q, means_k, means_v, scale=0.5 * 32**-0.5)
    np.testing.assert_allclose(0.25 * got, expected, rtol=1e-12)


def test_rotations_change_nothing(rng: np.random.Generator) -> None:
    """An orthogonal map of q and k outside the op (a Hadamard matrix here) leaves the result; of v, comes out again."""
    q, k, v = attention(rng)
    hadamard = np.ones((1, 1))
    while len(hadamard) < q.shape[3]:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    r = hadamard / np.sqrt(len(hadamard))
    expected, lse = dense.naive(q, k, v, causal=True)
    got, got_lse = dense.naive(q @ r, k @ r, v @ r, causal=True)
    np.testing.assert_allclose(got @ r.T, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-12)
    spiked = k.copy()
    spiked[..., 5] *= 50  # an outlier channel: rotated, it no longer sets every token's scale
    error = [abs(decode(quantise(x, INT8), INT8) - x).max() for x in (spiked, spiked @ r)]
    assert error[1] < error[0]


def test_smoothing_keys_moves_lse_alone(rng: np.random.Generator) -> None:
    """Keys less their mean: every logit of a query falls by ``scale q . mean``."""
    q, k, v = attention(rng)
    mean = k.mean(axis=2, keepdims=True)
    expected, lse = dense.naive(q, k, v)
    got, got_lse = dense.naive(q, k - mean, v)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    moved = q.shape[3] ** -0.5 * np.einsum("bhid,bhd->bhi", q, mean.repeat(2, axis=1)[:, :, 0])
    np.testing.assert_allclose(got_lse + moved, lse, rtol=1e-12)


# --- as programs ------------------------------------------------------------------------------------------


def stored(encoded: Any, codec: Codec) -> reference.Encoded:
    """What a cache holds, as the reference takes it: numbers and scales for every element."""
    scale, zero = per_element(encoded, codec)
    codes = kv_quant.E4M3[encoded.codes] if codec.name == "fp8" else encoded.codes.astype(np.float64)
    return reference.Encoded(codec, codes, scale, zero, np.zeros(1))


def segments(rng: np.random.Generator, case: Any, lengths: list[int], channels: int, v_channels: int) -> Any:
    """For each segment: what the program takes, and what it means."""
    given, means = [], []
    for pair, length in zip(case, lengths, strict=False):
        meant = []
        for codec, width in zip(pair, (channels, v_channels), strict=True):
            x = rng.standard_normal((2, 2, length, width)) * np.exp(rng.standard_normal(width))
            encoded = None if codec is None else quantise(x, codec)
            given.append(x if encoded is None or codec is None else stored(encoded, codec))
            meant.append(x if encoded is None or codec is None else decode(encoded, codec))
        means.append(tuple(meant))
    return given, means


@pytest.mark.parametrize("name", kv_quant.CASES)
@pytest.mark.parametrize("lengths", [[64, 9, 3], [32, 0, 1], [0, 5, 2]], ids=str)
def test_the_program_is_the_equation(rng: np.random.Generator, name: str, lengths: list[int]) -> None:
    """Grouped heads, three queries at the end of the last segment, segments that are empty."""
    case = kv_quant.CASES[name]
    q = rng.standard_normal((2, 4, 3, 40))
    given, means = segments(rng, case, lengths, 40, 33)
    text, buffers = kv_quant.program(case)
    want = kv_quant.naive(q, means)
    for got, expected in zip(run(parse(text), [q, *given], buffers), want, strict=True):
        testing.agree(got, expected)


@pytest.mark.parametrize("codec", [*ASYMMETRIC, *SYMMETRIC, *KIVI4, *KIVI2], ids=kv_quant.written)
def test_two_quantisers_agree(rng: np.random.Generator, codec: Codec) -> None:
    """The reference's and the one written from the table, code for code."""
    for x in (tokens(rng, 70, 45), tokens(rng) - 1000, np.full((1, 1, 5, 6), 0.1), np.zeros((1, 1, 5, 6))):
        got, want = reference.encode(x, codec), quantise(x, codec)
        scale, zero = per_element(want, codec)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(np.broadcast_to(got.scale, x.shape), scale)
        np.testing.assert_array_equal(np.broadcast_to(got.zero, x.shape), zero)
        np.testing.assert_array_equal(reference.decode(got), decode(want, codec))


def test_reference_e4m3_is_the_table(rng: np.random.Generator) -> None:
    """fp8 with a scale per token: e4m3 of x over its scale, by the table of all bytes."""
    x = tokens(rng, 40, 40)
    got = reference.encode(x, Codec("fp8", "token", 0))
    np.testing.assert_array_equal(got.codes, kv_quant.E4M3[kv_quant.e4m3_bytes(x / got.scale)])
    assert abs(got.codes).max() == 448


ENCODED = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {{
  k1 = encode(k, codec = {0})
  v1 = encode(v, codec = {1})
  o, lse = attend(q, k1, v1) {{ mask = kv_idx <= q_idx + (kv_len - q_len)  normalizer = softmax }}
  return o, lse
}}"""


@pytest.mark.parametrize("codecs", [(INT8, INT8), KIVI4, KIVI2], ids=["int8", "int4", "int2"])
def test_encoding_in_the_program(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """The same codes as a cache, and gradients that go straight through: those at what is decoded."""
    q, k, v = attention(rng)
    program = parse(ENCODED.format(*map(kv_quant.written, codecs)))
    decoded = [decode(quantise(x, codec), codec) for x, codec in zip((k, v), codecs, strict=True)]
    for got, want in zip(run(program, [q, k, v]), dense.naive(q, *decoded, causal=True), strict=True):
        testing.agree(got, want)
    cotangents = [rng.standard_normal((2, 4, 3, 32)), rng.standard_normal((2, 4, 3))]
    found = gradients(program, [q, k, v], cotangents)
    there = gradients(parse(dense.program(causal=True)[0]), [q, *decoded], cotangents)
    for got, want in zip(found.inputs, there.inputs, strict=True):
        testing.agree(got, want)


def test_gradients_beside_codes(rng: np.random.Generator) -> None:
    """Of q and of the segments in full precision, by differences."""
    case = [(Codec("int4", "channel", 4), Codec("int4", "token", 2)), (None, None)]
    q = rng.standard_normal((1, 2, 2, 3))
    (k, v, k1, v1), means = segments(rng, case, [4, 3], 3, 2)
    k, v = (reference.Encoded(x.codec, x.codes[:1], x.scale[:1], x.zero[:1], x.center) for x in (k, v))
    first = tuple(x[:1] for x in means[0])
    inputs = [q, k1[:1], v1[:1]]
    cotangents = [rng.standard_normal((1, 2, 2, 2)), rng.standard_normal((1, 2, 2))]
    want = testing.differences(lambda q, k, v: kv_quant.naive(q, [first, (k, v)]), inputs, cotangents)
    got = gradients(parse(kv_quant.program(case)[0]), [q, k, v, *inputs[1:]], cotangents).inputs
    for a, b in zip((got[0], got[3], got[4]), want, strict=True):
        testing.agree(a, b, 1e-6)


@pytest.mark.parametrize("codecs", [(INT8, INT8), KIVI4], ids=["int8", "int4"])
def test_pages_are_the_contiguous_cache(rng: np.random.Generator, codecs: tuple[Codec, Codec]) -> None:
    """Pages of whole groups, in any order, encoded page by page: the same codes, and the same attention."""
    q, k, v = attention(rng, kv_len=96)
    page, lens = 32, np.array([96, 64], np.int32)
    slots = rng.permutation(8)
    table = slots[:6].reshape(2, 3).astype(np.int32)
    pages = []
    for x, codec in zip((k, v), codecs, strict=True):
        paged = rng.standard_normal((8, 2, page, 32))
        for b, n in np.ndindex(2, 3):
            paged[table[b, n]] = x[b, :, n * page : (n + 1) * page]
        whole, encoded = quantise(x, codec), quantise(paged, codec)
        for b, n in np.ndindex(2, 3):
            np.testing.assert_array_equal(
                encoded.codes[table[b, n]], whole.codes[b, :, n * page : (n + 1) * page]
            )
        pages.append(stored(encoded, codec))
    kinds = [f"paged[b0, b1] {kv_quant.written(codec)}" for codec in codecs]
    text = f"""attnkit 1
        program (q: bhsd, k: {kinds[0]}, v: {kinds[1]}) buffers(b0: i32[2], b1: i32[1]) {{
          o, lse = attend(q, k, v) {{ mask = kv_idx <= q_idx + (kv_len - q_len)  normalizer = softmax }}
          return o, lse
        }}"""
    decoded = [decode(quantise(x, codec), codec) for x, codec in zip((k, v), codecs, strict=True)]
    want = dense.naive(q, *decoded, causal=True, kv_lens=lens)
    for got, expected in zip(run(parse(text), [q, *pages], [table, lens]), want, strict=True):
        testing.agree(got, expected)


def test_a_decoding_cache(rng: np.random.Generator) -> None:
    """Token by token over quantised | residual | new: each step is attention over what the cache means then."""
    program = parse(kv_quant.program([KIVI4, (None, None), (None, None)])[0])
    cache = kv_quant.Cache(KIVI4, residual=8, group=32)
    k, v = rng.standard_normal((2, 1, 2, 100, 32))
    cache.append(k[:, :, :70], v[:, :, :70])
    for t in range(70, 100):
        q = rng.standard_normal((1, 4, 1, 32))
        codes = cache.encoded()
        new = (k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert cache.residual is not None
        inputs = [stored(x, codec) for x, codec in zip(codes, KIVI4, strict=True)]
        o, lse = run(program, [q, *inputs, *cache.residual, *new])
        held = [np.concatenate([decode(x, codec), y, z], axis=2)
                for x, codec, y, z in zip(codes, KIVI4, cache.residual, new, strict=True)]  # fmt: skip
        assert held[0].shape[2] == t + 1
        want = dense.naive(q, *held)
        testing.agree(o, want[0])
        testing.agree(lse, want[1])
        cache.append(*new)
    assert len(cache.groups) == 2
