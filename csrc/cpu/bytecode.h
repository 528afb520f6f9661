// The tile bytecode: how a traced score or mask reaches the engine. Straight-line SSA over 4-byte lanes: instruction i
// defines value i and reads only values before it, so a verified program always ends and cannot touch memory outside
// its own values and the buffers it was given. Only `compile` makes a Program, and it refuses what does not verify.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "linear.h"

namespace attnkit::cpu {

// One row per opcode: X(name, result, arguments). Types: f float32, i int32, b bool (lanes 0 / ~0).
// Loads take one int per dimension of their buffer and are marked '*'.
#define ATTNKIT_OPCODES(X) \
  X(const_f, 'f', "")      \
  X(const_i, 'i', "")      \
  X(const_b, 'b', "")      \
  X(var_s, 'f', "")        \
  X(var_f, 'f', "")        \
  X(var_b, 'i', "")        \
  X(var_h, 'i', "")        \
  X(var_q_idx, 'i', "")    \
  X(var_kv_idx, 'i', "")   \
  X(var_q_len, 'i', "")    \
  X(var_kv_len, 'i', "")   \
  X(param, 'f', "")        \
  X(load_f, 'f', "*")      \
  X(load_i, 'i', "*")      \
  X(load_b, 'b', "*")      \
  X(neg_f, 'f', "f")       \
  X(abs_f, 'f', "f")       \
  X(add_f, 'f', "ff")      \
  X(sub_f, 'f', "ff")      \
  X(mul_f, 'f', "ff")      \
  X(div_f, 'f', "ff")      \
  X(floordiv_f, 'f', "ff") \
  X(mod_f, 'f', "ff")      \
  X(min_f, 'f', "ff")      \
  X(max_f, 'f', "ff")      \
  X(pow_f, 'f', "ff")      \
  X(exp_f, 'f', "f")       \
  X(exp2_f, 'f', "f")      \
  X(log_f, 'f', "f")       \
  X(log2_f, 'f', "f")      \
  X(sqrt_f, 'f', "f")      \
  X(rsqrt_f, 'f', "f")     \
  X(tanh_f, 'f', "f")      \
  X(sigmoid_f, 'f', "f")   \
  X(erf_f, 'f', "f")       \
  X(sin_f, 'f', "f")       \
  X(cos_f, 'f', "f")       \
  X(floor_f, 'f', "f")     \
  X(neg_i, 'i', "i")       \
  X(abs_i, 'i', "i")       \
  X(add_i, 'i', "ii")      \
  X(sub_i, 'i', "ii")      \
  X(mul_i, 'i', "ii")      \
  X(floordiv_i, 'i', "ii") \
  X(mod_i, 'i', "ii")      \
  X(min_i, 'i', "ii")      \
  X(max_i, 'i', "ii")      \
  X(and_i, 'i', "ii")      \
  X(or_i, 'i', "ii")       \
  X(xor_i, 'i', "ii")      \
  X(lt_f, 'b', "ff")       \
  X(le_f, 'b', "ff")       \
  X(gt_f, 'b', "ff")       \
  X(ge_f, 'b', "ff")       \
  X(eq_f, 'b', "ff")       \
  X(ne_f, 'b', "ff")       \
  X(lt_i, 'b', "ii")       \
  X(le_i, 'b', "ii")       \
  X(gt_i, 'b', "ii")       \
  X(ge_i, 'b', "ii")       \
  X(eq_i, 'b', "ii")       \
  X(ne_i, 'b', "ii")       \
  X(eq_b, 'b', "bb")       \
  X(ne_b, 'b', "bb")       \
  X(and_b, 'b', "bb")      \
  X(or_b, 'b', "bb")       \
  X(xor_b, 'b', "bb")      \
  X(not_b, 'b', "b")       \
  X(where_f, 'f', "bff")   \
  X(where_i, 'i', "bii")   \
  X(where_b, 'b', "bbb")   \
  X(i_to_f, 'f', "i")      \
  X(b_to_f, 'f', "b")      \
  X(b_to_i, 'i', "b")      \
  X(f_to_i, 'i', "f")

// What the engine makes for itself: no program may hold it. The weight of the softmax, for tests; then what it makes of
// several instructions at once (fuse.h).
#define ATTNKIT_INTERNAL_OPS(X) \
  X(exp_weight, 'f', "f")       \
  X(softcap, 'f', "ff")         \
  X(mul_add, 'f', "fff")        \
  X(mul_sub_from, 'f', "fff")   \
  X(add_ramp, 'f', "ffii")      \
  X(add_gap, 'f', "ffii")       \
  X(sub_gap, 'f', "ffii")       \
  X(within, 'b', "iii")

enum class Op : uint8_t {
#define X(name, result, args) name,
  ATTNKIT_OPCODES(X) count,
  last_opcode = count - 1,  // the numbers go on
  ATTNKIT_INTERNAL_OPS(X) all
#undef X
};

struct OpSignature {
  const char* name;
  char result;
  const char* args;
};
const OpSignature& signature(Op op);

inline constexpr int kMaxArgs = 5;          // also the highest rank of a captured buffer
inline constexpr int kMaxInstructions = 4096;
inline constexpr int kMaxTileValues = 16;   // live at once; bounds the tile registers of a thread

// What a value varies with. Join is bitwise or, so a value is a tile iff it depends on both a query and a key.
enum Rank : uint8_t { kScalar = 0, kPerQuery = 1, kPerKey = 2, kTile = 3 };

struct Instruction {
  Op op;
  uint8_t nargs;
  Rank rank;
  bool for_score;     // needed to compute the score and its derivatives / the mask (both may hold)
  bool for_mask;
  int32_t attr;       // constant bits, parameter or buffer number
  int32_t args[kMaxArgs];
  int32_t slot;       // where the value lives: number among the values of its rank (tile values share slots)
};

// A load that has a gradient: the instruction, and the value d score / d load.
struct LoadSlope {
  int32_t load, slope;
};

// What a program computes, as value numbers.
struct Roots {
  int score = -1;  // -1: the score is s itself
  int mask = -1;   // -1: every pair exists
  int slope = -1;  // d score / d s, of a program that goes backwards; -1: it is 1
  std::vector<LoadSlope> loads = {};
  int slope_f = -1;      // d score / d f, of a program that carries and goes backwards; -1: it is -1
  bool carries = false;  // it may read f, what earlier queries carried onto a key; of a Program: it does
  bool unnormalized = false;  // its scores are the weights themselves: there is no softmax
};

// A mask such as `chosen[b, h, q_idx, kv_idx // 128] & ...`: each query chooses its blocks of keys.
struct Choice {
  int32_t load = -1;       // the instruction that reads the map; -1: there is none
  int32_t query = 0, key = 0;  // which of its indices are q_idx and kv_idx // block
  int32_t block = 1;       // keys
};

struct Program : Roots {
  std::vector<Instruction> code;  // as it came: what is analysed
  std::vector<Instruction> run;   // as it is run, under the same numbers: some are fused, some of no use any more
  int in_place = -1;              // the score, if s holds it in the end; -1: it has a slot
  std::vector<int32_t> order[4];  // instructions of each rank, in execution order; for tiles the mask comes first
  int slots[4] = {0, 0, 0, 0};
  int num_buffers = 0;
  int num_params = 0;
  std::vector<uint8_t> buffer_rank;  // rank required of each buffer, 0xff: not read by the code
  std::vector<char> buffer_type;     // 'f', 'i' or 'b'
  BoxPlan boxes;                     // how it is evaluated on boxes
  Choice choice;
  std::shared_ptr<const Program> chosen;  // of a choice: the same of pairs that are chosen, under the same numbers
};

// Rows of 8: opcode, attr, nargs, a0..a4. Returns an empty string and fills `out`, or says what is wrong.
std::string compile(std::span<const int32_t> rows, const Roots& roots, int num_buffers, int num_params, Program& out);

}  // namespace attnkit::cpu
