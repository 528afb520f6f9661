// The backward of `attend`: gradients of everything a call reads, given those of what it returned.
#pragma once
#include "attend.h"

namespace attnkit::cpu {

// `problem` is the forward's, with the o and the lse that it gave. The gradients have the same bits for any number of
// threads and for any other sequences in the call.
Status attend_backward(const Program& program, const Problem& problem, const Gradients& gradients,
                       const Config& config);

}  // namespace attnkit::cpu
