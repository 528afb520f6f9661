#include "interval.h"

#include <cfloat>
#include <cmath>

namespace attnkit::cpu {
namespace {

bool is_point(const Interval& a) { return a.lo == a.hi && !a.nan; }
bool holds_zero(const Interval& a) { return a.lo <= 0 && a.hi >= 0; }
bool unbounded(const Interval& a) { return std::isinf(a.lo) || std::isinf(a.hi); }

// The least upper bound, as far as it is known, of float results whose exact value is x and whose error is `ulp`.
double round_up(double x, double ulp) {
  if (std::isinf(x)) return x;
  if (x < 0 && x > -static_cast<double>(FLT_MIN)) return 0;  // may be flushed to zero
  if (std::fabs(x) > static_cast<double>(FLT_MAX)) return x > 0 ? kInf : -static_cast<double>(FLT_MAX);
  if (ulp > 0.5) return x + std::fabs(x) * (ulp + 1) * 0x1p-23;
  // A correctly rounded operator is monotone: an end that a float can hold stays where it is.
  const float rounded = static_cast<float>(x);
  return static_cast<double>(static_cast<double>(rounded) == x ? rounded : std::nextafterf(rounded, INFINITY));
}

Interval widen(const Interval& a, double ulp) { return {-round_up(-a.lo, ulp), round_up(a.hi, ulp), a.nan}; }

Interval neg(const Interval& a) { return {-a.hi, -a.lo, a.nan}; }

Interval add(const Interval& a, const Interval& b) {
  const double lo = a.lo + b.lo, hi = a.hi + b.hi;
  const bool nan = a.nan || b.nan || (a.hi == kInf && b.lo == -kInf) || (a.lo == -kInf && b.hi == kInf);
  return {std::isnan(lo) ? -kInf : lo, std::isnan(hi) ? kInf : hi, nan};
}

// The range over the corners; one that is NaN (0 * inf, inf / inf) stands for 0.
template <class F>
Interval corners(const Interval& a, const Interval& b, bool nan, F f) {
  Interval r = kNothing;
  for (double x : {f(a.lo, b.lo), f(a.lo, b.hi), f(a.hi, b.lo), f(a.hi, b.hi)}) {
    nan |= std::isnan(x);
    x = std::isnan(x) ? 0 : x;
    r = {std::min(r.lo, x), std::max(r.hi, x), false};
  }
  r.nan = nan;
  return r;
}

Interval product(const Interval& a, const Interval& b) {
  // 0 * inf may hide inside the ranges even where no corner shows it
  const bool nan = a.nan || b.nan || (holds_zero(a) && unbounded(b)) || (holds_zero(b) && unbounded(a));
  return corners(a, b, nan, [](double x, double y) { return x * y; });
}

Interval quotient(const Interval& a, const Interval& b) {
  if (holds_zero(b)) return kAnyFloat;
  const bool nan = a.nan || b.nan || (unbounded(a) && unbounded(b));
  return corners(a, b, nan, [](double x, double y) { return x / y; });
}

Interval power(const Interval& a, const Interval& b) {
  if (a.lo <= 0) return kAnyFloat;
  return corners(a, b, a.nan || b.nan, [](double x, double y) { return std::pow(x, y); });
}

template <class F>
Interval monotone(const Interval& a, F f) {
  return {f(a.lo), f(a.hi), a.nan};
}

// An increasing function that is NaN below zero.
template <class F>
Interval from_zero(const Interval& a, F f) {
  if (a.hi < 0) return kAnyFloat;
  return {f(std::max(a.lo, 0.0)), f(a.hi), a.nan || a.lo < 0};
}

Interval rsqrt(const Interval& a) {
  if (a.lo <= 0) return kAnyFloat;  // minus zero gives minus infinity
  return {1 / std::sqrt(a.hi), 1 / std::sqrt(a.lo), a.nan};
}

Interval magnitude(const Interval& a) { return {std::max({a.lo, -a.hi, 0.0}), std::max(-a.lo, a.hi), a.nan}; }

Interval least(const Interval& a, const Interval& b) {
  return {std::min(a.lo, b.lo), std::min(a.hi, b.hi), a.nan || b.nan};
}

Interval greatest(const Interval& a, const Interval& b) {
  return {std::max(a.lo, b.lo), std::max(a.hi, b.hi), a.nan || b.nan};
}

// A divisor that may be zero was refused.
Interval int_floordiv(const Interval& a, const Interval& b) {
  if (holds_zero(b)) return kAnyFloat;
  if (is_point(b) && b.lo > 0) return range_of(std::floor(a.lo / b.lo), std::floor(a.hi / b.lo));  // most: every block
  return corners(a, b, false, [](double x, double y) { return std::floor(x / y); });
}

// Python's: the result has the divisor's sign. Exact where no multiple of a constant divisor lies inside the range.
Interval int_mod(const Interval& a, const Interval& b) {
  if (is_point(b) && b.lo != 0) {
    const double q = std::floor(a.lo / b.lo);
    if (q == std::floor(a.hi / b.lo)) return range_of(a.lo - q * b.lo, a.hi - q * b.lo);
  }
  return range_of(std::min(b.lo + 1, 0.0), std::max(b.hi - 1, 0.0));
}

Interval complement(const Interval& a) { return {-1 - a.hi, -1 - a.lo, a.nan}; }

// The least 2^n of which all values lie in [-2^n, 2^n - 1], which bitwise operators do not leave.
double whole_bits(const Interval& a, const Interval& b) {
  int exponent = 0;
  std::frexp(std::max({a.hi, b.hi, -1 - a.lo, -1 - b.lo}), &exponent);
  return std::ldexp(1.0, exponent);
}

bool fits_int(const Interval& a) { return a.lo >= INT32_MIN && a.hi <= INT32_MAX; }
bool known_bits(const Interval& a, const Interval& b) { return is_point(a) && is_point(b); }
int64_t bits(const Interval& a) { return static_cast<int64_t>(a.lo); }
Interval point_of(int64_t x) { return range_of(static_cast<double>(x), static_cast<double>(x)); }

// Never more than an operand that is not negative, nor than the lesser of two that are.
Interval int_and(const Interval& a, const Interval& b) {
  if (!fits_int(a) || !fits_int(b)) return kAnyFloat;
  if (known_bits(a, b)) return point_of(bits(a) & bits(b));
  const bool negative = a.lo < 0 && b.lo < 0;
  double most = std::max(a.hi, b.hi);
  if (a.lo >= 0) most = a.hi;
  if (b.lo >= 0) most = std::min(most, b.hi);
  if (a.hi < 0 && b.hi < 0) most = std::min(a.hi, b.hi);
  return range_of(negative ? -whole_bits(a, b) : 0, most);
}
Interval int_or(const Interval& a, const Interval& b) { return complement(int_and(complement(a), complement(b))); }
Interval int_xor(const Interval& a, const Interval& b) {
  if (!fits_int(a) || !fits_int(b)) return kAnyFloat;
  if (known_bits(a, b)) return point_of(bits(a) ^ bits(b));
  const double end = whole_bits(a, b);
  const bool alike = (a.lo >= 0 && b.lo >= 0) || (a.hi < 0 && b.hi < 0);
  const bool unlike = (a.lo >= 0 && b.hi < 0) || (a.hi < 0 && b.lo >= 0);
  return range_of(alike ? 0 : -end, unlike ? -1 : end - 1);
}

// Comparisons with NaN are false, so NaN spoils only the answer "always true".
Interval less(const Interval& a, const Interval& b) { return decided(a.hi < b.lo && !a.nan && !b.nan, a.lo < b.hi); }
Interval less_equal(const Interval& a, const Interval& b) {
  return decided(a.hi <= b.lo && !a.nan && !b.nan, a.lo <= b.hi);
}
Interval equal(const Interval& a, const Interval& b) {
  return decided(is_point(a) && is_point(b) && a.lo == b.lo, a.lo <= b.hi && b.lo <= a.hi);
}
Interval negated(const Interval& a) { return range_of(1 - a.hi, 1 - a.lo); }

}  // namespace

Interval apply(Op op, const Interval* const* args) {
  const Interval &a = *args[0], &b = *args[1];  // b is not looked at where there is none
  switch (op) {
    case Op::neg_i:
    case Op::neg_f: return neg(a);
    case Op::abs_i:
    case Op::abs_f: return magnitude(a);
    case Op::add_i: return add(a, b);
    case Op::sub_i: return add(a, neg(b));
    case Op::mul_i: return product(a, b);
    case Op::floordiv_i: return int_floordiv(a, b);
    case Op::mod_i: return int_mod(a, b);
    case Op::min_i:
    case Op::min_f: return least(a, b);
    case Op::max_i:
    case Op::max_f: return greatest(a, b);
    case Op::add_f: return widen(add(a, b), 0.5);
    case Op::sub_f: return widen(add(a, neg(b)), 0.5);
    case Op::mul_f: return widen(product(a, b), 0.5);
    case Op::div_f: return widen(quotient(a, b), 0.5);
    case Op::pow_f: return widen(power(a, b), 16);
    case Op::exp_f: return widen(monotone(a, [](double x) { return std::exp(x); }), 2);
    case Op::exp2_f: return widen(monotone(a, [](double x) { return std::exp2(x); }), 2);
    case Op::log_f: return widen(from_zero(a, [](double x) { return std::log(x); }), 2);
    case Op::log2_f: return widen(from_zero(a, [](double x) { return std::log2(x); }), 2);
    case Op::sqrt_f: return widen(from_zero(a, [](double x) { return std::sqrt(x); }), 0.5);
    case Op::rsqrt_f: return widen(rsqrt(a), 2);
    case Op::tanh_f: return widen(monotone(a, [](double x) { return std::tanh(x); }), 4);
    case Op::sigmoid_f: return widen(monotone(a, [](double x) { return 1 / (1 + std::exp(-x)); }), 4);
    case Op::erf_f: return widen(monotone(a, [](double x) { return std::erf(x); }), 4);
    case Op::sin_f:
    case Op::cos_f: return widen({-1, 1, a.nan || unbounded(a)}, 4);
    case Op::floor_f: return monotone(a, [](double x) { return std::floor(x); });
    case Op::lt_f:
    case Op::lt_i: return less(a, b);
    case Op::le_f:
    case Op::le_i: return less_equal(a, b);
    case Op::gt_f:
    case Op::gt_i: return less(b, a);
    case Op::ge_f:
    case Op::ge_i: return less_equal(b, a);
    case Op::eq_f:
    case Op::eq_i:
    case Op::eq_b: return equal(a, b);
    case Op::ne_f:
    case Op::ne_i:
    case Op::ne_b:
    case Op::xor_b: return negated(equal(a, b));
    case Op::and_i: return int_and(a, b);
    case Op::or_i: return int_or(a, b);
    case Op::xor_i: return int_xor(a, b);
    case Op::and_b: return least(a, b);
    case Op::or_b: return greatest(a, b);
    case Op::not_b: return negated(a);
    case Op::where_f:
    case Op::where_i:
    case Op::where_b: return a.lo == 1 ? b : a.hi == 0 ? *args[2] : hull(b, *args[2]);
    case Op::i_to_f: return widen(a, 0.5);
    case Op::b_to_f:
    case Op::b_to_i: return a;
    case Op::f_to_i:  // what it makes of NaN and of what 32 bits do not hold is not specified
      if (a.nan || a.lo <= INT32_MIN || a.hi >= INT32_MAX) return kAnyFloat;
      return monotone(a, [](double x) { return std::trunc(x); });
    default: return kAnyFloat;  // floor division and remainder of floats step, and a last bit decides on which side
  }
}

}  // namespace attnkit::cpu
