// The instructions of AVX-512 that the kernels name, on AVX2 and loops: so that the code of sixteen lanes, of dot
// products of bfloat16 and of bytes is run and tested where no processor has them (`make emulate`). Slow. Included
// after <immintrin.h> and inside the anonymous namespace of a level, as simd-inl.h is.

typedef int16_t Shorts __attribute__((vector_size(64), may_alias));
typedef uint16_t UnsignedShorts __attribute__((vector_size(64), may_alias));
typedef int32_t Ints32 __attribute__((vector_size(64), may_alias));
typedef uint32_t UnsignedInts32 __attribute__((vector_size(64), may_alias));
typedef uint64_t Longs __attribute__((vector_size(64), may_alias));
#define ATTNKIT_EMULATED inline __attribute__((always_inline))

template <class To, class From>
ATTNKIT_EMULATED To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Two halves of 256 bits, by an instruction that AVX2 has.
template <class Half, class F, class First, class... Rest>
ATTNKIT_EMULATED First by_halves(F f, const First& first, const Rest&... rest) {
  First to;
  for (int i = 0; i < 2; ++i) {
    const auto half = [&](const auto& x) {
      Half h;
      __builtin_memcpy(&h, reinterpret_cast<const char*>(&x) + 32 * i, 32);
      return h;
    };
    const Half found = f(half(first), half(rest)...);
    __builtin_memcpy(reinterpret_cast<char*>(&to) + 32 * i, &found, 32);
  }
  return to;
}
template <class F>
ATTNKIT_EMULATED __m512 each_float(F f) {
  __m512 to;
  for (int i = 0; i < 16; ++i) to[i] = f(i);
  return to;
}

