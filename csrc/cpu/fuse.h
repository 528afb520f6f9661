// Common expressions as one instruction. A pass over a strip costs a load and a store of each vector whatever it
// computes, and some of what a chain of operators computes need not be computed at all.
#pragma once
#include <vector>

#include "bytecode.h"

namespace attnkit::cpu {

// The code as it is run, under the same numbers: the last instruction of an expression of the table stands for all of
// it, and the others are for nothing. Code that was not fused is what is analysed, so nothing that is proven changes.
std::vector<Instruction> fuse(const std::vector<Instruction>& code, const Roots& roots);

}  // namespace attnkit::cpu
