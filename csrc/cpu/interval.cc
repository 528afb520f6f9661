#include "interval.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace attnkit::cpu {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr Interval kAnyFloat{-kInf, kInf, true};
constexpr Interval kAnyBool{0, 1, false};
// Scanning a longer stretch of a buffer costs more than the tiles it could save.
constexpr int64_t kMaxScan = int64_t{1} << 22;

Interval point(double x) { return {x, x, false}; }
Interval ints(double lo, double hi) { return {lo, hi, false}; }
bool is_point(const Interval& a) { return a.lo == a.hi && !a.nan; }
bool finite(const Interval& a) { return !a.nan && std::isfinite(a.lo) && std::isfinite(a.hi); }

// The engine rounds to float; one step outward covers any correctly rounded operation.
Interval outward(double lo, double hi) {
  const auto down = [](double x) { return static_cast<double>(std::nextafterf(static_cast<float>(x), -INFINITY)); };
  const auto up = [](double x) { return static_cast<double>(std::nextafterf(static_cast<float>(x), INFINITY)); };
  return {down(lo), up(hi), false};
}

Interval hull(const Interval& a, const Interval& b) {
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi), a.nan || b.nan};
}

template <class F>
Interval corners(const Interval& a, const Interval& b, F f) {
  const double c[4] = {f(a.lo, b.lo), f(a.lo, b.hi), f(a.hi, b.lo), f(a.hi, b.hi)};
  for (double x : c)
    if (std::isnan(x)) return kAnyFloat;  // 0 * inf: an operand was unbounded
  return ints(*std::min_element(c, c + 4), *std::max_element(c, c + 4));
}

Interval decided(bool surely, bool possibly) { return ints(surely ? 1 : 0, possibly ? 1 : 0); }

Interval less(const Interval& a, const Interval& b, bool or_equal) {
  const bool surely = or_equal ? a.hi <= b.lo : a.hi < b.lo;
  const bool possibly = or_equal ? a.lo <= b.hi : a.lo < b.hi;
  return decided(surely && !a.nan && !b.nan, possibly);
}

Interval equal(const Interval& a, const Interval& b) {
  const bool overlap = a.lo <= b.hi && b.lo <= a.hi;
  return decided(is_point(a) && is_point(b) && a.lo == b.lo, overlap);
}

Interval negated(const Interval& a) { return ints(1 - a.hi, 1 - a.lo); }

Interval magnitude(const Interval& a) {
  if (a.lo >= 0) return a;
  if (a.hi <= 0) return {-a.hi, -a.lo, a.nan};
  return {0, std::max(-a.lo, a.hi), a.nan};
}

Interval int_floordiv(const Interval& a, const Interval& b) {
  if (b.lo <= 0 && b.hi >= 0) return kAnyFloat;
  return corners(a, b, [](double x, double y) { return std::floor(x / y); });
}

// Python's: the result has the divisor's sign. Exact when no multiple of a constant divisor lies inside the range.
Interval int_mod(const Interval& a, const Interval& b) {
  if (is_point(b) && b.lo != 0) {
    const double q = std::floor(a.lo / b.lo);
    if (q == std::floor(a.hi / b.lo)) {
      const double x = a.lo - q * b.lo, y = a.hi - q * b.lo;
      return ints(std::min(x, y), std::max(x, y));
    }
  }
  return ints(b.lo < 0 ? std::min(b.lo + 1, 0.0) : 0, b.hi > 0 ? std::max(b.hi - 1, 0.0) : 0);
}

double element(const Buffer& buf, int64_t offset) {
  switch (buf.dtype) {
    case DType::f32: return static_cast<double>(static_cast<const float*>(buf.data)[offset]);
    case DType::i32: return static_cast<double>(static_cast<const int32_t*>(buf.data)[offset]);
    case DType::i64: return static_cast<double>(static_cast<const int64_t*>(buf.data)[offset]);
    case DType::u8: return static_cast<const uint8_t*>(buf.data)[offset] != 0 ? 1 : 0;
  }
  return 0;
}

void widen(Interval& r, double x) {
  if (std::isnan(x)) {
    r.nan = true;
  } else {
    r.lo = std::min(r.lo, x);
    r.hi = std::max(r.hi, x);
  }
}

}  // namespace

IntervalAnalysis::IntervalAnalysis(const Program& program, const Problem& problem)
    : program_(program),
      problem_(problem),
      value_(program.code.size()),
      whole_buffer_(static_cast<size_t>(problem.num_buffers), Interval{1, 0, false}) {
  for (size_t i = 0; i < program.code.size(); ++i)
    if (program.code[i].for_mask) mask_code_.push_back(static_cast<int32_t>(i));
}

