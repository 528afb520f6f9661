// What the schedulers of both directions share; defined in attend.cc.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "analysis.h"
#include "attend.h"
#include "call.h"

namespace attnkit::cpu {

class Schedule;
class Wave;

// This thread's memory, kept between calls, grown and never shrunk; null if there is not that much.
float* workspace(size_t bytes);
float* carried_memory(size_t bytes);  // another piece

char* codes_memory(size_t bytes);  // likewise, for encoded queries and keys

CodeView view(const Program& program, const Facts& facts);
// A forward call. Stretches are whole tiles.
Call call_of(const Program& program, const Facts& facts, const Problem& p, const Config& config, int32_t tile_q);

// How much each thread may keep of the keys and values of one head, in floats; the memory that it needs for a call's
// tasks, where that comes first.
int64_t kept_floats(const Problem& p, int threads);
inline size_t memory_of(const Kernel& kernel, const Call& call) {
  return static_cast<size_t>(call.kept) * sizeof(float) + kernel.workspace_bytes(call);
}

// How many threads are worth waking for so many operations, of the `threads` that there are.
int worth(int threads, double flops);

void ran(const Kernel& kernel);  // for last_isa

template <class Ready>
void until(Ready ready) {
  for (int spins = 0; !ready(); ++spins)
    if (spins > 1000) sched_yield();
}

// Leaves a core that is that of the thread which has called: a thread that sleeps is often woken there, and both would
// stay, and spin against each other, until the kernel looks at its next tick or some ticks later. It may go back.
void leave(int core);

// Lets work(thread), which throws nothing, run on so many threads, this one among them.
template <class Work>
void on_threads(int threads, const Work& work) {
  if (threads <= 1) return work(0);
  std::atomic<int> done{0};
  const int core = sched_getcpu();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    if (thread != 0 && sched_getcpu() == core) leave(core);
    work(thread);
    // A thread that sleeps is often woken on the core of this one. The barrier would spin there for milliseconds and
    // keep it from running: until all are done, this one offers it the core.
    done.fetch_add(1, std::memory_order_release);
    if (thread == 0) until([&] { return done.load(std::memory_order_acquire) == omp_get_num_threads(); });
  }
}

// The same for work(thread, memory), so much memory each. False where there is not enough.
template <class Work>
bool on_threads_with_memory(int threads, size_t bytes, const Work& work) {
  std::atomic<bool> enough{true};
  on_threads(threads, [&](int thread) {
    try {  // no exception may leave a parallel region
      float* memory = bytes == 0 ? nullptr : workspace(bytes);
      if (bytes != 0 && memory == nullptr) throw std::bad_alloc();
      work(thread, memory);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
  });
  return enough;
}

// Computes what a schedule has. `wave`: where what is carried lies, if something is.
Status run_schedule(const Program& program, const Problem& p, const Call& call, const Schedule& schedule,
                    const Analysis& proven, const Facts& facts, int threads, Wave* wave = nullptr);

// The tasks of a call, dealt to its threads. Each takes a run of its own first, in which neighbours read the same keys,
// and the same run at every call of the same sizes; then what others have not got to.
class Deal {
 public:
  Deal(int64_t tasks, int threads) : Deal(tasks, threads, [](int64_t i) { return i; }) {}

  // Runs begin at start(i), which is the first of the tasks that have to be in one run with task i.
  template <class Start>
  Deal(int64_t tasks, int threads, Start start) : runs_(static_cast<size_t>(threads)) {
    int64_t end = tasks;
    for (int64_t t = threads; t-- > 0;) {
      Run& run = runs_[static_cast<size_t>(t)];
      run.end = end;
      run.next = end = t == 0 || tasks == 0 ? 0 : start(tasks * t / threads);
    }
  }

  // A task for this thread, or -1 if there is none left.
  int64_t take(int thread) {
    for (size_t k = 0; k < runs_.size(); ++k) {
      Run& run = runs_[(static_cast<size_t>(thread) + k) % runs_.size()];
      const int64_t i = run.next.fetch_add(1, std::memory_order_relaxed);
      if (i < run.end) return i;
    }
    return -1;
  }

 private:
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Run> runs_;
};

// work(task, memory) for each of them, so much memory on each thread. False where there is not enough.
template <class Work>
bool each_task(int64_t tasks, int threads, size_t bytes, const Work& work) {
  threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, std::max(threads, 1)));
  Deal deal(tasks, threads);
  return on_threads_with_memory(threads, bytes, [&](int thread, float* memory) {
    for (int64_t i; (i = deal.take(thread)) >= 0;) work(i, memory);
  });
}

}  // namespace attnkit::cpu