ATTNKIT_EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
ATTNKIT_EMULATED __m512 larger(__m512 a, __m512 b) { return a > b ? a : b; }
ATTNKIT_EMULATED __m512 smaller(__m512 a, __m512 b) { return a < b ? a : b; }
ATTNKIT_EMULATED __m512 roundscale(__m512 x, int how) {
  return by_halves<__m256>(
      [&](__m256 h) {
        return (how & 3) == _MM_FROUND_TO_NEG_INF ? _mm256_floor_ps(h)
                                                  : _mm256_round_ps(h, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      },
      x);
}
ATTNKIT_EMULATED __m512 scalef(__m512 p, __m512 n) {
  return each_float([&](int i) {
    const float by = __builtin_floorf(n[i]);
    if (!(by > -2000.0f && by < 2000.0f)) return p[i] * (by < 0 ? 0.0f : by);  // by may be infinite, or no number
    return __builtin_ldexpf(p[i], static_cast<int>(by));
  });
}
ATTNKIT_EMULATED uint16_t not_less(__m512 a, __m512 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (a[i] < b[i] ? 0u : 1u) << i;
  return static_cast<uint16_t>(bits);
}
ATTNKIT_EMULATED __m512 scalef_where(uint16_t mask, __m512 p, __m512 n) {
  const __m512 x = scalef(p, n);
  return each_float([&](int i) { return mask >> i & 1 ? x[i] : 0.0f; });
}
ATTNKIT_EMULATED __m512 square_root(__m512 x) {
  return by_halves<__m256>([](__m256 h) { return _mm256_sqrt_ps(h); }, x);
}
// What is left of x when it is rounded to so many bits of its fraction, to nearest.
ATTNKIT_EMULATED __m512 reduced(__m512 x, int how) {
  const float by = static_cast<float>(1 << (how >> 4));
  return each_float(
      [&](int i) { return __builtin_fabsf(x[i]) >= 0x1p23f ? 0.0f : x[i] - __builtin_roundevenf(x[i] * by) / by; });
}
ATTNKIT_EMULATED __m512i quarter_into(__m512i x, __m128i quarter, int at) {
  __builtin_memcpy(reinterpret_cast<char*>(&x) + 16 * at, &quarter, 16);
  return x;
}
ATTNKIT_EMULATED __m512i first_quarter(__m128i quarter) { return quarter_into(__m512i{}, quarter, 0); }
#define ATTNKIT_UNPACK(name, instruction)                                                             \
  ATTNKIT_EMULATED __m512i name(__m512i a, __m512i b) {                                               \
    return by_halves<__m256i>([](__m256i x, __m256i y) { return _mm256_##instruction(x, y); }, a, b); \
  }
ATTNKIT_UNPACK(low_shorts, unpacklo_epi16)
ATTNKIT_UNPACK(high_shorts, unpackhi_epi16)
ATTNKIT_UNPACK(low_ints, unpacklo_epi32)
ATTNKIT_UNPACK(high_ints, unpackhi_epi32)
ATTNKIT_UNPACK(low_longs, unpacklo_epi64)
ATTNKIT_UNPACK(high_longs, unpackhi_epi64)
#undef ATTNKIT_UNPACK
// The larger magnitude of two; of one, if the other is no number.
ATTNKIT_EMULATED __m512 largest_magnitude(__m512 a, __m512 b) {
  return each_float([&](int i) { return __builtin_fmaxf(__builtin_fabsf(a[i]), __builtin_fabsf(b[i])); });
}
ATTNKIT_EMULATED __m512 gather_floats(__m512i offset, const float* base) {
  const auto at = bits_of<Ints32>(offset);
  return each_float([&](int i) { return base[at[i]]; });
}
ATTNKIT_EMULATED __m512 upper_half(__m512 x, __m256 high) {
  __builtin_memcpy(reinterpret_cast<char*>(&x) + 32, &high, 32);
  return x;
}
ATTNKIT_EMULATED __m512 lower_half(__m256 low) {
  __m512 x{};
  __builtin_memcpy(&x, &low, 32);
  return x;
}
template <class Part, class Whole>
ATTNKIT_EMULATED Part part(const Whole& x, int at = 0) {
  Part p;
  __builtin_memcpy(&p, reinterpret_cast<const char*>(&x) + static_cast<int>(sizeof p) * at, sizeof p);
  return p;
}

ATTNKIT_EMULATED uint16_t bits_where(Ints32 mask) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (static_cast<uint32_t>(mask[i]) >> 31) << i;
  return static_cast<uint16_t>(bits);
}
ATTNKIT_EMULATED uint16_t any_bits(__m512i a, __m512i b) {
  return bits_where((Ints32)a & (Ints32)b ? Ints32{} - 1 : Ints32{});
}
ATTNKIT_EMULATED __m512 where(uint16_t mask, __m512 x) {
  return each_float([&](int i) { return mask >> i & 1 ? x[i] : 0.0f; });
}

// bfloat16, rounded to even; what is subnormal is 0, as the instructions have it.
ATTNKIT_EMULATED uint16_t narrow(float x) {
  const auto bits = bits_of<uint32_t>(x);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ATTNKIT_EMULATED __m512bh narrow_both(__m512 high, __m512 low) {
  UnsignedShorts to;
  for (int i = 0; i < 16; ++i) {
    to[i] = narrow(low[i]);
    to[16 + i] = narrow(high[i]);
  }
  return bits_of<__m512bh>(to);
}
ATTNKIT_EMULATED float widened(uint32_t bits) {
  const float x = bits_of<float>(bits << 16);
  return (bits & 0x7f80) == 0 ? 0.0f : x;
}
ATTNKIT_EMULATED __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = bits_of<UnsignedInts32>(a), y = bits_of<UnsignedInts32>(b);
  return each_float([&](int i) {
    const float odd = __builtin_fmaf(widened(x[i] >> 16), widened(y[i] >> 16), sum[i]);
    return __builtin_fmaf(widened(x[i] & 0xffff), widened(y[i] & 0xffff), odd);
  });
}
template <class V>
ATTNKIT_EMULATED void dot_bytes(V& sum, V u, V s) {
  for (int i = 0; i < 16; ++i) {
    const auto x = bits_of<uint32_t>(u[i]), y = bits_of<uint32_t>(s[i]);
    int32_t total = bits_of<int32_t>(sum[i]);
    for (int b = 0; b < 32; b += 8)
      total += static_cast<int32_t>(x >> b & 255) * static_cast<int8_t>(static_cast<uint8_t>(y >> b & 255));
    sum[i] = bits_of<std::remove_cvref_t<decltype(V{}[0])>>(total);
  }
}

ATTNKIT_EMULATED __m512i to_integers(__m512 x) {
  Ints32 to;
  for (int i = 0; i < 16; ++i) to[i] = _mm_cvtss_si32(_mm_set_ss(x[i]));
  return (__m512i)to;
}
ATTNKIT_EMULATED __m128i low_bytes(__m512i x) {
  const auto from = (Ints32)x;
  uint8_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from[i]);
  return bits_of<__m128i>(to);
}
ATTNKIT_EMULATED __m512i widen_shorts(__m256i x) {
  UnsignedInts32 to;
  for (int i = 0; i < 8; ++i) {
    const auto two = static_cast<uint32_t>(reinterpret_cast<const uint32_t*>(&x)[i]);
    to[2 * i] = two & 0xffff;
    to[2 * i + 1] = two >> 16;
  }
  return (__m512i)to;
}
ATTNKIT_EMULATED int32_t sum_of_ints(__m512i x) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += ((Ints32)x)[i];
  return sum;
}
ATTNKIT_EMULATED __m512i pack_unsigned(__m512i a, __m512i b) {
  return by_halves<__m256i>([](__m256i x, __m256i y) { return _mm256_packus_epi16(x, y); }, a, b);
}
ATTNKIT_EMULATED __m512i dot_shorts(__m512i a, __m512i b) {
  return by_halves<__m256i>([](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); }, a, b);
}
ATTNKIT_EMULATED __m512 widen_halves_of(__m256i x) {
  return upper_half(lower_half(_mm256_cvtph_ps(part<__m128i>(x, 0))), _mm256_cvtph_ps(part<__m128i>(x, 1)));
}
ATTNKIT_EMULATED __m512i load_whole(const void* p) {
  __m512i x;
  __builtin_memcpy(&x, p, 64);
  return x;
}
ATTNKIT_EMULATED void store_whole(void* p, __m512i x) { __builtin_memcpy(p, &x, 64); }

