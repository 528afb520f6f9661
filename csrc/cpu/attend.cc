#include "attend.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "blocks.h"
#include "carry.h"
#include "gather.h"
#include "run.h"
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

// Memory of a thread, kept between calls, grown and never shrunk.
class Scratch {
 public:
  float* get(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
      size_ = memory_ ? bytes : 0;
    }
    if (memory_ && g_poison) std::memset(memory_.get(), 0xff, size_);
    return memory_.get();
  }

 private:
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};
thread_local Scratch t_workspace, t_parts, t_codes, t_carried;

// Below twice this, one thread works alone. Another one that still spins for work is worth it early: 16 tokens of 12
// heads (8e5 operations) take 4.5 us on two threads and 7.4 on one.
constexpr double kMinFlopsPerThread = 3e5;

// What threads keep: of a head so much in any case; more where that is not more, all in all, than k and v as float32
// are.
constexpr int64_t kAlwaysKept = 1 << 22, kMostKept = 1 << 25;

// Reading a key takes as long as the arithmetic of so many queries.
constexpr int64_t kQueriesPerRead = 4;

}  // namespace

float* workspace(size_t bytes) { return t_workspace.get(bytes); }
float* carried_memory(size_t bytes) { return t_carried.get(bytes); }
char* codes_memory(size_t bytes) { return reinterpret_cast<char*>(t_codes.get(bytes)); }

CodeView view(const Program& program, const Facts& facts) {
  CodeView v{};
  v.code = program.run.data();
  for (int r = 0; r < 4; ++r) {
    v.order[r] = program.order[r].data();
    v.order_size[r] = static_cast<int32_t>(program.order[r].size());
    v.slots[r] = program.slots[r];
  }
  v.score = program.score;
  v.mask = program.mask;
  v.slope = program.slope;
  v.slope_f = program.slope_f;
  v.in_place = program.in_place;
  v.loads = program.loads.data();
  v.num_loads = static_cast<int32_t>(program.loads.size());
  v.load_in_bounds = facts.load_in_bounds.data();
  v.all_loads_in_bounds = facts.all_loads_in_bounds;
  v.carries = program.carries;
  v.unnormalized = program.unnormalized;
  return v;
}

Call call_of(const Program& program, const Facts& facts, const Problem& p, const Config& config, int32_t tile_q) {
  const auto split_kv = static_cast<int32_t>(blocks_of(config.split_kv, config.tile_kv)) * config.tile_kv;
  static std::atomic<int64_t> calls{0};
  return {.code = view(program, facts),
          .problem = &p,
          .tile_q = tile_q,
          .tile_kv = config.tile_kv,
          .has_score = program.score >= 0,
          .has_mask = program.mask >= 0,
          .split_kv = split_kv,
          .number = ++calls};
}

int worth(int threads, double flops) {
  return g_forked ? 1 : static_cast<int>(std::clamp(flops / kMinFlopsPerThread, 1.0, static_cast<double>(threads)));
}

void leave(int core) {
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof all, &all);
}

void ran(const Kernel& kernel) { g_last_isa = &kernel; }

Status attend(const Program& program, const Problem& given, const Config& config) {
  if (given.num_heads == 0 || given.num_sequences == 0) return {};
  Problem p = given;
  Analysis analysis(program, p);
  const Facts facts = analysis.prove();
  if (facts.status.fault != Fault::none) return facts.status;

  double flops = 0;
  int64_t longest = 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    const Sequence& s = p.sequences[i];
    longest = std::max(longest, s.q_len);
    const int64_t heads = p.heads_of(i), group = p.num_heads / p.num_kv_heads;
    const int64_t queries = std::max(s.q_len * heads, kQueriesPerRead * heads / group);
    flops += 2.0 * static_cast<double>(queries) * static_cast<double>(s.kv_len) * (p.head_dim + p.v_head_dim);
  }
  const Kernel& kernel = current_isa();
  const int threads = worth(config.threads, flops);
  if (longest > config.tile_q)
    if (const auto map = ChosenMap::of(program, p, analysis, facts, config.tile_kv))
      return attend_gathered(*program.chosen, p, *map, config, threads);
  Encoded encoded;
  if (p.encoding.q_tile > 0 && !encoded.encode(p, kernel, threads)) return {Fault::no_memory, -1};

  Call call = call_of(program, facts, p, config, 0);
  const Schedule schedule(p, call, config.tile_q, threads);
  return run_schedule(program, p, call, schedule, analysis, facts, threads);
}