Interval IntervalAnalysis::buffer_range(size_t b) {
  Interval& r = whole_buffer_[b];
  if (r.lo <= r.hi || r.nan) return r;
  const Buffer& buf = problem_.buffers[b];
  Interval found{kInf, -kInf, false};
  int64_t index[kMaxArgs] = {}, first = 0, extent = 1;
  double count = 1;
  for (int d = 0; d < buf.rank; ++d) {
    if (buf.size[d] == 0) return r = point(0);
    const int64_t reach = (buf.size[d] - 1) * buf.stride[d];
    first += std::min<int64_t>(reach, 0);
    extent += std::abs(reach);
    count *= static_cast<double>(buf.size[d]);
  }
  // Where elements repeat, as in an expanded tensor, the memory is smaller than the tensor.
  if (static_cast<double>(extent) <= count) {
    for (int64_t n = 0; n < extent; ++n) widen(found, element(buf, first + n));
    return r = found.lo <= found.hi ? found : kAnyFloat;
  }
  while (true) {
    int64_t offset = 0;
    for (int d = 0; d < buf.rank; ++d) offset += index[d] * buf.stride[d];
    widen(found, element(buf, offset));
    int d = buf.rank - 1;
    while (d >= 0 && ++index[d] == buf.size[d]) index[d--] = 0;
    if (d < 0) break;
  }
  return r = found.lo <= found.hi ? found : kAnyFloat;
}

Interval IntervalAnalysis::eval_load(const Instruction& in, size_t i) {
  const size_t b = static_cast<size_t>(in.attr);
  const Buffer& buf = problem_.buffers[b];
  int64_t first = 0, count = 1, step = 0;
  int ranged = 0;
  bool in_bounds = true;
  for (int d = 0; d < in.nargs; ++d) {
    const Interval& index = value_[static_cast<size_t>(in.args[d])];
    const double last = static_cast<double>(buf.size[d] - 1);
    if (index.lo < 0 || index.hi > last) in_bounds = false;
    if (last < 0) {  // nothing to read: any pair that exists is a fault at run time
      if (facts_ != nullptr) {
        facts_->load_in_bounds[i] = 0;
        facts_->all_loads_in_bounds = false;
      }
      return in.op == Op::load_f ? kAnyFloat : point(0);
    }
    // The kernel clamps what is not proven, so clamping here describes what it reads.
    // Before anything is proven a bound may even be NaN, and comparisons with it are false.
    const int64_t lo = index.lo > 0 ? static_cast<int64_t>(std::min(index.lo, last)) : 0;
    const int64_t hi = static_cast<int64_t>(index.hi < last ? std::max(index.hi, 0.0) : last);
    first += lo * buf.stride[d];
    if (lo != hi) {
      ++ranged;
      count = hi - lo + 1;
      step = buf.stride[d];
    }
  }
  if (facts_ != nullptr) {
    facts_->load_in_bounds[i] = in_bounds;
    facts_->all_loads_in_bounds &= in_bounds;
  }
  if (ranged > 1 || count > kMaxScan) {
    if (in.op == Op::load_b) return kAnyBool;
    if (in.op == Op::load_f) return kAnyFloat;
    return buffer_range(b);
  }
  Interval r{kInf, -kInf, false};
  for (int64_t n = 0; n < count; ++n) widen(r, element(buf, first + n * step));
  return r.lo <= r.hi ? r : kAnyFloat;
}

