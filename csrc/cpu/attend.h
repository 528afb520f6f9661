// The engine's front door: attention forward over a verified program, on the best instruction set the machine has.
#pragma once
#include <vector>

#include "call.h"

namespace attnkit::cpu {

struct Config {
  int32_t tile_q;   // query lanes per task, at most kMaxTileQ (schedule: never changes a result)
  int32_t tile_kv;  // keys per softmax step, at most kMaxTileKv (numeric: changes the order of sums)
  int32_t split_kv;  // keys summed by themselves before they are merged, rounded up to tiles (numeric)
  int32_t threads;
};

// The caller has checked that the problem describes real memory; `attend` checks everything about the expressions.
Status attend(const Program& program, const Problem& problem, const Config& config);

// The routine behind one opcode, by itself: see Kernel::evaluate.
void evaluate(Op op, float* dst, const float* const* args, const bool* same, int32_t n);

// The instruction sets this build and machine can run, weakest first; ATTNKIT_ISA caps the choice.
std::vector<const Kernel*> isa_levels();
const Kernel& current_isa();
bool set_isa(const char* name);
const char* last_isa();  // whose code ran last since set_isa; empty if none did

void set_poison(bool on);  // fill every workspace with NaN before use: a read of unset memory becomes visible

}  // namespace attnkit::cpu
