// Vectors of kLanes 4-byte lanes, on the compiler's vector types. Included once per instruction set, inside that set's
// anonymous namespace and after kLanes is defined; only what the compiler cannot see by itself is spelled in
// intrinsics. No <algorithm>, no <vector>: a template of the standard library instantiated here would be compiled with
// this file's instruction set and could be picked by the linker for everybody.

inline constexpr int kBytes = 4 * kLanes;
typedef float vf __attribute__((vector_size(kBytes), may_alias));
typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));  // wraps
typedef float vf_u __attribute__((vector_size(kBytes), may_alias, aligned(4)));
typedef int32_t vi_u __attribute__((vector_size(kBytes), may_alias, aligned(4)));

#define ATTNKIT_INLINE inline __attribute__((always_inline))

ATTNKIT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
ATTNKIT_INLINE vi load_int(const float* p) { return *reinterpret_cast<const vi_u*>(p); }
ATTNKIT_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
ATTNKIT_INLINE void store_int(float* p, vi x) { *reinterpret_cast<vi_u*>(p) = x; }
ATTNKIT_INLINE vf set1(float x) { return x - vf{}; }
ATTNKIT_INLINE vi set1_int(int32_t x) { return x - vi{}; }
ATTNKIT_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
ATTNKIT_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
ATTNKIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
ATTNKIT_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
// Lanes must lie within int32: callers clamp first.
ATTNKIT_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }

#if defined(__AVX512F__)
static_assert(kLanes == 16);
ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// Either returns b when a or b is NaN.
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
ATTNKIT_INLINE vf round_nearest(vf x) {
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ATTNKIT_INLINE vf floor(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// p * 2^n for n already rounded; over- and underflows as IEEE does.
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)n); }
ATTNKIT_INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
ATTNKIT_INLINE vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
ATTNKIT_INLINE vf gather(const float* base, vi offset) { return (vf)_mm512_i32gather_ps((__m512i)offset, base, 4); }
#else
ATTNKIT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
ATTNKIT_INLINE vf max_or_second(vf a, vf b) { return a > b ? a : b; }
ATTNKIT_INLINE vf min_or_second(vf a, vf b) { return a < b ? a : b; }
ATTNKIT_INLINE vf round_nearest(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  const vf r = (x + magic) - magic;
  return (x < set1(4194304.0f)) & (x > set1(-4194304.0f)) ? r : x;
}
ATTNKIT_INLINE vf floor(vf x) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_floorf(x[i]);
  return r;
}
ATTNKIT_INLINE vf scale_by_power(vf p, vf n) {
  // Two factors, so that results near the ends of the exponent range neither overflow nor vanish too early.
  const vi k = to_int(n);
  const vi half = k >> 1;
  return p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
}
ATTNKIT_INLINE bool any(vi mask) {
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= mask[i];
  return r != 0;
}
ATTNKIT_INLINE vf sqrt(vf x) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
}
ATTNKIT_INLINE vf gather(const float* base, vi offset) {
  vf r{};
  for (int i = 0; i < kLanes; ++i) r[i] = base[offset[i]];
  return r;
}
#endif

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kInfinity = __builtin_inff();

// 2^f for |f| <= 1/2, exactly 1 at 0. Coefficients: minimax of (2^f - 1)/f, error 2e-9.
ATTNKIT_INLINE vf exp2_fraction(vf f) {
  vf p = set1(0.00015353360504377633f);
  p = fma(p, f, set1(0.0013398875016719103f));
  p = fma(p, f, set1(0.00961843691766262f));
  p = fma(p, f, set1(0.055503323674201965f));
  p = fma(p, f, set1(0.24022647738456726f));
  p = fma(p, f, set1(0.6931471824645996f));
  return fma(p, f, set1(1.0f));
}

// The clamps keep infinities out of x - n; the order of their operands lets NaN through.
ATTNKIT_INLINE vf exp2(vf x) {
  x = min_or_second(set1(130.0f), max_or_second(set1(-160.0f), x));
  const vf n = round_nearest(x);
  return scale_by_power(exp2_fraction(x - n), n);
}

// e^x for x <= 0: a softmax weight. The fraction is rounded once, after the subtraction, so a weight is right to about
// one unit in the last place however small it is. Exactly 1 at 0: rescaling by an unchanged maximum changes no bit.
ATTNKIT_INLINE vf exp_weight(vf x) {
  x = max_or_second(set1(-115.0f), x);
  const vf n = round_nearest(x * set1(kLog2e));
  return scale_by_power(exp2_fraction(fma(x, set1(kLog2e), -n)), n);
}

// r = x - n ln 2 and e^r - 1, |r| <= ln(2)/2. Coefficients: minimax of (e^r - 1 - r)/r^2, error 2.4e-10.
struct ExpParts {
  vf n, em1;
};
ATTNKIT_INLINE ExpParts exp_parts(vf x) {
  const vf n = round_nearest(x * set1(kLog2e));
  vf r = fma(n, set1(-0.693359375f), x);         // the high part of ln 2 has 9 bits: n times it is exact
  r = fma(n, set1(2.12194440054690583e-4f), r);  // minus the (negative) low part
  vf p = set1(0.00019913705182261765f);
  p = fma(p, r, set1(0.0013941116631031036f));
  p = fma(p, r, set1(0.00833327416330576f));
  p = fma(p, r, set1(0.04166635498404503f));
  p = fma(p, r, set1(0.1666666716337204f));
  p = fma(p, r, set1(0.5f));
  return {n, fma(p, r * r, r)};
}

ATTNKIT_INLINE vf exp(vf x) {
  x = min_or_second(set1(90.0f), max_or_second(set1(-105.0f), x));
  const ExpParts e = exp_parts(x);
  return scale_by_power(e.em1 + set1(1.0f), e.n);
}

// (e^2x - 1) / (e^2x + 1) with e^2x - 1 kept whole, so that small arguments keep all their bits.
ATTNKIT_INLINE vf tanh(vf x) {
  const vf clamped = min_or_second(set1(9.25f), max_or_second(set1(-9.25f), x));
  const ExpParts e = exp_parts(clamped + clamped);
  const vf power = scale_by_power(set1(1.0f), e.n);
  const vf em1 = fma(power, e.em1, power - set1(1.0f));
  const vf t = em1 / (em1 + set1(2.0f));
  const vf a = as_float(as_int(x) & set1_int(0x7fffffff));
  return a < set1(1e-4f) ? x : t;  // keeps -0 and subnormals
}

// From e^-|x|, which cannot overflow: the far negative tail keeps its bits.
ATTNKIT_INLINE vf sigmoid(vf x) {
  const vf e = exp(as_float(as_int(x) | set1_int(INT32_MIN)));
  return select(x < vf{}, e, set1(1.0f)) / (set1(1.0f) + e);
}
