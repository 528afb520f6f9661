#include "bytecode.h"

#include <algorithm>
#include <cstring>

#include "fuse.h"

namespace attnkit::cpu {
namespace {

constexpr OpSignature kSignatures[] = {
#define X(name, result, args) {#name, result, args},
    ATTNKIT_OPCODES(X) ATTNKIT_INTERNAL_OPS(X)
#undef X
};

// Values that lie where nothing computes them.
bool is_given(Op op) { return op == Op::var_s || op == Op::var_f; }

bool is_load(Op op) { return op == Op::load_f || op == Op::load_i || op == Op::load_b; }

Rank leaf_rank(Op op) {
  switch (op) {
    case Op::var_s:
    case Op::var_f: return kTile;
    case Op::var_h:  // a task may hold several heads, in different lanes
    case Op::var_q_idx: return kPerQuery;
    case Op::var_kv_idx: return kPerKey;
    default: return kScalar;
  }
}

std::string at(size_t i, const std::string& what) { return "instruction " + std::to_string(i) + ": " + what; }

// Checks one instruction against the signatures and everything before it.
std::string check(const Program& p, size_t i, const Instruction& in, std::vector<char>& type) {
  const OpSignature& sig = signature(in.op);
  if (is_load(in.op)) {
    if (in.attr < 0 || in.attr >= p.num_buffers) return at(i, "buffer number out of range");
  } else {
    if (in.nargs != std::strlen(sig.args)) return at(i, std::string("wrong number of arguments for ") + sig.name);
    if (in.op == Op::param && (in.attr < 0 || in.attr >= p.num_params)) return at(i, "parameter number out of range");
    if (in.op == Op::const_b && in.attr != 0 && in.attr != 1) return at(i, "a bool constant is 0 or 1");
  }
  for (int a = 0; a < in.nargs; ++a) {
    if (in.args[a] < 0 || static_cast<size_t>(in.args[a]) >= i) return at(i, "argument is not an earlier value");
    const char want = is_load(in.op) ? 'i' : sig.args[a];
    if (type[static_cast<size_t>(in.args[a])] != want)
      return at(i, std::string("argument of the wrong type for ") + sig.name);
  }
  type[i] = sig.result;
  return {};
}

// Marks everything `root` needs. Arguments precede their users, so one backward sweep is enough.
void mark(Program& p, int root, bool Instruction::* flag) {
  if (root < 0) return;
  p.code[static_cast<size_t>(root)].*flag = true;
  for (size_t i = static_cast<size_t>(root) + 1; i-- > 0;) {
    if (!(p.code[i].*flag)) continue;
    for (int a = 0; a < p.code[i].nargs; ++a) p.code[static_cast<size_t>(p.code[i].args[a])].*flag = true;
  }
}

// A score that is all there is to compute may take the place of s: it comes last, and each of its lanes needs but
// itself.
int score_in_place(const Program& p) {
  if (p.score < 0 || p.slope >= 0 || p.slope_f >= 0 || !p.loads.empty()) return -1;
  const Instruction& in = p.run[static_cast<size_t>(p.score)];
  return in.rank == kTile && !is_given(in.op) && !in.for_mask ? p.score : -1;
}

// Tile values are strips in L1, so they share slots by liveness; the others are short vectors and keep their own.
std::string assign_slots(Program& p) {
  const auto& tiles = p.order[kTile];
  std::vector<size_t> last_use(p.code.size(), 0);
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Instruction& in = p.run[static_cast<size_t>(tiles[t])];
    for (int a = 0; a < in.nargs; ++a) last_use[static_cast<size_t>(in.args[a])] = t;
  }
  const auto keep = [&](int root) {
    if (root >= 0) last_use[static_cast<size_t>(root)] = tiles.size();
  };
  for (int root : {p.score, p.mask, p.slope, p.slope_f}) keep(root);
  for (const LoadSlope& load : p.loads) {
    keep(load.slope);
    for (int a = 0; a < p.run[static_cast<size_t>(load.load)].nargs; ++a)
      keep(p.run[static_cast<size_t>(load.load)].args[a]);
  }
  std::vector<int> free_slots;
  for (size_t t = 0; t < tiles.size(); ++t) {
    Instruction& in = p.run[static_cast<size_t>(tiles[t])];
    if (is_given(in.op)) continue;
    if (tiles[t] != p.in_place) {
      if (free_slots.empty()) free_slots.push_back(p.slots[kTile]++);
      in.slot = free_slots.back();
      free_slots.pop_back();
    }
    for (int a = 0; a < in.nargs; ++a) {
      Instruction& arg = p.run[static_cast<size_t>(in.args[a])];
      const bool repeated = std::find(in.args, in.args + a, in.args[a]) != in.args + a;
      if (arg.rank == kTile && !is_given(arg.op) && !repeated && last_use[static_cast<size_t>(in.args[a])] == t)
        free_slots.push_back(arg.slot);
    }
  }
  if (p.slots[kTile] > kMaxTileValues)
    return "the expression keeps " + std::to_string(p.slots[kTile]) + " tiles alive at once, at most " +
           std::to_string(kMaxTileValues) + " fit";
  for (Rank r : {kScalar, kPerQuery, kPerKey})
    for (int32_t i : p.order[r]) p.run[static_cast<size_t>(i)].slot = p.slots[r]++;
  return {};
}

// What a load is as a choice, if it is one.
Choice as_choice(const Program& p, int32_t load) {
  const auto code = [&](int32_t i) -> const Instruction& { return p.code[static_cast<size_t>(i)]; };
  Choice found{load, -1, -1};
  for (int a = 0; a < code(load).nargs; ++a) {
    const int32_t index = code(load).args[a];
    const Instruction& in = code(index);
    const bool by_block = in.op == Op::floordiv_i && code(in.args[0]).op == Op::var_kv_idx &&
                          code(in.args[1]).op == Op::const_i && code(in.args[1]).attr > 0;
    if ((p.boxes.steps[static_cast<size_t>(index)].reads & kReadsPair) == 0) continue;
    if (in.op == Op::var_q_idx && found.query < 0) {
      found.query = a;
    } else if (by_block && found.key < 0) {
      found.key = a;
      found.block = code(in.args[1]).attr;
    } else {
      return {};
    }
  }
  return found.query >= 0 && found.key >= 0 ? found : Choice{};
}

// A factor of the mask that is a choice.
Choice find_choice(const Program& p) {
  std::vector<bool> factor(p.code.size(), false);
  if (p.mask >= 0) factor[static_cast<size_t>(p.mask)] = true;
  for (int32_t i = p.mask; i >= 0; --i) {
    const Instruction& in = p.code[static_cast<size_t>(i)];
    if (!factor[static_cast<size_t>(i)]) continue;
    if (in.op == Op::and_b)
      for (int a : {0, 1}) factor[static_cast<size_t>(in.args[a])] = true;
    if (in.op == Op::load_b)
      if (const Choice found = as_choice(p, i); found.load >= 0) return found;
  }
  return {};
}

}  // namespace

