#include "linear.h"

#include <cmath>

#include "bytecode.h"

namespace attnkit::cpu {
namespace {

// Doubles hold every sum of such a form exactly: values fit 32 bits.
constexpr double kMaxFactors = 0x1p21, kMaxConstant = 0x1p51;
constexpr size_t kMaxTerms = 8;

struct Form {
  std::vector<Term> terms;  // by value, no factor is 0
  double constant = 0;

  bool fits() const {
    double factors = 0;
    for (const Term& t : terms) factors += std::fabs(t.factor);
    return terms.size() <= kMaxTerms && factors <= kMaxFactors && std::fabs(constant) <= kMaxConstant;
  }
};

// a + factor * b
Form sum(const Form& a, const Form& b, double factor) {
  Form out{{}, a.constant + factor * b.constant};
  size_t i = 0, j = 0;
  while (i < a.terms.size() || j < b.terms.size()) {
    const bool from_a = i < a.terms.size() && (j == b.terms.size() || a.terms[i].value <= b.terms[j].value);
    const bool from_b = j < b.terms.size() && (i == a.terms.size() || b.terms[j].value <= a.terms[i].value);
    const int32_t value = from_a ? a.terms[i].value : b.terms[j].value;
    double total = 0;
    if (from_a) total += a.terms[i++].factor;
    if (from_b) total += factor * b.terms[j++].factor;
    if (total != 0) out.terms.push_back({value, total});
  }
  return out;
}

// The form of instruction i in those of its arguments; false if it is no sum.
bool form_of(const Instruction& in, const std::vector<Form>& forms, Form& out) {
  const auto arg = [&](int k) -> const Form& { return forms[static_cast<size_t>(in.args[k])]; };
  switch (in.op) {
    case Op::const_i: out = {{}, static_cast<double>(in.attr)}; break;
    case Op::neg_i: out = sum({}, arg(0), -1); break;
    case Op::add_i: out = sum(arg(0), arg(1), 1); break;
    case Op::mul_i: {
      const int constant = arg(0).terms.empty() ? 0 : 1;
      if (!arg(constant).terms.empty()) return false;
      out = sum({}, arg(1 - constant), arg(constant).constant);
      break;
    }
    case Op::sub_i:
    case Op::lt_i:
    case Op::le_i:
    case Op::gt_i:
    case Op::ge_i:
    case Op::eq_i:
    case Op::ne_i: out = sum(arg(0), arg(1), -1); break;
    default: return false;
  }
  return out.fits();
}

uint8_t leaf_reads(Op op) {
  switch (op) {
    case Op::var_q_idx: return kReadsQuery;
    case Op::var_kv_idx: return kReadsKey;
    case Op::var_b: return kReadsBatch;
    case Op::var_h: return kReadsHead;
    default: return 0;  // lengths too: whoever looks at several sequences looks at their lengths
  }
}

bool is_load(Op op) { return op == Op::load_f || op == Op::load_i || op == Op::load_b; }

void plan_load(const Instruction& in, const std::vector<BoxStep>& steps, BoxStep& step) {
  const auto reads = [&](int d) { return steps[static_cast<size_t>(in.args[d])].reads; };
  int line = in.nargs - 1;
  for (uint8_t wanted : {kReadsQuery, kReadsKey})  // keys count more: they vary within a row
    for (int d = 0; d < in.nargs; ++d)
      if (reads(d) & wanted) line = d;
  for (int d = 0; d < in.nargs; ++d)
    if (d != line) {
      step.plane |= (reads(d) & kReadsPair) != 0;
      step.wild |= (reads(d) & kReadsKey) != 0;
    }
  step.line = static_cast<int8_t>(line);
}

}  // namespace

BoxPlan plan_boxes(const std::vector<Instruction>& code, int mask) {
  BoxPlan plan;
  std::vector<Form> forms(code.size());
  for (size_t i = 0; i < code.size(); ++i) {
    const Instruction& in = code[i];
    BoxStep step;
    Form form;
    step.linear = form_of(in, forms, form);
    step.reads = leaf_reads(in.op);
    if (step.linear) {
      step.constant = form.constant;
      step.first = static_cast<int32_t>(plan.terms.size());
      step.count = static_cast<int32_t>(form.terms.size());
      plan.terms.insert(plan.terms.end(), form.terms.begin(), form.terms.end());
      for (const Term& t : form.terms) {
        step.reads |= plan.steps[static_cast<size_t>(t.value)].reads;
        step.unit &= std::fabs(t.factor) == 1;
      }
    } else {
      for (int a = 0; a < in.nargs; ++a) step.reads |= plan.steps[static_cast<size_t>(in.args[a])].reads;
    }
    if (is_load(in.op)) plan_load(in, plan.steps, step);
    const bool is_sum = step.linear && signature(in.op).result == 'i';
    forms[i] = is_sum ? std::move(form) : Form{{{static_cast<int32_t>(i), 1.0}}, 0};
    plan.steps.push_back(step);
  }
  if (mask < 0) return plan;
  plan.mask_reads = plan.steps[static_cast<size_t>(mask)].reads;
  std::vector<bool> needed(code.size(), false);
  needed[static_cast<size_t>(mask)] = true;
  for (size_t i = static_cast<size_t>(mask) + 1; i-- > 0;) {
    if (!needed[i]) continue;
    const BoxStep& step = plan.steps[i];
    if (step.linear)
      for (int32_t t = 0; t < step.count; ++t)
        needed[static_cast<size_t>(plan.terms[static_cast<size_t>(step.first + t)].value)] = true;
    else
      for (int a = 0; a < code[i].nargs; ++a) needed[static_cast<size_t>(code[i].args[a])] = true;
    plan.dense |= is_load(code[i].op) && step.plane && (step.reads & kReadsPair) == kReadsPair;
  }
  for (size_t i = 0; i < code.size(); ++i)
    if (needed[i]) plan.order[plan.steps[i].reads & kReadsPair].push_back(static_cast<int32_t>(i));
  return plan;
}

}  // namespace attnkit::cpu
