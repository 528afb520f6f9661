#include "analysis.h"

#include <new>

namespace attnkit::cpu {
namespace {

Interval as_interval(const Range& r) { return range_of(static_cast<double>(r.lo), static_cast<double>(r.hi)); }

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
    box.lo[d] = static_cast<int64_t>(std::clamp(index.lo, 0.0, std::max(last, 0.0)));
    box.hi[d] = static_cast<int64_t>(std::clamp(index.hi, 0.0, std::max(last, 0.0)));
  }
  if (facts_ != nullptr) {
    facts_->load_in_bounds[i] = in_bounds;
    facts_->all_loads_in_bounds &= in_bounds;
    if (in.for_mask) facts_->mask_loads_in_bounds &= in_bounds;
  }
  if (empty) return in.op == Op::load_f ? kAnyFloat : range_of(0, 0);  // a pair that exists is a fault at run time
  return zones_.load(i, box, facts_ != nullptr);
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
    case Op::eq_i: return decided(lo == 0 && hi == 0, lo <= 0 && hi >= 0);
    case Op::ne_i: return decided(lo > 0 || hi < 0, lo != 0 || hi != 0);
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
    case Op::var_s: return kAnyFloat;
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

Facts Analysis::prove() {
  Facts facts;
  facts.load_in_bounds.assign(program_.code.size(), 0);
  frame_ = {{0, std::max(problem_.num_sequences - 1, 0)},
            {0, std::max(problem_.num_heads - 1, 0)},
            {INT64_MAX, 0},
            {INT64_MAX, 0}};
  for (int32_t n = 0; n < problem_.num_sequences; ++n) {
    const Sequence& s = problem_.sequences[n];
    if (s.q_len == 0 || s.kv_len == 0) continue;
    frame_.q_len = {std::min(frame_.q_len.lo, s.q_len), std::max(frame_.q_len.hi, s.q_len)};
    frame_.kv_len = {std::min(frame_.kv_len.lo, s.kv_len), std::max(frame_.kv_len.hi, s.kv_len)};
  }
  if (frame_.q_len.hi == 0) return facts;  // no pairs: nothing is evaluated
  q_ = {0, frame_.q_len.hi - 1};
  kv_ = {0, frame_.kv_len.hi - 1};
  facts_ = &facts;
  for (size_t i = 0; i < program_.code.size(); ++i) {
    const Instruction& in = program_.code[i];
    if (!in.for_score && !in.for_mask) continue;
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

}  // namespace attnkit::cpu