static_assert(std::size(kSignatures) == static_cast<size_t>(Op::all));

const OpSignature& signature(Op op) { return kSignatures[static_cast<size_t>(op)]; }

namespace {

// All but what has to do with a choice.
std::string compile_code(std::span<const int32_t> rows, const Roots& roots, int num_buffers, int num_params,
                         Program& out) {
  Program p;
  p.num_buffers = num_buffers;
  p.num_params = num_params;
  if (num_buffers < 0 || num_params < 0 || num_buffers > 4096 || num_params > 4096)
    return "implausible number of buffers or parameters";
  p.buffer_rank.assign(static_cast<size_t>(num_buffers), 0xff);
  p.buffer_type.assign(static_cast<size_t>(num_buffers), 0);
  if (rows.size() % 8 != 0) return "the code is not a whole number of instructions";
  const size_t n = rows.size() / 8;
  if (n > kMaxInstructions) return "more than " + std::to_string(kMaxInstructions) + " instructions";

  std::vector<char> type(n, 0);
  for (size_t i = 0; i < n; ++i) {
    const int32_t* row = rows.data() + 8 * i;
    if (row[0] < 0 || row[0] >= static_cast<int32_t>(Op::count))
      return at(i, "unknown opcode " + std::to_string(row[0]));
    if (row[2] < 0 || row[2] > kMaxArgs) return at(i, "implausible number of arguments");
    if (row[0] == static_cast<int32_t>(Op::var_f) && !roots.carries) return at(i, "nothing is carried that f could be");
    Instruction in{};
    in.op = static_cast<Op>(row[0]);
    in.attr = row[1];
    in.nargs = static_cast<uint8_t>(row[2]);
    in.slot = -1;
    std::copy(row + 3, row + 3 + kMaxArgs, in.args);
    if (std::string bad = check(p, i, in, type); !bad.empty()) return bad;
    in.rank = leaf_rank(in.op);
    for (int a = 0; a < in.nargs; ++a)
      in.rank = static_cast<Rank>(in.rank | p.code[static_cast<size_t>(in.args[a])].rank);
    if (is_load(in.op)) {
      const size_t b = static_cast<size_t>(in.attr);
      const char want = signature(in.op).result;
      if (p.buffer_rank[b] != 0xff && (p.buffer_rank[b] != in.nargs || p.buffer_type[b] != want))
        return at(i, "a buffer is read with two ranks or types");
      p.buffer_rank[b] = in.nargs;
      p.buffer_type[b] = want;
    }
    p.code.push_back(in);
  }
  const auto root_is = [&](int root, char want) {
    return root == -1 || (root >= 0 && static_cast<size_t>(root) < n && type[static_cast<size_t>(root)] == want);
  };
  if (!root_is(roots.score, 'f')) return "the score is not a float value";
  if (!root_is(roots.mask, 'b')) return "the mask is not a bool value";
  if (!root_is(roots.slope, 'f') || !root_is(roots.slope_f, 'f')) return "the slope of the score is not a float value";
  static_cast<Roots&>(p) = roots;
  mark(p, roots.score, &Instruction::for_score);
  mark(p, roots.slope, &Instruction::for_score);
  mark(p, roots.slope_f, &Instruction::for_score);
  mark(p, roots.mask, &Instruction::for_mask);
  for (const LoadSlope& load : roots.loads) {
    if (load.load < 0 || static_cast<size_t>(load.load) >= n || p.code[static_cast<size_t>(load.load)].op != Op::load_f)
      return "what has a gradient is not a load of floats";
    if (load.slope < 0 || !root_is(load.slope, 'f')) return "the slope of a load is not a float value";
    mark(p, load.load, &Instruction::for_score);
    mark(p, load.slope, &Instruction::for_score);
  }
  for (size_t i = 0; i < n; ++i)
    if (p.code[i].for_mask && is_given(p.code[i].op)) return at(i, "the mask reads the score");

  p.carries = std::any_of(p.code.begin(), p.code.end(),
                          [](const Instruction& in) { return in.op == Op::var_f && in.for_score; });
  p.run = fuse(p.code, p);
  p.in_place = score_in_place(p);
  // The mask runs first, so that loads in the score know which pairs exist. What nothing needs is not run.
  for (int pass = 0; pass < 2; ++pass)
    for (size_t i = 0; i < n; ++i) {
      const Instruction& in = p.run[i];
      if (pass == 0 ? in.for_mask : (in.for_score && !in.for_mask)) p.order[in.rank].push_back(static_cast<int32_t>(i));
    }
  if (std::string bad = assign_slots(p); !bad.empty()) return bad;
  p.boxes = plan_boxes(p.code, roots.mask);
  out = std::move(p);
  return {};
}

}  // namespace

std::string compile(std::span<const int32_t> rows, const Roots& roots, int num_buffers, int num_params, Program& out) {
  std::string bad = compile_code(rows, roots, num_buffers, num_params, out);
  if (!bad.empty()) return bad;
  out.choice = find_choice(out);
  if (out.choice.load < 0) return bad;
  std::vector<int32_t> code(rows.begin(), rows.end());
  const int32_t taken[3] = {static_cast<int32_t>(Op::const_b), 1, 0};
  std::copy(taken, taken + 3, code.begin() + 8 * out.choice.load);
  Program chosen;
  bad = compile_code(code, roots, num_buffers, num_params, chosen);
  out.chosen = std::make_shared<const Program>(std::move(chosen));
  return bad;
}

}  // namespace attnkit::cpu
