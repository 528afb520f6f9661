#include "gather.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "run.h"

namespace attnkit::cpu {
namespace {

// Blocks of queries of a task: more of them fill their tiles better, fewer leave more of the cache to keys and values.
constexpr int64_t kMostTiles = 8;
constexpr int64_t kTasksPerThread = 8;

// The pieces of one task after the other.
class Gatherer {
 public:
  Gatherer(const Program& chosen, const Problem& p, const Call& call, const ChosenMap& map, const Analysis& proven,
           const Facts& facts)
      : call_(call), map_(map), row_(chosen, p, call, proven, facts) {}

  void begin(const Task& task) {
    task_ = task;
    map_.find(task.sequence, task.head, task.q_first, task.q_first + task.q_count, choosers_);
    block_ = -1;
    left_ = {};
  }

  static bool next(void* state, Piece* piece) { return static_cast<Gatherer*>(state)->next(*piece); }

 private:
  bool next(Piece& piece) {
    for (;;) {
      while (left_.empty()) {
        if (++block_ >= map_.blocks(task_.sequence)) return false;
        left_ = choosers_.of(block_);
        task_.kv_first = block_ * map_.block();
        task_.kv_end = task_.kv_first + map_.block();
      }
      piece.queries = take_listed(task_, left_, call_.tile_q);
      const std::vector<KeyRange>& ranges = row_.plan(piece.queries);
      piece.ranges = ranges.data();
      piece.num_ranges = ranges.size();
      if (!ranges.empty()) return true;
    }
  }

  const Call& call_;
  const ChosenMap& map_;
  RowPlan row_;
  Task task_{};
  Choosers choosers_;
  int64_t block_ = 0;
  std::span<const int32_t> left_;  // of the queries that chose the block
};

// How the queries of a call are cut into tasks.
class Tasks {
 public:
  // Sets how many queries a task has.
  Tasks(const Problem& p, Call& call, int threads) : p_(p) {
    int64_t queries = 0;
    for (int32_t i = 0; i < p.num_sequences; ++i) queries += p.sequences[i].q_len * p.num_heads;
    const int64_t tiles = queries / (kTasksPerThread * std::max(threads, 1) * call.tile_q);
    call.gathered = static_cast<int32_t>(std::clamp<int64_t>(tiles, 1, kMostTiles)) * call.tile_q;
    queries_ = call.gathered;
    for (int32_t i = 0; i < p.num_sequences; ++i)
      first_.push_back(first_.back() + p.num_heads * blocks_of(p.sequences[i].q_len, queries_));
  }

  int64_t count() const { return first_.back(); }

  Task task(int64_t i) const {
    const auto sequence = static_cast<int32_t>(std::upper_bound(first_.begin(), first_.end(), i) - first_.begin() - 1);
    const int64_t q_len = p_.sequences[sequence].q_len, of_head = blocks_of(q_len, queries_),
                  in_sequence = i - first_[static_cast<size_t>(sequence)];
    Task task{sequence, static_cast<int32_t>(in_sequence / of_head), 1, in_sequence % of_head * queries_, 0};
    task.q_count = static_cast<int32_t>(std::min<int64_t>(queries_, q_len - task.q_first));
    return task;
  }

