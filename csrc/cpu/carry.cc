#include "carry.h"

#include <algorithm>
#include <atomic>

#include "run.h"

namespace attnkit::cpu {
namespace {

// What a wave may take, and how many blocks of queries it has at most: more of them share the keys in the cache, fewer
// leave more of it to keys and values.
constexpr size_t kWaveFloats = size_t{4} << 20;
constexpr int64_t kWaveBlocks = 8;
constexpr int64_t kMostChunk = 1024;  // keys that a task of the first step takes
constexpr int64_t kChunksPerThread = 4;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The first step of one wave: tasks of one sequence and a stretch of keys.
class Selecting {
 public:
  // `seen` and `selected`: what is proven of the scores and of what is carried.
  Selecting(const Problem& p, const Call& call, const Carry& what, const Analysis& seen, const Analysis& selected,
            const Facts& facts)
      : p_(p),
        call_(call),
        what_(what),
        seen_(seen),
        selected_(selected),
        trust_full_(facts.mask_loads_in_bounds && !call.some_gone),
        kernel_(current_isa()) {}

  // What is carried, where the wave wants it.
  Status run(Wave& wave, int most_threads) {
    if (what_.budget == 0) return by_chunks(wave, most_threads, &Selecting::carry);
    if (const Status status = by_chunks(wave, most_threads, &Selecting::select); status.fault != Fault::none)
      return status;
    Boxes boxes{{p_, seen_}, {p_, selected_}};
    for (const Wave::Slice& slice : wave.slices()) evict(wave, slice, boxes);
    return by_chunks(wave, most_threads, &Selecting::accumulate);
  }

 private:
  struct Chunk {
    const Wave::Slice* slice;
    int64_t tile, tile_end;
  };
  struct Boxes {  // a thread's own
    Analysis seen, selected;
  };
  // One block of queries, and the tiles of a chunk that it sees.
  using Step = int32_t (Selecting::*)(const Task&, const std::vector<KeyRange>&, float* memory);

  Status by_chunks(Wave& wave, int most_threads, Step step) {
    chunks_.clear();
    double flops = 0;
    for (const Wave::Slice& slice : wave.slices()) {
      const Sequence& s = p_.sequences[slice.sequence];
      const int64_t tiles = blocks_of(s.kv_len, call_.tile_kv), pieces = kChunksPerThread * most_threads;
      const int64_t chunk = std::min(blocks_of(tiles, pieces), std::max<int64_t>(kMostChunk / call_.tile_kv, 1));
      for (int64_t tile = 0; tile < tiles; tile += chunk)
        chunks_.push_back({&slice, tile, std::min(tile + chunk, tiles)});
      flops += 2.0 * static_cast<double>(slice.blocks.end - slice.blocks.first) * call_.tile_q *
               static_cast<double>(s.kv_len) * p_.head_dim;
    }
    const int threads = static_cast<int>(
        std::min<int64_t>(worth(most_threads, flops), std::max<int64_t>(static_cast<int64_t>(chunks_.size()), 1)));
    Deal deal(static_cast<int64_t>(chunks_.size()), threads);
    std::atomic<int32_t> bad_load{-1};
    const bool memory = on_threads_with_memory(threads, kernel_.workspace_bytes(call_), [&](int thread, float* at) {
      Boxes boxes{{p_, seen_}, {p_, selected_}};
      std::vector<KeyRange> ranges;
      for (int64_t i; (i = deal.take(thread)) >= 0;) {
        const int32_t bad = take(wave, chunks_[static_cast<size_t>(i)], boxes, ranges, step, at);
        if (bad >= 0) bad_load = bad;
      }
    });
    if (!memory) return {Fault::no_memory, -1};
    if (bad_load >= 0) return {Fault::index_range, bad_load | kOfCarry};
    return {};
  }

  int32_t take(Wave& wave, const Chunk& chunk, Boxes& boxes, std::vector<KeyRange>& ranges, Step step, float* memory) {
    int32_t bad = -1;
    for (int64_t block = chunk.slice->blocks.first; block < chunk.slice->blocks.end; ++block) {
      const Task task = queries(wave, chunk.slice->sequence, block);
      find(task, chunk, boxes, ranges);
      if (ranges.empty()) continue;
      const int32_t found = (this->*step)(task, ranges, memory);
      if (found >= 0) bad = found;
    }
    return bad;
  }

  Task queries(Wave& wave, int32_t sequence, int64_t block) const {
    Task task{sequence, what_.head, 1, block * call_.tile_q, 0};
    task.q_count = static_cast<int32_t>(std::min<int64_t>(call_.tile_q, p_.sequences[sequence].q_len - task.q_first));
    task.carried = wave.of(task);
    return task;
  }

  int64_t first_key(int32_t sequence) const {
    return p_.sequences[sequence].batch * what_.keys + p_.sequences[sequence].kv_start;
  }

  int32_t carry(const Task& task, const std::vector<KeyRange>& ranges, float* memory) {
    return kernel_.carry.select(call_, task, ranges.data(), ranges.size(), what_.sums + first_key(task.sequence),
                                memory);
  }

