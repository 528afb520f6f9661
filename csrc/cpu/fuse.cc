#include "fuse.h"

#include <algorithm>

namespace attnkit::cpu {
namespace {

// An expression as a tree: node 0 is the last instruction; an argument is a node, or (~n) operand n of what it becomes.
struct Node {
  Op op;
  int args[2];
};
struct Pattern {
  Op becomes;
  std::vector<Node> nodes;
};

// What comes first is looked for first, everywhere.
const Pattern kPatterns[] = {
    // c * tanh(x / c)
    {Op::softcap, {{Op::mul_f, {1, ~1}}, {Op::tanh_f, {2}}, {Op::div_f, {~0, ~1}}}},
    // x + y * |i - j| and x - y * |i - j|, as ALiBi has it
    {Op::add_gap,
     {{Op::add_f, {~0, 1}}, {Op::mul_f, {~1, 2}}, {Op::i_to_f, {3}}, {Op::abs_i, {4}}, {Op::sub_i, {~2, ~3}}}},
    {Op::sub_gap,
     {{Op::sub_f, {~0, 1}}, {Op::mul_f, {~1, 2}}, {Op::i_to_f, {3}}, {Op::abs_i, {4}}, {Op::sub_i, {~2, ~3}}}},
    // the same without the bars
    {Op::add_ramp, {{Op::add_f, {~0, 1}}, {Op::mul_f, {~1, 2}}, {Op::i_to_f, {3}}, {Op::sub_i, {~2, ~3}}}},
    {Op::add_ramp, {{Op::sub_f, {~0, 1}}, {Op::mul_f, {~1, 2}}, {Op::i_to_f, {3}}, {Op::sub_i, {~3, ~2}}}},
    // x * y + z and z - x * y
    {Op::mul_add, {{Op::add_f, {1, ~2}}, {Op::mul_f, {~0, ~1}}}},
    {Op::mul_sub_from, {{Op::sub_f, {~2, 1}}, {Op::mul_f, {~0, ~1}}}},
    // y <= x <= z, as windows have it
    {Op::within, {{Op::and_b, {1, 2}}, {Op::ge_i, {~0, ~1}}, {Op::le_i, {~0, ~2}}}},
};

bool commutes(Op op) { return op == Op::add_f || op == Op::mul_f || op == Op::and_b; }

class Matcher {
 public:
  Matcher(const std::vector<Instruction>& code, const Roots& roots) : code_(code), uses_(code.size(), 0) {
    const auto use = [&](int32_t i, int times = 1) {
      if (i >= 0) uses_[static_cast<size_t>(i)] += times;
    };
    for (const Instruction& in : code)
      if (in.for_score || in.for_mask)
        for (int a = 0; a < in.nargs; ++a) use(in.args[a]);
    constexpr int kMany = 2;  // what others than instructions read must be there
    for (int root : {roots.score, roots.mask, roots.slope, roots.slope_f}) use(root, kMany);
    for (const LoadSlope& load : roots.loads) {
      use(load.slope, kMany);
      const Instruction& in = code[static_cast<size_t>(load.load)];
      for (int a = 0; a < in.nargs; ++a) use(in.args[a], kMany);
    }
  }

  // Whether instruction i computes the pattern. Then `operands` and `inner` are set.
  bool match(const Pattern& pattern, int32_t i) {
    pattern_ = &pattern;
    operands.assign(kMaxArgs, -1);
    inner.clear();
    return node(0, i);
  }

  std::vector<int32_t> operands, inner;

 private:
  bool node(int n, int32_t i) {
    const Instruction& in = code_[static_cast<size_t>(i)];
    const Node& want = pattern_->nodes[static_cast<size_t>(n)];
    if (in.op != want.op || in.rank != kTile) return false;
    if (n > 0 && uses_[static_cast<size_t>(i)] != 1) return false;
    if (n > 0) inner.push_back(i);
    const auto operands_before = operands, inner_before = inner;
    const auto all = [&](bool swapped) {
      for (int a = 0; a < in.nargs; ++a)
        if (!arg(want.args[a], in.args[swapped ? 1 - a : a])) return false;
      return true;
    };
    if (all(false)) return true;
    operands = operands_before;
    inner = inner_before;
    return commutes(in.op) && all(true);
  }

  bool arg(int want, int32_t i) {
    if (want >= 0) return node(want, i);
    int32_t& operand = operands[static_cast<size_t>(~want)];
    if (operand < 0) operand = i;
    return operand == i;
  }

  const std::vector<Instruction>& code_;
  std::vector<int> uses_;
  const Pattern* pattern_ = nullptr;
};

}  // namespace

std::vector<Instruction> fuse(const std::vector<Instruction>& code, const Roots& roots) {
  std::vector<Instruction> run = code;
  Matcher matcher(run, roots);
  for (const Pattern& pattern : kPatterns)
    for (size_t i = run.size(); i-- > 0;) {
      Instruction& in = run[i];
      if (!(in.for_score || in.for_mask) || !matcher.match(pattern, static_cast<int32_t>(i))) continue;
      for (int32_t n : matcher.inner)
        run[static_cast<size_t>(n)].for_score = run[static_cast<size_t>(n)].for_mask = false;
      in.op = pattern.becomes;
      in.nargs = static_cast<uint8_t>(
          std::count_if(matcher.operands.begin(), matcher.operands.end(), [](int32_t n) { return n >= 0; }));
      std::copy(matcher.operands.begin(), matcher.operands.end(), in.args);
    }
  return run;
}

}  // namespace attnkit::cpu