int64_t kept_floats(const Problem& p, int threads) {
  const auto padded = [](int32_t channels) { return int64_t{(channels + 31) / 32} * 32; };
  const int64_t of_key = padded(p.head_dim) + padded(p.v_head_dim);
  int64_t most = 0, all = 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    const int64_t chunks = blocks_of(p.sequences[i].kv_len, kKeptKeys);
    const int64_t of_head = kept_head(chunks) + chunks * kKeptKeys * of_key;
    most = std::max(most, of_head);
    all += of_head * p.num_kv_heads;
  }
  constexpr int64_t kSize = sizeof(float);
  return std::min(most, std::clamp(2 * all / std::max(threads, 1), kAlwaysKept / kSize, kMostKept / kSize));
}

Status run_schedule(const Program& program, const Problem& p, const Call& given, const Schedule& schedule,
                    const Analysis& proven, const Facts& facts, int threads, Wave* wave) {
  const Kernel& kernel = current_isa();
  const int64_t num_tasks = schedule.num_tasks();
  threads = static_cast<int>(std::min<int64_t>(threads, num_tasks));
  Call call = given;
  call.kept = kept_floats(p, threads);

  // Where several tasks share the keys of a unit, the last of them to finish merges what they left.
  float* parts = nullptr;
  if (schedule.num_units() > 0) {
    parts = t_parts.get(static_cast<size_t>(schedule.num_floats()) * sizeof(float));
    if (parts == nullptr) return {Fault::no_memory, -1};
  }
  std::vector<uint8_t> there(static_cast<size_t>(schedule.num_parts()), 0);
  std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(schedule.num_units()));

  Deal deal(num_tasks, std::max(threads, 1));
  std::atomic<int32_t> bad_load{-1};
  const bool enough = on_threads_with_memory(threads, memory_of(kernel, call), [&](int thread, float* memory) {
    memory += call.kept;
    RowPlan row(program, p, call, proven, facts);
    for (int64_t i; (i = deal.take(thread)) >= 0;) {
      Schedule::Item item = schedule.item(i);
      if (wave != nullptr) item.task.carried = wave->of(item.task);
      const std::vector<KeyRange>& ranges = row.plan(item.task);
      const bool shared = item.pieces > 1;
      const Parts left{parts + item.first_float, there.data() + item.first_part, item.stretches};
      const int32_t bad = kernel.run(call, item.task, ranges.data(), ranges.size(), shared ? &left : nullptr, memory);
      if (bad >= 0) bad_load = bad;
      if (shared && finished[static_cast<size_t>(item.unit)].fetch_add(1) == item.pieces - 1)
        kernel.merge(call, item.task, left, memory);
    }
  });
  if (!enough) return {Fault::no_memory, -1};
  if (num_tasks > 0) ran(kernel);
  if (bad_load >= 0) return {Fault::index_range, bad_load};
  return {};
}

void evaluate(Op op, float* dst, const float* const* args, const bool* same, int32_t n) {
  const Kernel& kernel = current_isa();
  kernel.evaluate(op, dst, args, same, n);
  g_last_isa = &kernel;
}

#ifdef ATTNKIT_HAS_AVX512BF16
const Kernel& dot_products() {
  static const Kernel kernel = with_dot_products(kAvx512Kernel);
  return kernel;
}
#endif

#ifdef ATTNKIT_HAS_AVX512AMX
const Kernel& tile_registers() {
  static const Kernel kernel = with_tile_registers(dot_products());
  return kernel;
}

// Linux keeps their contents for those alone who have asked.
bool may_use_tile_registers() {
#ifdef __linux__
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

std::vector<const Kernel*> isa_levels() {
  // The compiler's run-time support also asks the operating system whether it saves the registers.
  std::vector<const Kernel*> levels{&kScalarKernel};
#ifdef ATTNKIT_EMULATE
  levels.insert(levels.end(), {&kAvx2Kernel, &kAvx512Kernel, &dot_products(), &tile_registers()});
#else
#ifdef ATTNKIT_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    levels.push_back(&kAvx2Kernel);
#endif
#ifdef ATTNKIT_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    levels.push_back(&kAvx512Kernel);
#endif
#ifdef ATTNKIT_HAS_AVX512BF16
  if (levels.back() == &kAvx512Kernel && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    levels.push_back(&dot_products());
#ifdef ATTNKIT_HAS_AVX512AMX
    if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
        __builtin_cpu_supports("amx-int8") && may_use_tile_registers())
      levels.push_back(&tile_registers());
#endif
  }
#endif
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