  // With a budget all that queries add has to be there, before a key can be chosen, before the sums can be.
  int32_t select(const Task& task, const std::vector<KeyRange>& ranges, float* memory) {
    return kernel_.carry.select(call_, task, ranges.data(), ranges.size(), nullptr, memory);
  }

  int32_t accumulate(const Task& task, const std::vector<KeyRange>& ranges, float*) {
    const int64_t key = first_key(task.sequence);
    for (const KeyRange& r : ranges)
      kernel_.carry.accumulate(task, r.first, r.count, what_.sums + key + r.first, what_.gone + key + r.first);
    return -1;
  }

  // Which keys queries find gone: while one sees more than the budget, that of the largest sum goes, of equals the
  // oldest, but not the first it sees nor the last.
  void evict(Wave& wave, const Wave::Slice& slice, Boxes& boxes) {
    const Sequence& s = p_.sequences[slice.sequence];
    const int64_t key = first_key(slice.sequence);
    int32_t* gone = what_.gone + key;
    std::vector<float> sums(what_.sums + key, what_.sums + key + s.kv_len);
    std::vector<KeyRange> ranges;
    std::vector<int64_t> there, seen;
    for (int64_t block = slice.blocks.first; block < slice.blocks.end; ++block) {
      const Task task = queries(wave, slice.sequence, block);
      find(task, {&slice, 0, blocks_of(s.kv_len, call_.tile_kv)}, boxes, ranges);
      there.clear();
      for (const KeyRange& r : ranges)
        for (int64_t j = r.first; j < r.first + r.count; ++j)
          if (gone[j] == INT32_MAX && sums[static_cast<size_t>(j)] < kInf) there.push_back(j);
      const Carried& added = task.carried;
      for (int32_t m = 0; m < task.q_count; ++m) {
        const auto of = [&](int64_t j) { return added.by_key ? added.f[j * added.ld + m] : added.f[m * added.ld + j]; };
        seen.clear();
        for (int64_t j : there)
          if (of(j) != -kInf) seen.push_back(j);
        while (seen.size() > static_cast<size_t>(what_.budget)) {
          const auto most = std::max_element(seen.begin() + 1, seen.end() - 1, [&](int64_t a, int64_t b) {
            return sums[static_cast<size_t>(a)] < sums[static_cast<size_t>(b)];
          });
          gone[*most] = static_cast<int32_t>(task.q_first + m);
          there.erase(std::lower_bound(there.begin(), there.end(), *most));
          seen.erase(most);
        }
        for (int64_t j : seen) sums[static_cast<size_t>(j)] += of(j);
      }
    }
  }

  // Tiles in which a head may see a key: there is to be something, also where nobody selects against it.
  void find(const Task& task, const Chunk& chunk, Boxes& boxes, std::vector<KeyRange>& ranges) const {
    const Sequence& s = p_.sequences[task.sequence];
    ranges.clear();
    const auto look_at = [&](Analysis& analysis, Range heads) {
      analysis.frame({{task.sequence, task.sequence}, heads, {s.q_len, s.q_len}, {s.kv_len, s.kv_len}});
      analysis.queries({task.q_first, task.q_first + task.q_count - 1});
    };
    look_at(boxes.seen, {0, p_.num_heads - 1});
    look_at(boxes.selected, {task.head, task.head});
    for (int64_t tile = chunk.tile; tile < chunk.tile_end; ++tile) {
      const int64_t first = tile * call_.tile_kv, end = std::min(first + call_.tile_kv, s.kv_len);
      if (boxes.seen.classify({first, end - 1}) == Block::empty) continue;
      const bool full = boxes.selected.classify({first, end - 1}) == Block::full && trust_full_;
      ranges.push_back({first, static_cast<int32_t>(end - first), full});
    }
  }