 private:
  const Problem& p_;
  int64_t queries_ = 0;
  std::vector<int64_t> first_ = {0};  // task of each sequence
};

}  // namespace

std::optional<ChosenMap> ChosenMap::of(const Program& program, const Problem& p, Analysis& proven, const Facts& facts,
                                       int32_t tile_kv) {
  const Choice& choice = program.choice;
  const bool plain = p.groups == nullptr && p.stores == nullptr && p.pages.table == nullptr && p.encoding.q_tile == 0 &&
                     p.skip == 0 && !program.carries;
  if (choice.load < 0 || !plain || choice.block % tile_kv != 0 ||
      facts.load_in_bounds[static_cast<size_t>(choice.load)] == 0)
    return {};
  const Instruction& in = program.code[static_cast<size_t>(choice.load)];
  const Buffer& buffer = p.buffers[in.attr];
  ChosenMap map;
  map.problem_ = &p;
  map.block_ = choice.block;
  map.query_stride_ = buffer.stride[choice.query];
  map.key_stride_ = buffer.stride[choice.key];
  for (int32_t i = 0; i < p.num_sequences; ++i)
    for (int32_t head = 0; head < p.num_heads; ++head) {
      const Sequence& s = p.sequences[i];
      proven.frame({{i, i}, {head, head}, {s.q_len, s.q_len}, {s.kv_len, s.kv_len}});
      int64_t at = 0;
      for (int a = 0; a < in.nargs; ++a) {
        if (a == choice.query || a == choice.key) continue;
        const Interval& index = proven.at(in.args[a]);
        if (index.lo != index.hi) return {};
        at += static_cast<int64_t>(index.lo) * buffer.stride[a];
      }
      map.at_.push_back(static_cast<const uint8_t*>(buffer.data) + at);
    }
  return map;
}

void ChosenMap::find(int32_t sequence, int32_t head, int64_t q_first, int64_t q_end, Choosers& out) const {
  const int64_t blocks = this->blocks(sequence);
  const uint8_t* at = at_[static_cast<size_t>(sequence * problem_->num_heads + head)] + q_first * query_stride_;
  const int64_t count = q_end - q_first;
  // `step`: from one query to the next, to the compiler a constant where it is the usual one.
  const auto scan = [&](auto step) {
    out.first.assign(1, 0);
    for (int64_t c = 0; c < blocks; ++c) {
      int32_t some = 0;
      for (int64_t q = 0; q < count; ++q) some += at[c * key_stride_ + q * step] != 0;
      out.first.push_back(out.first.back() + some);
    }
    out.queries.resize(static_cast<size_t>(out.first.back()) + 1);  // one more is written, and then overwritten
    int32_t* to = out.queries.data();
    for (int64_t c = 0; c < blocks; ++c)
      for (int64_t q = 0; q < count; ++q) {
        *to = static_cast<int32_t>(q_first + q);
        to += at[c * key_stride_ + q * step] != 0;
      }
  };
  if (query_stride_ == 1)
    scan(std::integral_constant<int64_t, 1>());
  else
    scan(query_stride_);
}

std::optional<GatheredTiles> gathered_tiles(const Program& program, const Problem& p, const Config& config) {
  int64_t longest = 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) longest = std::max(longest, p.sequences[i].q_len);
  Analysis proven(program, p);
  const Facts facts = proven.prove();
  if (facts.status.fault != Fault::none || longest <= config.tile_q) return {};
  const auto map = ChosenMap::of(program, p, proven, facts, config.tile_kv);
  if (!map) return {};
  Analysis analysis(*program.chosen, p);
  const Facts of_chosen = analysis.prove();
  if (of_chosen.status.fault != Fault::none) return {};
  Call call = call_of(*program.chosen, of_chosen, p, config, config.tile_q);
  const Tasks tasks(p, call, config.threads);
  Gatherer gatherer(*program.chosen, p, call, *map, analysis, of_chosen);
  GatheredTiles found;
  for (int64_t i = 0; i < tasks.count(); ++i) {
    gatherer.begin(tasks.task(i));
    for (Piece piece; Gatherer::next(&gatherer, &piece);)
      for (size_t n = 0; n < piece.num_ranges; ++n)
        (piece.ranges[n].full ? found.full : found.partial) += blocks_of(piece.ranges[n].count, config.tile_kv);
  }
  return found;
}

Status attend_gathered(const Program& chosen, const Problem& p, const ChosenMap& map, const Config& config,
                       int threads) {
  Analysis analysis(chosen, p);
  const Facts facts = analysis.prove();
  if (facts.status.fault != Fault::none) return facts.status;
  Call call = call_of(chosen, facts, p, config, config.tile_q);
  const Tasks tasks(p, call, threads);

  const Kernel& kernel = current_isa();
  threads = static_cast<int>(std::min<int64_t>(threads, tasks.count()));
  call.kept = kept_floats(p, threads);
  Deal deal(tasks.count(), std::max(threads, 1));
  std::atomic<int32_t> bad_load{-1};
  const bool enough = on_threads_with_memory(threads, memory_of(kernel, call), [&](int thread, float* memory) {
    memory += call.kept;
    Gatherer gatherer(chosen, p, call, map, analysis, facts);
    for (int64_t i; (i = deal.take(thread)) >= 0;) {
      const Task task = tasks.task(i);
      gatherer.begin(task);
      const int32_t bad = kernel.gather(call, task, {&gatherer, Gatherer::next}, memory);
      if (bad >= 0) bad_load = bad;
    }
  });
  if (!enough) return {Fault::no_memory, -1};
  ran(kernel);
  if (bad_load >= 0) return {Fault::index_range, bad_load};
  return {};
}

}  // namespace attnkit::cpu
