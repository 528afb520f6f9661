// The functions that an instruction set has no instruction for, on the vectors of simd-inl.h.

inline constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
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

// 2^(i/16)
alignas(64) inline constexpr float kSixteenths[16] = {1.0f,          1.0442737341f, 1.0905077457f, 1.1387885809f,
                                                      1.1892070770f, 1.2418577671f, 1.2968395948f, 1.3542555571f,
                                                      1.4142135382f, 1.4768261909f, 1.5422108173f, 1.6104903221f,
                                                      1.6817928553f, 1.7562521696f, 1.8340080976f, 1.9152065516f};

#define ATTNKIT_EACH _Pragma("GCC unroll 16") for (int i = 0; i < kCount; ++i)

// x - n ln 2 for an n of few bits: its product with the high part of ln 2, which has 9 bits, is exact.
ATTNKIT_INLINE vf subtract_ln2(vf x, vf n) {
  return fma(n, set1(2.12194440054690583e-4f), fma(n, set1(-0.693359375f), x));  // minus the (negative) low part
}

// e^x for x <= 0: a softmax weight, right to 1.5 units in the last place, or 0 where it would be subnormal. x is split
// into sixteenths of ln 2 and a remainder, whose short polynomial is half the work of a long one (Tang 1989). Exactly 1
// at 0: rescaling by an unchanged maximum changes no bit.
struct FineExp {
  static ATTNKIT_INLINE vf remainder(vf x, vf n) { return subtract_ln2(x, n); }
  // e^r - 1. Minimax of (e^r - 1)/r for |r| <= ln(2)/32, error 4e-9.
  template <int kCount>
  static ATTNKIT_INLINE void less_one(const vf* r, vf* p) {
    ATTNKIT_EACH p[i] = fma(set1(0.16666960716247559f), r[i], set1(0.5000147223472595f));
    ATTNKIT_EACH p[i] = fma(p[i], r[i], set1(1.0f)) * r[i];
  }
};

// Weights of smaller powers of two, in sixteenths, are 0. Those would be subnormal, or nearly, and products with such
// numbers take many times as long on some processors.
inline constexpr float kLeastPower = -126 + 1.0f / 16;

// kCount of them in two halves. They go in step, operation by operation, and something else may go between the halves:
// what waits for the operation before it would fill the scheduler.
template <class Exp, int kCount>
struct ExpSteps {
  vf n[kCount], r[kCount], power[kCount];

  ATTNKIT_INLINE void begin(vf* x) {
    const vf magic = set1(786432.0f);  // 1.5 * 2^19: adding it leaves four bits of the fraction
    vf t[kCount];
    ATTNKIT_EACH x[i] = max_or_second(set1(-115.0f), x[i]);
    ATTNKIT_EACH t[i] = fma(x[i], set1(kLog2e), magic);
    ATTNKIT_EACH n[i] = t[i] - magic;
    ATTNKIT_EACH r[i] = Exp::remainder(x[i], n[i]);
    ATTNKIT_EACH power[i] = look_up(kSixteenths, as_int(t[i]));
  }
  ATTNKIT_INLINE void end(vf* w) const {
    Exp::template less_one<kCount>(r, w);
    ATTNKIT_EACH w[i] = fma(power[i], w[i], power[i]);
    ATTNKIT_EACH w[i] = scale_or_zero(w[i], n[i], kLeastPower);
  }
};
template <class Exp, int kCount>
ATTNKIT_INLINE void exp_each(vf* x) {
  ExpSteps<Exp, kCount> steps;
  steps.begin(x);
  steps.end(x);
}
ATTNKIT_INLINE vf exp_weight(vf x) {
  exp_each<FineExp, 1>(&x);
  return x;
}

// r = x - n ln 2 and e^r - 1, |r| <= ln(2)/2. Coefficients: minimax of (e^r - 1 - r)/r^2, error 2.4e-10.
struct ExpParts {
  vf n, em1;
};
ATTNKIT_INLINE ExpParts exp_parts(vf x) {
  const vf n = round_nearest(x * set1(kLog2e));
  const vf r = subtract_ln2(x, n);
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

// tanh(i * kTanhStep); the last is 1.
inline constexpr float kTanhStep = 0.30078125f;
alignas(64) inline constexpr float kTanhs[32] = {
    0.0f,       0.2920274f,  0.5381605f,  0.71743715f, 0.83460534f, 0.90585166f, 0.9472893f, 0.97076863f,
    0.983876f,  0.9911325f,  0.99513125f, 0.9973292f,  0.99853563f, 0.9991973f,  0.9995601f, 0.9997589f,
    0.9998679f, 0.99992764f, 0.99996036f, 0.99997824f, 0.9999881f,  0.9999935f,  0.9999964f, 0.99999803f,
    0.9999989f, 0.9999994f,  0.9999997f,  0.9999998f,  0.9999999f,  0.99999994f, 1.0f,       1.0f};

// tanh(x / c) for c > 0, given 1 / (c kTanhStep) and 31 c kTanhStep. |x| is split into steps and a remainder r of at
// most half a step: tanh(a + r) = (tanh a + tanh r) / (1 + tanh a tanh r), with tanh a from the table. A small x has no
// steps, and keeps all its bits.
ATTNKIT_INLINE vf tanh_in_steps(vf x, vf steps, vf limit) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  const vf size = min_or_second(limit, magnitude(x));  // NaN gets through
  const vf t = fma(size, steps, magic), r = fma(size, steps, magic - t), square = r * r;
  // Minimax of tanh(r kTanhStep) / r for |r| <= 1/2, error 2e-8.
  const vf p = fma(fma(set1(0.00032378006f), square, set1(-0.009070079f)), square, set1(kTanhStep));
  const vf rest = p * r, whole = look_up(kTanhs, as_int(t));
  const vf result = (whole + rest) / fma(whole, rest, set1(1.0f));
  return as_float(as_int(result) | (as_int(x) & INT32_MIN));
}

ATTNKIT_INLINE vf tanh(vf x) { return tanh_in_steps(x, set1(1 / kTanhStep), set1(31 * kTanhStep)); }

// From e^-|x|, which cannot overflow: the far negative tail keeps its bits.
ATTNKIT_INLINE vf sigmoid(vf x) {
  const vf e = exp(as_float(as_int(x) | set1_int(INT32_MIN)));
  return select(x < vf{}, e, set1(1.0f)) / (set1(1.0f) + e);
}