  const Problem& p_;
  const Call& call_;
  const Carry& what_;
  const Analysis &seen_, &selected_;
  const bool trust_full_;
  const Kernel& kernel_;
  std::vector<Chunk> chunks_;
};

}  // namespace

bool subtracts(const Program& program) {
  if (program.score < 0 || program.slope_f >= 0) return false;
  const Instruction& in = program.code[static_cast<size_t>(program.score)];
  const auto op = [&](int a) { return program.code[static_cast<size_t>(in.args[a])].op; };
  return in.op == Op::sub_f && op(0) == Op::var_s && op(1) == Op::var_f;
}

// ---- waves ----

Wave::Wave(const Problem& problem, int32_t tile_q, int32_t tile_kv)
    : problem_(problem), tile_q_(tile_q), tile_kv_(tile_kv) {
  size_t norms = 0;
  for (int32_t i = 0; i < problem.num_sequences; ++i) {
    const auto tiles = static_cast<size_t>(blocks_of(problem.sequences[i].kv_len, tile_kv));
    norms_at_.push_back(norms);
    norms += tiles * static_cast<size_t>(problem.num_kv_heads);
    most_tiles_ = std::max(most_tiles_, tiles);
  }
  norms_.resize(norms);
}

int64_t Wave::padded_keys(int32_t sequence) const {  // tiles of a few queries are read in whole vectors, to their end
  return round_up(problem_.sequences[sequence].kv_len, 16) + kMaxTileKv;
}

size_t Wave::floats_of_block(int32_t sequence) const {
  const int64_t queries = std::min<int64_t>(tile_q_, problem_.sequences[sequence].q_len);
  return static_cast<size_t>((queries > kMostByQuery ? round_up(queries, 16) : queries) * padded_keys(sequence));
}

void Wave::add(int32_t sequence, Window blocks) {
  size_t first_block = 0;
  if (!slices_.empty()) {
    const Slice& last = slices_.back();
    first_block = last.first_block + static_cast<size_t>(last.blocks.end - last.blocks.first);
  }
  slices_.push_back({sequence, blocks, floats(), first_block});
}

void Wave::lies_at(float* memory) {
  memory_ = memory;
  const Slice& last = slices_.back();
  least_.resize((last.first_block + static_cast<size_t>(last.blocks.end - last.blocks.first)) * most_tiles_);
}

size_t Wave::floats() const {
  if (slices_.empty()) return 0;
  const Slice& last = slices_.back();
  const size_t end =
      last.at + static_cast<size_t>(last.blocks.end - last.blocks.first) * floats_of_block(last.sequence);
  return (end + 15) / 16 * 16;
}

std::vector<Window> Wave::windows() const {
  std::vector<Window> windows(static_cast<size_t>(problem_.num_sequences));
  for (const Slice& slice : slices_) windows[static_cast<size_t>(slice.sequence)] = slice.blocks;
  return windows;
}

Carried Wave::of(const Task& task) {
  const auto slice = std::lower_bound(slices_.begin(), slices_.end(), task.sequence,
                                      [](const Slice& s, int32_t sequence) { return s.sequence < sequence; });
  const auto block = static_cast<size_t>(task.q_first / tile_q_ - slice->blocks.first);
  const bool by_key = task.q_count > kMostByQuery;
  Carried carried{memory_ + slice->at + block * floats_of_block(task.sequence),
                  by_key ? round_up(task.q_count, 16) : padded_keys(task.sequence), by_key};
  carried.tile_kv = tile_kv_;
  carried.norms = norms_.data() + norms_at_[static_cast<size_t>(task.sequence)];
  carried.least = least_.data() + (slice->first_block + block) * most_tiles_;
  return carried;
}

Status attend_carried(const Program& score, const Program& carry, const Problem& p, const Carry& what,
                      const Config& config) {
  if (p.num_heads == 0 || p.num_sequences == 0) return {};
  Analysis of_score(score, p), of_carry(carry, p);
  const Facts facts = of_score.prove();
  if (facts.status.fault != Fault::none) return facts.status;
  const Facts carry_facts = of_carry.prove();
  if (carry_facts.status.fault != Fault::none) return {carry_facts.status.fault, carry_facts.status.value | kOfCarry};

  int64_t longest = 1;
  bool gone = what.budget > 0;
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    const Sequence& s = p.sequences[i];
    longest = std::max(longest, s.q_len);
    const float* sums = what.sums + s.batch * what.keys + s.kv_start;
    gone |= std::any_of(sums, sums + s.kv_len, [](float x) { return x > 3e38f; });
  }
  const auto tile_q = static_cast<int32_t>(std::min<int64_t>(config.tile_q, longest));
  Call call = call_of(score, facts, p, config, tile_q);
  call.subtracts = subtracts(score);
  call.some_gone = gone;
  const Call selecting{view(carry, carry_facts), &p, tile_q, config.tile_kv, carry.score >= 0, carry.mask >= 0};

  Selecting first(p, selecting, what, of_score, of_carry, carry_facts);
  Wave wave(p, tile_q, config.tile_kv);
  const auto compute = [&] {
    float* memory = carried_memory(wave.floats() * sizeof(float));
    if (memory == nullptr) return Status{Fault::no_memory, -1};
    wave.lies_at(memory);
    if (const Status status = first.run(wave, config.threads); status.fault != Fault::none) return status;
    const std::vector<Window> windows = wave.windows();
    const Schedule schedule(p, call, config.tile_q, config.threads, windows);
    const Status status = run_schedule(score, p, call, schedule, of_score, facts, config.threads, &wave);
    wave.clear();
    return status;
  };
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    const int64_t blocks = blocks_of(p.sequences[i].q_len, tile_q);
    for (Window window{0, 0}; window.first < blocks; window.first = window.end) {
      if (window.first > 0)  // what comes before it in its sequence has to be there
        if (const Status status = compute(); status.fault != Fault::none) return status;
      window.end = window.first + 1;
      wave.add(i, window);
      for (; window.end < blocks && window.end - window.first < kWaveBlocks && wave.floats() < kWaveFloats;
           ++window.end)
        wave.extend();
    }
    if (wave.floats() >= kWaveFloats)
      if (const Status status = compute(); status.fault != Fault::none) return status;
  }
  return wave.empty() ? Status{} : compute();
}

}  // namespace attnkit::cpu
