#include "attend.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "blocks.h"
#include "schedule.h"

namespace attnkit::cpu {
namespace {

std::atomic<const Kernel*> g_isa{nullptr};
std::atomic<const Kernel*> g_last_isa{nullptr};
std::atomic<bool> g_poison{false};

// A forked child has none of its parent's OpenMP threads, and libgomp would wait for them for ever.
std::atomic<bool> g_forked{false};
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Small calls finish before a second thread has woken up.
constexpr double kMinFlopsPerThread = 1e6;

}  // namespace

float* workspace(size_t bytes) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  bytes = (bytes + 4095) / 4096 * 4096;
  if (bytes > size) {
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    size = memory ? bytes : 0;
  }
  if (memory && g_poison) std::memset(memory.get(), 0xff, size);
  return memory.get();
}

CodeView view(const Program& program, const Facts& facts) {
  CodeView v{};
  v.code = program.code.data();
  for (int r = 0; r < 4; ++r) {
    v.order[r] = program.order[r].data();
    v.order_size[r] = static_cast<int32_t>(program.order[r].size());
    v.slots[r] = program.slots[r];
  }
  v.score = program.score;
  v.mask = program.mask;
  v.slope = program.slope;
  v.loads = program.loads.data();
  v.num_loads = static_cast<int32_t>(program.loads.size());
  v.load_in_bounds = facts.load_in_bounds.data();
  v.all_loads_in_bounds = facts.all_loads_in_bounds;
  return v;
}

int worth(int threads, double flops) {
  return g_forked ? 1 : static_cast<int>(std::min<double>(threads, flops / kMinFlopsPerThread));
}

void ran(const Kernel& kernel) { g_last_isa = &kernel; }

Status attend(const Program& program, const Problem& p, const Config& config) {
  if (p.num_heads == 0 || p.num_sequences == 0) return {};
  Analysis analysis(program, p);
  const Facts facts = analysis.prove();
  if (facts.status.fault != Fault::none) return facts.status;

  int64_t longest = 1;
  double flops = 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    longest = std::max(longest, p.sequences[i].q_len);
    flops += 2.0 * static_cast<double>(p.sequences[i].q_len) * static_cast<double>(p.sequences[i].kv_len) *
             (p.head_dim + p.v_head_dim) * p.num_heads;
  }
  const Kernel& kernel = current_isa();
  int threads = worth(config.threads, flops);

  // Few queries: the heads of a group share the lanes of a task, and their keys and values are read once. Not so far
  // that a thread would have nothing to do.
  const int32_t group = p.num_heads / p.num_kv_heads;
  Call call{view(program, facts), &p, 0, config.tile_kv, group + 1, program.score >= 0, program.mask >= 0};
  std::vector<int64_t> first_task(static_cast<size_t>(p.num_sequences) + 1, 0);
  const auto blocks = [&](const Sequence& s) { return (s.q_len + call.tile_q - 1) / call.tile_q; };
  do {
    do --call.heads;
    while (group % call.heads != 0 || (call.heads > 1 && call.heads * longest > config.tile_q));
    call.tile_q = static_cast<int32_t>(std::min<int64_t>(config.tile_q, longest));
    for (size_t i = 0; i + 1 < first_task.size(); ++i)
      first_task[i + 1] = first_task[i] + blocks(p.sequences[i]) * (p.num_heads / call.heads);
  } while (call.heads > 1 && first_task.back() < threads);
  const int64_t num_tasks = first_task.back();
  threads = static_cast<int>(std::min<int64_t>(threads, num_tasks));

  std::atomic<int64_t> next{0};
  std::atomic<int32_t> bad_load{-1};
  std::atomic<bool> no_memory{false};
  // Tasks are numbered head by head, so that threads share one head's K and V in cache; within a head the last
  // queries come first, because under a causal mask they have the most to do.
  const auto work = [&] {
    float* memory = workspace(kernel.workspace_bytes(call));
    if (memory == nullptr) {
      no_memory = true;
      return;
    }
    RowPlan row(program, p, call, analysis, facts);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      const auto seq = std::upper_bound(first_task.begin(), first_task.end(), i) - first_task.begin() - 1;
      const Sequence& s = p.sequences[seq];
      const int64_t in_sequence = i - first_task[static_cast<size_t>(seq)];
      const int64_t block = blocks(s) - 1 - in_sequence % blocks(s);
      const auto head = static_cast<int32_t>(in_sequence / blocks(s)) * call.heads;
      Task task{static_cast<int32_t>(seq), head, call.heads, block * call.tile_q, 0};
      task.q_count = static_cast<int32_t>(std::min<int64_t>(call.tile_q, s.q_len - task.q_first));
      const std::vector<KeyRange>& ranges = row.plan(task);
      const int32_t bad = kernel.run(call, task, ranges.data(), ranges.size(), memory);
      if (bad >= 0) bad_load = bad;
    }
  };
  const auto guarded = [&] {  // no exception may leave a parallel region
    try {
      work();
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  };
  if (threads <= 1) {
    guarded();
  } else {
#pragma omp parallel num_threads(threads)
    guarded();
  }
  if (no_memory) return {Fault::no_memory, -1};
  if (num_tasks > 0) ran(kernel);
  if (bad_load >= 0) return {Fault::index_range, bad_load};
  return {};
}

void evaluate(Op op, float* dst, const float* const* args, int32_t n) {
  const Kernel& kernel = current_isa();
  kernel.evaluate(op, dst, args, n);
  g_last_isa = &kernel;
}

std::vector<const Kernel*> isa_levels() {
  // The compiler's run-time support also asks the operating system whether it saves the registers.
  std::vector<const Kernel*> levels{&kScalarKernel};
#ifdef ATTNKIT_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(&kAvx2Kernel);
#endif
#ifdef ATTNKIT_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    levels.push_back(&kAvx512Kernel);
#endif
  return levels;
}

const Kernel& current_isa() {
  const Kernel* k = g_isa;
  if (k == nullptr) {
    const char* cap = std::getenv("ATTNKIT_ISA");
    if (cap == nullptr || !set_isa(cap)) g_isa = isa_levels().back();
    k = g_isa;
  }
  return *k;
}

bool set_isa(const char* name) {
  for (const Kernel* k : isa_levels())
    if (std::strcmp(k->name, name) == 0) {
      g_isa = k;
      g_last_isa = nullptr;
      return true;
    }
  return false;
}

const char* last_isa() {
  const Kernel* k = g_last_isa;
  return k == nullptr ? "" : k->name;
}

void set_poison(bool on) { g_poison = on; }

}  // namespace attnkit::cpu
