// The backward of `attend`: gradients of everything a call reads, given those of what it returned.
#pragma once
#include "carry.h"

namespace attnkit::cpu {

// `problem` is the forward's, with the o and the lse that it gave. The gradients have the same bits for any number of
// threads and for any other sequences in the call.
Status attend_backward(const Program& program, const Problem& problem, const Gradients& gradients,
                       const Config& config);

// The same of `attend_carried` (carry.h), of programs that go backwards. `what` is the carry of which `sums` may be
// null, here what was carried before. A fault of `carry` is marked by kOfCarry.
struct CarryGradients {
  const float* d_carry;  // the cotangent of what is carried after, laid out like the sums, or null
  float* d_initial;      // the gradient of what was carried before, likewise, or null
};
Status attend_carried_backward(const Program& score, const Program& carry, const Problem& problem, const Carry& what,
                               const Gradients& gradients, const CarryGradients& of_carry, const Config& config);

}  // namespace attnkit::cpu
