#include "analysis.h"

#include <cstdlib>
#include <new>
#include <numeric>
#include <tuple>
#include <utility>

namespace attnkit::cpu {
namespace {

constexpr int kMaxLooks = 256;  // much less work than a tile

Interval as_interval(const Range& r) { return range_of(static_cast<double>(r.lo), static_cast<double>(r.hi)); }

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// The x with b x = 1 modulo a, for coprime a > 0 and b.
int64_t inverse(int64_t b, int64_t a) {
  int64_t r0 = a, r1 = b, x0 = 0, x1 = 1;
  while (r1 != 0) {
    const int64_t q = r0 / r1;
    std::tie(r0, r1) = std::pair(r1, r0 - q * r1);
    std::tie(x0, x1) = std::pair(x1, x0 - q * x1);
  }
  return floor_mod(x0, a);
}

}  // namespace

Analysis::Analysis(const Program& program, const Problem& problem, const Analysis* proven)
    : program_(program),
      problem_(problem),
      zones_(program, problem, proven == nullptr ? nullptr : &proven->zones_),
      value_(program.code.size()) {}

Interval Analysis::eval_load(const Instruction& in, size_t i) {
  const Buffer& buf = problem_.buffers[in.attr];
  IndexBox box;
  bool in_bounds = true, empty = false;
  for (int d = 0; d < in.nargs; ++d) {
    const Interval& index = value_[static_cast<size_t>(in.args[d])];
    const double last = static_cast<double>(buf.size[d] - 1);
    in_bounds &= index.lo >= 0 && index.hi <= last;
    empty |= last < 0;
    // The kernel clamps what is not proven, so clamping here describes what it reads.
    // Before anything is proven a bound may even be NaN, and comparisons with it are false.
    const double most = std::max(last, 0.0);
    box.lo[d] = index.lo > 0 ? static_cast<int64_t>(std::min(index.lo, most)) : 0;
    box.hi[d] = static_cast<int64_t>(index.hi < most ? std::max(index.hi, 0.0) : most);
  }
  if (facts_ != nullptr) {
    facts_->load_in_bounds[i] = in_bounds;
    facts_->all_loads_in_bounds &= in_bounds;
    if (in.for_mask) facts_->mask_loads_in_bounds &= in_bounds;
  }
  if (empty) return in.op == Op::load_f ? kAnyFloat : range_of(0, 0);  // a pair that exists is a fault at run time
  return zones_.load(i, box, facts_ != nullptr);
}

// Whether a form is 0 nowhere though its range holds 0, such as 2 q - 128 kv - 1: are there whole x and y in their
// ranges with a x + b y + c = 0? Exact where at most two of its values vary.
bool Analysis::avoids_zero(const BoxStep& step) const {
  struct {
    int64_t factor, lo, hi;
  } v[2] = {};
  int varying = 0;
  auto c = static_cast<int64_t>(step.constant);
  for (int32_t t = 0; t < step.count; ++t) {
    const Term& term = program_.boxes.terms[static_cast<size_t>(step.first + t)];
    const Interval& range = value_[static_cast<size_t>(term.value)];
    const auto factor = static_cast<int64_t>(term.factor);
    if (range.lo == range.hi) {
      c += factor * static_cast<int64_t>(range.lo);
    } else {
      if (varying == 2) return false;
      v[varying++] = {factor, static_cast<int64_t>(range.lo), static_cast<int64_t>(range.hi)};
    }
  }
  const int64_t common = std::gcd(v[0].factor, v[1].factor);
  if (common == 0) return false;  // nothing varies
  if (c % common != 0) return true;
  if (varying < 2) return false;
  const int64_t a = std::abs(v[0].factor / common), b = v[1].factor / common;
  c /= common;
  const int64_t ax[2] = {v[0].factor / common * v[0].lo, v[0].factor / common * v[0].hi};
  // b y = -c modulo a, and a x = -(b y + c) bounds y by the range of x.
  const int64_t residue = floor_mod(floor_mod(-c, a) * inverse(floor_mod(b, a), a), a);
  int64_t least = -(std::max(ax[0], ax[1]) + c), most = -(std::min(ax[0], ax[1]) + c);  // of b y
  if (b < 0) std::swap(least, most);
  int64_t first = std::max(v[1].lo, -floor_div(-least, b));
  first += floor_mod(residue - first, a);
  return first > std::min(v[1].hi, floor_div(most, b));
}

// A linear form, or the comparison of one with 0.
Interval Analysis::eval_sum(const Instruction& in, const BoxStep& step) {
  double lo = step.constant, hi = step.constant;
  const Term* term = program_.boxes.terms.data() + step.first;
  for (int32_t t = 0; t < step.count; ++t) {
    const Interval& v = value_[static_cast<size_t>(term[t].value)];
    const double f = term[t].factor;
    lo += f * (f > 0 ? v.lo : v.hi);
    hi += f * (f > 0 ? v.hi : v.lo);
  }
  switch (in.op) {
    case Op::lt_i: return decided(hi < 0, lo < 0);
    case Op::le_i: return decided(hi <= 0, lo <= 0);
    case Op::gt_i: return decided(lo > 0, hi > 0);
    case Op::ge_i: return decided(lo >= 0, hi >= 0);
    case Op::eq_i: return decided(lo == 0 && hi == 0, lo <= 0 && hi >= 0 && (step.unit || !avoids_zero(step)));
    case Op::ne_i: return decided(lo > 0 || hi < 0 || (!step.unit && avoids_zero(step)), lo != 0 || hi != 0);
    default: return range_of(lo, hi);
  }
}

Interval Analysis::evaluate(size_t i) {
  const Instruction& in = program_.code[i];
  const BoxStep& step = program_.boxes.steps[i];
  if (step.linear) return eval_sum(in, step);
  switch (in.op) {
    case Op::const_f: {
      const float x = __builtin_bit_cast(float, in.attr);
      return x != x ? kAnyFloat : range_of(static_cast<double>(x), static_cast<double>(x));
    }
    case Op::const_b: return range_of(in.attr, in.attr);
    case Op::var_b: return as_interval(frame_.b);
    case Op::var_h: return as_interval(frame_.h);
    case Op::var_q_idx: return as_interval(q_);
    case Op::var_kv_idx: return as_interval(kv_);
    case Op::var_q_len: return as_interval(frame_.q_len);
    case Op::var_kv_len: return as_interval(frame_.kv_len);
    case Op::var_s:
    case Op::var_f: return kAnyFloat;
    case Op::param: {
      const double x = static_cast<double>(problem_.params[in.attr]);
      return x != x ? kAnyFloat : range_of(x, x);
    }
    case Op::load_f:
    case Op::load_i:
    case Op::load_b: return eval_load(in, i);
    default: {
      const Interval* args[kMaxArgs];
      for (int a = 0; a < kMaxArgs; ++a) args[a] = &value_[a < in.nargs ? static_cast<size_t>(in.args[a]) : 0];
      return apply(in.op, args);
    }
  }
}

// Built in place: a copy of an interval just written waits for its parts to reach the cache.
void Analysis::eval(size_t i) { new (&value_[i]) Interval(evaluate(i)); }

Facts Analysis::prove(bool mask_only) {
  Facts facts;
  facts.load_in_bounds.assign(program_.code.size(), 0);
  frame_ = {{0, 0}, {0, std::max(problem_.num_heads - 1, 0)}, {INT64_MAX, 0}, {INT64_MAX, 0}};
  for (int32_t n = 0; n < problem_.num_sequences; ++n) {
    const Sequence& s = problem_.sequences[n];
    frame_.b.hi = std::max<int64_t>(frame_.b.hi, problem_.entry_of(n));
    if (s.q_len == 0 || s.kv_len == 0) continue;
    const int64_t q_len = problem_.q_len_of(n), kv_len = problem_.kv_len_of(n);
    frame_.q_len = {std::min(frame_.q_len.lo, q_len), std::max(frame_.q_len.hi, q_len)};
    frame_.kv_len = {std::min(frame_.kv_len.lo, kv_len), std::max(frame_.kv_len.hi, kv_len)};
  }
  if (frame_.q_len.hi == 0) return facts;  // no pairs: nothing is evaluated
  q_ = {0, frame_.q_len.hi - 1};
  kv_ = {0, frame_.kv_len.hi - 1};
  facts_ = &facts;
  for (size_t i = 0; i < program_.code.size(); ++i) {
    const Instruction& in = program_.code[i];
    if (!in.for_mask && (mask_only || !in.for_score)) continue;
    if (in.op == Op::floordiv_i || in.op == Op::mod_i) {
      const Interval& divisor = value_[static_cast<size_t>(in.args[1])];
      if (divisor.lo <= 0 && divisor.hi >= 0) {
        facts.status = {Fault::div_zero, static_cast<int32_t>(i)};
        break;
      }
    }
    eval(i);
    // Lanes are 32 bits wide. Doubles hold every sum and product of two 32-bit integers exactly enough to see it.
    const bool fits = value_[i].lo >= INT32_MIN && value_[i].hi <= INT32_MAX && !value_[i].nan;
    if (signature(in.op).result == 'i' && !fits) {
      facts.status = {Fault::int_range, static_cast<int32_t>(i)};
      break;
    }
  }
  facts_ = nullptr;
  stale_frame_ = stale_q_ = stale_kv_ = true;
  return facts;
}

void Analysis::eval_order(int reads) {
  for (int32_t i : program_.boxes.order[reads]) eval(static_cast<size_t>(i));
}

void Analysis::frame(const Frame& frame) {
  if (!stale_frame_ && frame == frame_) return;
  frame_ = frame;
  stale_frame_ = false;
  eval_order(0);
  stale_q_ = stale_kv_ = true;
}

void Analysis::queries(Range q) {
  if (!stale_q_ && q == q_) return;
  q_ = q;
  stale_q_ = false;
  eval_order(kReadsQuery);
}

Block Analysis::classify(Range kv) {
  if (program_.mask < 0) return Block::full;
  if (stale_kv_ || kv != kv_) {
    kv_ = kv;
    stale_kv_ = false;
    eval_order(kReadsKey);
  }
  eval_order(kReadsPair);
  const Interval& mask = value_[static_cast<size_t>(program_.mask)];
  if (mask.hi == 0) return Block::empty;
  return mask.lo == 1 ? Block::full : Block::partial;
}

Block Analysis::settle(Range q, Range kv) {
  struct Part {
    Range q, kv;
    Block block;
  };
  bool seen[3] = {};  // by Block
  int looks = 0;
  const auto look = [&](Part part) {
    queries(part.q);
    part.block = classify(part.kv);
    seen[static_cast<size_t>(part.block)] = true;
    ++looks;
    return part;
  };
  const auto both = [&] { return seen[static_cast<size_t>(Block::full)] && seen[static_cast<size_t>(Block::empty)]; };
  // The corners tell most boxes on the border of a band, the first two those of a document.
  for (const auto& [i, j] : {std::pair{q.lo, kv.hi}, {q.hi, kv.lo}, {q.lo, kv.lo}, {q.hi, kv.hi}}) {
    look({{i, i}, {j, j}, Block::partial});
    if (both()) return Block::partial;
  }
  std::vector<Part> open{{q, kv, Block::partial}};
  while (!open.empty()) {
    const Part part = open.back();
    open.pop_back();
    const bool tall = part.q.lo < part.q.hi, wide = part.kv.lo < part.kv.hi;
    if ((!tall && !wide) || looks >= kMaxLooks) return Block::partial;  // floats may leave even one pair open
    // Cut where that decides more: one cut across a border is worth many along it.
    Part cuts[2][2];
    int decided[2] = {-1, -1};
    for (int side : {0, 1}) {
      if (!(side == 0 ? tall : wide)) continue;
      const Range& r = side == 0 ? part.q : part.kv;
      const int64_t middle = r.lo + (r.hi - r.lo) / 2;
      decided[side] = 0;
      for (int end : {0, 1}) {
        Part half = part;
        (side == 0 ? half.q : half.kv) = end == 0 ? Range{r.lo, middle} : Range{middle + 1, r.hi};
        cuts[side][end] = look(half);
        if (both()) return Block::partial;
        decided[side] += cuts[side][end].block != Block::partial;
      }
    }
    const bool longer = part.kv.hi - part.kv.lo > part.q.hi - part.q.lo;
    for (const Part& half : cuts[decided[1] > decided[0] || (decided[1] == decided[0] && longer)])
      if (half.block == Block::partial) open.push_back(half);
  }
  return seen[static_cast<size_t>(Block::full)] ? Block::full : Block::empty;
}

}  // namespace attnkit::cpu