#undef _mm512_roundscale_ps
#undef _mm512_i32gather_ps
#undef _mm512_insertf32x8
#undef _mm512_range_ps
#undef _mm512_reduce_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_inserti32x4
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srli_epi16
#undef _mm512_extracti64x4_epi64
#define _mm512_fmadd_ps fmadd
#define _mm512_cvtph_ps widen_halves_of
#define _mm512_max_ps larger
#define _mm512_min_ps smaller
#define _mm512_roundscale_ps roundscale
#define _mm512_scalef_ps scalef
#define _mm512_maskz_scalef_ps scalef_where
#define _mm512_cmp_ps_mask(a, b, how) not_less(a, b)
#define _mm512_sqrt_ps square_root
#define _mm512_reduce_ps reduced
#define _mm512_inserti32x4 quarter_into
#define _mm512_castsi128_si512 first_quarter
#define _mm512_unpacklo_epi16 low_shorts
#define _mm512_unpackhi_epi16 high_shorts
#define _mm512_unpacklo_epi32 low_ints
#define _mm512_unpackhi_epi32 high_ints
#define _mm512_unpacklo_epi64 low_longs
#define _mm512_unpackhi_epi64 high_longs
#define _mm512_range_ps(a, b, how) largest_magnitude(a, b)
#define _mm512_test_epi32_mask any_bits
#define _mm512_movepi32_mask(x) bits_where((Ints32)(x))
#define _mm512_maskz_mov_ps where
#define _mm512_i32gather_ps(offset, base, scale) gather_floats(offset, base)
#define _mm512_insertf32x8(x, high, at) upper_half(x, high)
#define _mm512_castps256_ps512 lower_half
#define _mm512_castps512_ps128(x) part<__m128>(x)
#define _mm512_castsi512_si256(x) part<__m256i>(x)
#define _mm512_extracti64x4_epi64(x, at) part<__m256i>(x, at)
#define _mm512_permutexvar_ps(i, x) __builtin_shuffle(x, (Ints32)(i))
#define _mm512_permutex2var_ps(a, i, b) __builtin_shuffle(a, b, (Ints32)(i))
#define _mm512_permutexvar_epi16(i, x) ((__m512i)__builtin_shuffle((Shorts)(x), (Shorts)(i)))
#define _mm512_permutex2var_epi16(a, i, b) ((__m512i)__builtin_shuffle((Shorts)(a), (Shorts)(b), (Shorts)(i)))
#define _mm512_permutexvar_epi64(i, x) ((__m512i)__builtin_shuffle((Longs)(x), (Longs)(i)))
#define _mm512_mul_epu32(a, b) ((__m512i)(((Longs)(a) & 0xffffffff) * ((Longs)(b) & 0xffffffff)))
#define _mm512_set1_ps(x) ((x) - __m512{})
#define _mm512_set1_epi16(x) ((__m512i)(static_cast<int16_t>(x) - Shorts{}))
#define _mm512_setr_epi64(...) ((__m512i)(Longs{__VA_ARGS__}))
#define _mm512_add_epi16(a, b) ((__m512i)((UnsignedShorts)(a) + (UnsignedShorts)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((Longs)(a) & (Longs)(b)))
#define _mm512_slli_epi32(x, by) ((__m512i)((UnsignedInts32)(x) << (by)))
#define _mm512_srli_epi32(x, by) ((__m512i)((UnsignedInts32)(x) >> (by)))
#define _mm512_srli_epi16(x, by) ((__m512i)((UnsignedShorts)(x) >> (by)))
#define _mm512_cvtne2ps_pbh narrow_both
#define _mm512_dpbf16_ps dot_pairs
#define _mm512_cvtps_epi32 to_integers
#define _mm512_cvtepi32_epi8 low_bytes
#define _mm512_cvtepu16_epi32 widen_shorts
#define _mm512_reduce_add_epi32 sum_of_ints
#define _mm512_packus_epi16 pack_unsigned
#define _mm512_madd_epi16 dot_shorts
#define _mm512_load_si512 load_whole
#define _mm512_storeu_si512 store_whole