Interval IntervalAnalysis::eval(size_t i, const Box& box) {
  const Instruction& in = program_.code[i];
  const auto arg = [&](int k) -> const Interval& { return value_[static_cast<size_t>(in.args[k])]; };
  const auto range = [](const int64_t (&r)[2]) { return ints(static_cast<double>(r[0]), static_cast<double>(r[1])); };
  // Float arithmetic on infinities or NaN is rare in masks and is not followed.
  const bool plain = (in.nargs < 1 || finite(arg(0))) && (in.nargs < 2 || finite(arg(1)));
  switch (in.op) {
    case Op::const_f: {
      const float x = __builtin_bit_cast(float, in.attr);
      return std::isnan(x) ? kAnyFloat : point(static_cast<double>(x));
    }
    case Op::const_i:
    case Op::const_b: return point(in.attr);
    case Op::var_b: return range(box.b);
    case Op::var_h: return range(box.h);
    case Op::var_q_idx: return range(box.q);
    case Op::var_kv_idx: return range(box.kv);
    case Op::var_q_len: return range(box.q_len);
    case Op::var_kv_len: return range(box.kv_len);
    case Op::param: {
      const float x = problem_.params[in.attr];
      return std::isnan(x) ? kAnyFloat : point(static_cast<double>(x));
    }
    case Op::load_f:
    case Op::load_i:
    case Op::load_b: return eval_load(in, i);
    case Op::neg_i:
    case Op::neg_f: return {-arg(0).hi, -arg(0).lo, arg(0).nan};
    case Op::abs_i:
    case Op::abs_f: return magnitude(arg(0));
    case Op::add_i: return ints(arg(0).lo + arg(1).lo, arg(0).hi + arg(1).hi);
    case Op::sub_i: return ints(arg(0).lo - arg(1).hi, arg(0).hi - arg(1).lo);
    case Op::mul_i: return corners(arg(0), arg(1), [](double x, double y) { return x * y; });
    case Op::floordiv_i: return int_floordiv(arg(0), arg(1));
    case Op::mod_i: return int_mod(arg(0), arg(1));
    case Op::min_i: return ints(std::min(arg(0).lo, arg(1).lo), std::min(arg(0).hi, arg(1).hi));
    case Op::max_i: return ints(std::max(arg(0).lo, arg(1).lo), std::max(arg(0).hi, arg(1).hi));
    case Op::add_f: return plain ? outward(arg(0).lo + arg(1).lo, arg(0).hi + arg(1).hi) : kAnyFloat;
    case Op::sub_f: return plain ? outward(arg(0).lo - arg(1).hi, arg(0).hi - arg(1).lo) : kAnyFloat;
    case Op::mul_f: {
      if (!plain) return kAnyFloat;
      const Interval r = corners(arg(0), arg(1), [](double x, double y) { return x * y; });
      return outward(r.lo, r.hi);
    }
    case Op::min_f: return {std::min(arg(0).lo, arg(1).lo), std::min(arg(0).hi, arg(1).hi), arg(0).nan || arg(1).nan};
    case Op::max_f: return {std::max(arg(0).lo, arg(1).lo), std::max(arg(0).hi, arg(1).hi), arg(0).nan || arg(1).nan};
    case Op::floor_f: return plain ? ints(std::floor(arg(0).lo), std::floor(arg(0).hi)) : kAnyFloat;
    case Op::lt_f:
    case Op::lt_i: return less(arg(0), arg(1), false);
    case Op::le_f:
    case Op::le_i: return less(arg(0), arg(1), true);
    case Op::gt_f:
    case Op::gt_i: return less(arg(1), arg(0), false);
    case Op::ge_f:
    case Op::ge_i: return less(arg(1), arg(0), true);
    case Op::eq_f:
    case Op::eq_i:
    case Op::eq_b: return equal(arg(0), arg(1));
    case Op::ne_f:
    case Op::ne_i:
    case Op::ne_b:
    case Op::xor_b: return negated(equal(arg(0), arg(1)));
    case Op::and_b: return ints(std::min(arg(0).lo, arg(1).lo), std::min(arg(0).hi, arg(1).hi));
    case Op::or_b: return ints(std::max(arg(0).lo, arg(1).lo), std::max(arg(0).hi, arg(1).hi));
    case Op::not_b: return negated(arg(0));
    case Op::where_f:
    case Op::where_i:
    case Op::where_b:
      if (arg(0).lo == 1) return arg(1);
      if (arg(0).hi == 0) return arg(2);
      return hull(arg(1), arg(2));
    case Op::i_to_f: {
      const double exact = 16777216;  // 2^24: floats hold every integer up to here
      return arg(0).lo >= -exact && arg(0).hi <= exact ? arg(0) : outward(arg(0).lo, arg(0).hi);
    }
    case Op::b_to_f:
    case Op::b_to_i: return arg(0);
    case Op::f_to_i: {
      if (!finite(arg(0))) return kAnyFloat;
      return ints(std::trunc(arg(0).lo), std::trunc(arg(0).hi));
    }
    default: return kAnyFloat;  // transcendental functions: no mask needs them sharp
  }
}

Facts IntervalAnalysis::prove(const Box& whole) {
  Facts facts;
  facts.load_in_bounds.assign(program_.code.size(), 1);
  facts_ = &facts;
  for (size_t i = 0; i < program_.code.size(); ++i) {
    const Instruction& in = program_.code[i];
    if (!in.for_score && !in.for_mask) continue;
    if ((in.op == Op::floordiv_i || in.op == Op::mod_i)) {
      const Interval& divisor = value_[static_cast<size_t>(in.args[1])];
      if (divisor.lo <= 0 && divisor.hi >= 0) {
        facts.status = {Fault::div_zero, static_cast<int32_t>(i)};
        break;
      }
    }
    value_[i] = eval(i, whole);
    // Lanes are 32 bits wide. Doubles hold every sum and product of two 32-bit integers exactly enough to see it.
    const bool fits = value_[i].lo >= INT32_MIN && value_[i].hi <= INT32_MAX && !value_[i].nan;
    if (signature(in.op).result == 'i' && !fits) {
      facts.status = {Fault::int_range, static_cast<int32_t>(i)};
      break;
    }
  }
  facts_ = nullptr;
  return facts;
}

Block IntervalAnalysis::classify(const Box& box) {
  if (program_.mask < 0) return Block::full;
  for (int32_t i : mask_code_) value_[static_cast<size_t>(i)] = eval(static_cast<size_t>(i), box);
  const Interval& mask = value_[static_cast<size_t>(program_.mask)];
  if (mask.hi == 0) return Block::empty;
  return mask.lo == 1 ? Block::full : Block::partial;
}

}  // namespace attnkit::cpu
