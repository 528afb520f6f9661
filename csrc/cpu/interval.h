// Intervals, and what each operator makes of them. The rules are those of python/attnkit/ir/intervals.py.
#pragma once
#include <algorithm>
#include <limits>

#include "bytecode.h"

namespace attnkit::cpu {

struct Interval {
  double lo, hi;  // exact for ints and bools, rounded outward for floats
  bool nan;       // a float that may be NaN
};

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr Interval kAnyFloat{-kInf, kInf, true};
inline constexpr Interval kAnyBool{0, 1, false};
inline constexpr Interval kNothing{kInf, -kInf, false};  // the hull of no values

inline Interval range_of(double lo, double hi) { return {lo, hi, false}; }
inline Interval decided(bool surely, bool possibly) { return {surely ? 1.0 : 0.0, possibly ? 1.0 : 0.0, false}; }
inline Interval hull(const Interval& a, const Interval& b) {
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi), a.nan || b.nan};
}

inline void extend(Interval& a, const Interval& b) {
  a.lo = std::min(a.lo, b.lo);
  a.hi = std::max(a.hi, b.hi);
  a.nan |= b.nan;
}

// What an operator gives on its arguments' ranges: any opcode but leaves and loads. Integers are taken to fit 32 bits,
// which `Analysis::prove` has seen to.
Interval apply(Op op, const Interval* const* args);

}  // namespace attnkit::cpu
