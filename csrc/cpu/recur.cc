#include "recur.h"

#include <algorithm>

#include "attend.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

// A task is one state head of one sequence: what it computes depends on nothing else, and on no number of threads.
template <class Run>
Status each_state(const Recurrence& p, int threads, double flops_of_token, size_t bytes, const Run& run) {
  const int64_t tasks = int64_t{p.num_sequences} * p.heads;
  double tokens = 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) tokens += static_cast<double>(p.sequences[i].length);
  threads = worth(threads, std::max(tokens, 1.0) * p.heads * flops_of_token);
  const bool enough = each_task(tasks, threads, bytes, [&](int64_t i, float* memory) {
    run(static_cast<int32_t>(i / p.heads), static_cast<int32_t>(i % p.heads), memory);
  });
  if (!enough) return {Fault::no_memory, -1};
  if (tasks > 0) ran(current_isa());
  return {};
}

}  // namespace

Status recur(const Recurrence& p, int threads) {
  const RecurKernel& kernel = current_isa().recur;
  const double flops = 6.0 * static_cast<double>(p.features()) * p.v_head_dim;
  return each_state(p, threads, flops, kernel.bytes(p),
                    [&](int32_t sequence, int32_t head, float* memory) { kernel.forward(p, sequence, head, memory); });
}

Status recur_backward(const Recurrence& p, const RecurGradients& g, int threads) {
  const RecurKernel& kernel = current_isa().recur;
  const double flops = 20.0 * static_cast<double>(p.features()) * p.v_head_dim;
  return each_state(p, threads, flops, kernel.backward_bytes(p), [&](int32_t sequence, int32_t head, float* memory) {
    kernel.backward(p, g, sequence, head, memory);
  });
}

}  // namespace attnkit::cpu
