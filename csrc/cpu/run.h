// What the schedulers of both directions share; defined in attend.cc.
#pragma once
#include "analysis.h"
#include "call.h"

namespace attnkit::cpu {

// This thread's memory, kept between calls, grown and never shrunk; null if there is not that much.
float* workspace(size_t bytes);

CodeView view(const Program& program, const Facts& facts);

// How many threads are worth waking for so many operations, of the `threads` that there are.
int worth(int threads, double flops);

void ran(const Kernel& kernel);  // for last_isa

}  // namespace attnkit::cpu
