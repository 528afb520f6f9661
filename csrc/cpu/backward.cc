#include "backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "blocks.h"
#include "buffer_gradients.h"
#include "gather.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

// A stretch of keys that a row of tiles visits, and how many of the row's tiles come before it.
struct RowRange {
  KeyRange keys;
  int32_t turn;
};

constexpr int32_t kUnseen = -2, kBeingSeen = -1;  // of a block of queries, before its turns

// Queries that chose a block of keys, and those of its keys that they see.
struct GatheredTile {
  const int32_t* queries;
  int32_t count;
  KeyRange keys;
};

// The tiles of one sequence and of one head, or of all heads alike.
struct Structure {
  int32_t sequence, head, heads;
  std::vector<std::vector<RowRange>> rows = {};       // by block of queries
  std::vector<int32_t> first_row = {}, last_row = {};  // by block of keys: the rows that may visit it
  // Of queries that are gathered.
  Choosers choosers = {};
  std::vector<std::vector<GatheredTile>> gathered = {};  // by block of keys
};

// The edge of a mask leaves part of the blocks of keys empty that it crosses: none is more than an eighth of n keys, or
// it is short. They are halved: what ends where the blocks of a mask end goes on to do so.
constexpr int32_t kShortBlock = 48;
int32_t masked_block(int64_t n, int32_t most) {
  while (most >= 2 * kShortBlock && 8 * most > n) most /= 2;
  return most;
}

// As many blocks of n keys as blocks of `most` would be, and of about one size: the last would be done before those
// that add to the same rows of dq before it, and wait. Ranges of keys begin at multiples of kStrip.
int32_t even_block(int64_t n, int32_t most) {
  const int64_t even = blocks_of(n, std::max<int64_t>(blocks_of(n, most), 1));
  return static_cast<int32_t>(std::min<int64_t>(blocks_of(std::max<int64_t>(even, 1), kStrip) * kStrip, most));
}

// Tiles no larger than what there is, in whole strips: what they leave empty would be cleared and stored all the same.
Config fitting(const Config& config, const Problem& p) {
  int64_t queries = 1, keys = 1;
  for (int32_t i = 0; i < p.num_sequences; ++i) {
    queries = std::max(queries, p.sequences[i].q_len);
    keys = std::max(keys, p.sequences[i].kv_len);
  }
  Config fit = config;
  fit.tile_q = static_cast<int32_t>(std::min<int64_t>(config.tile_q, blocks_of(queries, kStrip) * kStrip));
  fit.tile_kv = static_cast<int32_t>(std::min<int64_t>(config.tile_kv, blocks_of(keys, kStrip) * kStrip));
  return fit;
}

class Pass {
 public:
  // `carried`: of attention that carries; its tasks are blocks of keys of all heads, and it says what is not of pairs.
  // `map`: queries are gathered, and the program is that of the pairs that are chosen.
  Pass(const Program& program, const Problem& p, const Gradients& g, const Config& config, const Analysis& analysis,
       const Facts& facts, const CarriedBackwardCall* carried = nullptr, const ChosenMap* map = nullptr)
      : program_(program),
        p_(p),
        g_(g),
        analysis_(analysis),
        facts_(facts),
        kernel_(current_isa()),
        tile_kv_(config.tile_kv),
        fit_(fitting(config, p)),
        planned_{view(program, facts), &p, fit_.tile_q, fit_.tile_kv, false, program.mask >= 0},
        call_{planned_.code,
              &p,
              &g,
              fit_.tile_q,
              fit_.tile_kv,
              program.score >= 0 || program.slope >= 0 || !program.loads.empty() || program.unnormalized,
              map != nullptr},
        map_(map),
        carries_(carried != nullptr),
        even_(program.loads.empty() && !carries_ && map == nullptr),
        buffers_(program, p, g) {
    if (carried != nullptr) {
      carried_ = *carried;
      carried_.pairs = call_;
    }
    const auto n = static_cast<size_t>(p.num_sequences);
    first_block_.assign(n + 1, 0);
    first_task_.assign(n + 1, 0);
    first_structure_.assign(n + 1, 0);
    const bool by_head = ((program.boxes.mask_reads & kReadsHead) != 0 && !carries_) || map != nullptr;
    double flops = 0;
    for (size_t i = 0; i < n; ++i) {
      const Sequence& s = p.sequences[i];
      const int32_t head = p.first_head(static_cast<int32_t>(i)), heads = p.heads_of(static_cast<int32_t>(i));
      first_block_[i + 1] = first_block_[i] + q_blocks(s) * heads;
      first_task_[i + 1] = first_task_[i] + kv_blocks(s) * (carries_ ? 1 : heads / group());
      if (carries_) carried_.most_blocks = std::max(carried_.most_blocks, q_blocks(s));
      flops += 5.0 * static_cast<double>(s.q_len) * static_cast<double>(s.kv_len) * (p.head_dim + p.v_head_dim) * heads;
      for (int32_t h = 0; h < (by_head ? heads : 1); ++h)
        structures_.push_back({static_cast<int32_t>(i), head + h, by_head ? 1 : heads});
      first_structure_[i + 1] = structures_.size();
    }
    threads_ = static_cast<int>(std::clamp<int64_t>(first_task_.back(), 1, worth(config.threads, flops)));
    row_deal_.emplace(first_block_.back(), threads_);
    task_deal_.emplace(first_task_.back(), buffers_.in_order() ? 1 : threads_,
                       [this](int64_t i) { return first_of_head(i); });
    const auto blocks = static_cast<size_t>(first_block_.back());
    rows_.resize(blocks);
    turn_ = std::make_unique<std::atomic<int32_t>[]>(blocks);
    std::fill_n(turn_.get(), blocks, kUnseen);
    if (buffers_.by_pair() || map != nullptr)
      progress_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(first_task_.back()));
    statistics_.reset(new float[2 * blocks * static_cast<size_t>(fit_.tile_q)]);
    for (size_t i = 0; i < blocks; ++i) {
      rows_[i].lse = statistics_.get() + 2 * i * static_cast<size_t>(fit_.tile_q);
      rows_[i].delta = rows_[i].lse + fit_.tile_q;
    }
  }

  Status run() {
    on_threads(threads_, [this](int thread) {
      try {  // no exception may leave a parallel region
        look_at_structures();
        const auto all = static_cast<int64_t>(structures_.size());
        until([&] { return looked_at_.load(std::memory_order_acquire) == all || no_memory_; });
        if (!no_memory_) tasks(thread);
        for (int64_t block; (block = row_deal_->take(thread)) >= 0;) rows_of(block);  // that no tile has
      } catch (const std::bad_alloc&) {
        no_memory_ = true;
      }
    });
    if (no_memory_) return {Fault::no_memory, -1};
    if (g_.d_sink != nullptr) add_sinks();
    ran(kernel_);
    if (bad_load_ >= 0) return {Fault::index_range, bad_load_};
    return {};
  }

 private:
  int64_t q_blocks(const Sequence& s) const { return blocks_of(s.q_len, call_.tile_q); }
  int64_t kv_blocks(const Sequence& s) const { return blocks_of(s.kv_len, tile_kv(s)); }

  // A sequence's own: what is beside it in a batch may not order its sums. Tiles of several sequences that add to one
  // place of a captured tensor are alike.
  int32_t tile_kv(const Sequence& s) const {
    if (!even_) return call_.tile_kv;
    const int32_t most = planned_.has_mask ? masked_block(s.kv_len, tile_kv_) : tile_kv_;
    return std::min(even_block(s.kv_len, most), call_.tile_kv);
  }

  static size_t owner(const std::vector<int64_t>& first, int64_t i) {
    return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1);
  }

  Task queries_of(size_t sequence, int32_t head, int64_t row) const {
    const Sequence& s = p_.sequences[sequence];
    const int64_t first = row * call_.tile_q;
    return {static_cast<int32_t>(sequence), head, 1, first,
            static_cast<int32_t>(std::min<int64_t>(call_.tile_q, s.q_len - first))};
  }

  // What tasks need to know of a block of queries. The first to ask looks: it is then in this thread's cache.
  const RowBlock& rows_of(int64_t block) {
    RowBlock& rows = rows_[static_cast<size_t>(block)];
    std::atomic<int32_t>& turn = turn_[static_cast<size_t>(block)];
    if (turn.load(std::memory_order_acquire) >= 0) return rows;
    if (int32_t unseen = kUnseen; turn.compare_exchange_strong(unseen, kBeingSeen, std::memory_order_relaxed)) {
      const size_t sequence = owner(first_block_, block);
      const int64_t in_sequence = block - first_block_[sequence], per_head = q_blocks(p_.sequences[sequence]);
      const int32_t head = first_head(sequence) + static_cast<int32_t>(in_sequence / per_head);
      kernel_.backward_rows(call_, queries_of(sequence, head, in_sequence % per_head), rows);
      turn.store(0, std::memory_order_release);
    }
    until([&] { return turn.load(std::memory_order_acquire) >= 0; });
    return rows;
  }

  void look_at_structures() {
    const auto count = static_cast<int64_t>(structures_.size());
    const auto take = [this] { return next_structure_.fetch_add(1, std::memory_order_relaxed); };
    int64_t i = take();
    if (i >= count) return;
    Call planned = planned_;
    RowPlan plan(program_, p_, planned, analysis_, facts_);
    for (; i < count; i = take(), looked_at_.fetch_add(1, std::memory_order_release)) {
      Structure& structure = structures_[static_cast<size_t>(i)];
      const auto sequence = static_cast<size_t>(structure.sequence);
      const Sequence& s = p_.sequences[sequence];
      if (map_ != nullptr) {
        gather(structure, plan);
        continue;
      }
      planned.tile_kv = tile_kv(s);
      structure.rows.resize(static_cast<size_t>(q_blocks(s)));
      structure.first_row.assign(static_cast<size_t>(kv_blocks(s)), INT32_MAX);
      structure.last_row.assign(static_cast<size_t>(kv_blocks(s)), -1);
      for (int32_t row = 0; row < static_cast<int32_t>(structure.rows.size()); ++row) {
        Task task = queries_of(sequence, structure.head, row);
        task.heads = structure.heads;
        int32_t turn = 0;
        for (const KeyRange& keys : plan.plan(task)) {
          structure.rows[static_cast<size_t>(row)].push_back({keys, turn});
          const int64_t end = blocks_of(keys.first + keys.count, planned.tile_kv);
          for (int64_t column = keys.first / planned.tile_kv; column < end; ++column, ++turn) {
            int32_t& first = structure.first_row[static_cast<size_t>(column)];
            first = std::min(first, row);
            structure.last_row[static_cast<size_t>(column)] = row;
          }
        }
      }
    }
  }

  void gather(Structure& structure, RowPlan& plan) const {
    const Sequence& s = p_.sequences[structure.sequence];
    map_->find(structure.sequence, structure.head, 0, s.q_len, structure.choosers);
    structure.gathered.resize(static_cast<size_t>(kv_blocks(s)));
    for (int64_t column = 0; column < kv_blocks(s); ++column) {
      Task tile{structure.sequence, structure.head, 1, 0, 0};
      tile.kv_first = column * call_.tile_kv;
      tile.kv_end = tile.kv_first + call_.tile_kv;
      std::span<const int32_t> left = structure.choosers.of(tile.kv_first / map_->block());
      while (!left.empty()) {
        const Task task = take_listed(tile, left, call_.tile_q);
        for (const KeyRange& keys : plan.plan(task))
          structure.gathered[static_cast<size_t>(column)].push_back({task.listed, task.q_count, keys});
      }
    }
  }

  void add_sinks() {
    for (int32_t head = 0; head < p_.num_heads; ++head) {
      double sum = 0;
      for (size_t i = 0; i < static_cast<size_t>(p_.num_sequences); ++i) {
        const Sequence& s = p_.sequences[i];
        for (int64_t row = 0; row < q_blocks(s); ++row) {
          const RowBlock& block = rows_[static_cast<size_t>(first_block_[i] + head * q_blocks(s) + row)];
          for (int32_t m = 0; m < queries_of(i, head, row).q_count; ++m)
            if (block.lse[m] != kInf)
              sum -= std::exp(static_cast<double>(p_.sink[head]) - static_cast<double>(block.lse[m])) *
                     static_cast<double>(block.delta[m]);
        }
      }
      g_.d_sink[head] = static_cast<float>(sum);
    }
  }

  // ---- the tasks ----

  // The tiles of one task: head by head of its group, and in each the blocks of queries in order.
  struct Walk {
    Pass* pass;
    const BackwardTask* task;
    int64_t number;  // the task's
    int64_t before;  // the number of the last task at the same place among the keys, -1: there is none
    int32_t head;
    int32_t row;  // the next to look at, -1: the head's first
    RowBlock gathered;  // of the tile's queries, where they are gathered
    int64_t finished;  // of the tasks of the head's keys, those before this one had finished when last looked at

    const Structure& structure() const {
      const auto sequence = static_cast<size_t>(task->sequence);
      const size_t first = pass->first_structure_[sequence], end = pass->first_structure_[sequence + 1];
      return pass->structures_[first + (end - first == 1 ? 0 : static_cast<size_t>(head - pass->first_head(sequence)))];
    }

    int32_t tile_kv() const { return pass->tile_kv(pass->p_.sequences[task->sequence]); }

    bool next(BackwardTile& tile) {
      const int32_t group = pass->group();
      const auto column = static_cast<size_t>(task->first / tile_kv());
      for (; head < (task->kv_head + 1) * group; ++head, row = -1) {
        const Structure& s = structure();
        if (pass->map_ != nullptr) {
          const std::vector<GatheredTile>& tiles = s.gathered[column];
          if (++row == static_cast<int32_t>(tiles.size())) continue;
          take(tiles[static_cast<size_t>(row)], tile);
          return true;
        }
        if (row < 0) row = s.first_row[column];
        while (row <= s.last_row[column]) {
          const int32_t at = row++;
          if (find(s.rows[static_cast<size_t>(at)], tile)) {
            describe(tile, at, head);
            return true;
          }
        }
      }
      return false;
    }

    void take(const GatheredTile& from, BackwardTile& tile) {
      tile.queries = {task->sequence, head, 1, 0, from.count};
      tile.queries.listed = from.queries;
      tile.first = from.keys.first;
      tile.count = from.keys.count;
      tile.full = from.keys.full;
      const auto sequence = static_cast<size_t>(task->sequence);
      const int32_t tile_q = pass->call_.tile_q;
      const int64_t first = pass->first_block_[sequence] +
                            (head - pass->first_head(sequence)) * pass->q_blocks(pass->p_.sequences[sequence]);
      gathered.dead = false;
      gathered.finite = true;
      for (int32_t m = 0; m < from.count; ++m) {
        const RowBlock& block = pass->rows_of(first + from.queries[m] / tile_q);
        gathered.lse[m] = block.lse[from.queries[m] % tile_q];
        gathered.delta[m] = block.delta[from.queries[m] % tile_q];
        gathered.dead |= gathered.lse[m] == kInf;
        gathered.finite &= block.finite;
      }
      tile.rows = gathered;
    }

    void describe(BackwardTile& tile, int32_t at, int32_t of_head) const {
      const auto sequence = static_cast<size_t>(task->sequence);
      tile.queries = pass->queries_of(sequence, of_head, at);
      tile.block = pass->first_block_[sequence] +
                   (of_head - pass->first_head(sequence)) * pass->q_blocks(pass->p_.sequences[sequence]) + at;
      tile.rows = pass->rows_of(tile.block);
    }

    bool find(const std::vector<RowRange>& row_ranges, BackwardTile& tile) const {
      const int64_t first = task->first, end = first + task->count;
      auto range = std::lower_bound(row_ranges.begin(), row_ranges.end(), end,
                                    [](const RowRange& r, int64_t key) { return r.keys.first < key; });
      if (range == row_ranges.begin()) return false;
      const auto& [keys, turn] = *--range;
      tile.first = std::max(first, keys.first);
      tile.count = static_cast<int32_t>(std::min(end, keys.first + keys.count) - tile.first);
      tile.full = keys.full;
      tile.turn = turn + static_cast<int32_t>((tile.first - keys.first) / tile_kv());
      return tile.count > 0;
    }
  };

  static bool tile_at(void* state, int32_t row, int32_t head, BackwardTile* tile) {
    const Walk& walk = *static_cast<Walk*>(state);
    if (!walk.find(walk.structure().rows[static_cast<size_t>(row)], *tile)) return false;
    walk.describe(*tile, row, head);
    return true;
  }

  static bool next_tile(void* walk, BackwardTile* tile) { return static_cast<Walk*>(walk)->next(*tile); }

  // A run of tasks is taken in order, by its own thread before any other's, and what a task waits for is before it in
  // its run: the first one that is not finished never waits. There is no deadlock.
  static void wait(void* state, const BackwardTile& tile) {
    Walk& walk = *static_cast<Walk*>(state);
    if (walk.pass->map_ != nullptr) return walk.pass->wait_for_keys_before(walk, tile);
    const std::atomic<int32_t>& turn = walk.pass->turn_[static_cast<size_t>(tile.block)];
    until([&] { return turn.load(std::memory_order_acquire) == tile.turn; });
  }

  static void order(void* state, const BackwardTile& tile) {
    const Walk& walk = *static_cast<Walk*>(state);
    if (walk.pass->buffers_.by_turn()) wait(state, tile);
    if (walk.pass->buffers_.by_pair() && walk.before >= 0) {
      const auto task = static_cast<size_t>(walk.before);
      const int64_t needed = walk.pass->position(task, walk.pass->group() - 1, tile.queries.last_query());
      until([&] { return walk.pass->progress_[task].load(std::memory_order_acquire) >= needed; });
    }
  }

  // Of gathered queries some may have no tile before: then all tasks of keys before these have to be beyond them.
  void wait_for_keys_before(Walk& walk, const BackwardTile& tile) const {
    const int64_t column = walk.task->first / call_.tile_kv, before = walk.number - column;
    const int64_t needed =
        position(static_cast<size_t>(walk.number), tile.queries.head % group(), tile.queries.last_query());
    for (int64_t c = walk.finished; c < column; ++c) {
      const std::atomic<int64_t>& task = progress_[static_cast<size_t>(before + c)];
      int64_t progress = 0;
      until([&] { return (progress = task.load(std::memory_order_acquire)) >= needed; });
      if (progress == INT64_MAX && c == walk.finished) ++walk.finished;
    }
  }

  static void done(void* state, const BackwardTile& tile) {
    const Walk& walk = *static_cast<Walk*>(state);
    Pass& pass = *walk.pass;
    if (pass.map_ == nullptr)
      pass.turn_[static_cast<size_t>(tile.block)].store(tile.turn + 1, std::memory_order_release);
    if (pass.progress_) {
      const auto task = static_cast<size_t>(walk.number);
      pass.progress_[task].store(pass.position(task, tile.queries.head % pass.group(), tile.queries.last_query()),
                                 std::memory_order_release);
    }
  }

  int32_t group() const { return p_.num_heads / p_.num_kv_heads; }
  int32_t first_head(size_t sequence) const { return p_.first_head(static_cast<int32_t>(sequence)); }

  // How far a task is when it has done a tile with this last query; queries that it does not have count as its last.
  int64_t position(size_t task, int32_t head_of_group, int64_t query) const {
    const int64_t queries = p_.sequences[owner(first_task_, static_cast<int64_t>(task))].q_len;
    return head_of_group * queries + std::min(query + 1, queries);
  }

  // The task before `i` at the same place among the keys.
  int64_t task_before(int64_t i, size_t sequence, int64_t column) const {
    if (i - kv_blocks(p_.sequences[sequence]) >= first_task_[sequence]) return i - kv_blocks(p_.sequences[sequence]);
    while (sequence-- > 0)
      if (const int64_t width = kv_blocks(p_.sequences[sequence]); column < width && p_.num_kv_heads > 0)
        return first_task_[sequence + 1] - width + column;
    return -1;
  }

  // The first task of the head of task i, or of its sequence where heads carry from one to another.
  int64_t first_of_head(int64_t i) const {
    const size_t sequence = owner(first_task_, i);
    const int64_t blocks = kv_blocks(p_.sequences[sequence]);
    return first_task_[sequence] + (i - first_task_[sequence]) / blocks * blocks;
  }

  void tasks(int thread) {
    float* memory = workspace(carries_ ? kernel_.carry.backward_bytes(carried_) : kernel_.backward_bytes(call_));
    if (memory == nullptr) throw std::bad_alloc();
    BufferGradients::Parts parts = buffers_.parts();
    std::vector<float> statistics(map_ == nullptr ? 0 : 2 * static_cast<size_t>(call_.tile_q));
    const RowBlock gathered{statistics.data(), statistics.data() + statistics.size() / 2, false, true};
    // Nothing below allocates: a task that stopped half-way would be waited for.
    for (int64_t i; (i = task_deal_->take(thread)) >= 0;) {
      const size_t sequence = owner(first_task_, i);
      const Sequence& s = p_.sequences[sequence];
      const int64_t in_sequence = i - first_task_[sequence], column = in_sequence % kv_blocks(s);
      const int64_t first = column * tile_kv(s);
      const BackwardTask task{static_cast<int32_t>(sequence),
                              first_head(sequence) / group() + static_cast<int32_t>(in_sequence / kv_blocks(s)), first,
                              static_cast<int32_t>(std::min<int64_t>(tile_kv(s), s.kv_len - first)),
                              parts.targets.data()};
      Walk walk{this, &task,    i, buffers_.by_pair() ? task_before(i, sequence, column) : -1, task.kv_head * group(),
                -1,   gathered, 0};
      const Tiles tiles{&walk, next_tile, order, wait, done};
      const int32_t bad = carries_
                              ? kernel_.carry.backward(
                                    carried_, task, {tiles, &walk, static_cast<int32_t>(q_blocks(s)), tile_at}, memory)
                              : kernel_.backward(call_, task, tiles, memory);
      if (bad >= 0) bad_load_ = bad;
      if (progress_) progress_[static_cast<size_t>(i)].store(INT64_MAX, std::memory_order_release);
      buffers_.merge(parts, i);
    }
  }

  const Program& program_;
  const Problem& p_;
  const Gradients& g_;
  const Analysis& analysis_;
  const Facts& facts_;
  const Kernel& kernel_;
  const int32_t tile_kv_;  // what was asked for: what depends on it may not depend on the other sequences of a batch
  const Config fit_;
  const Call planned_;
  const BackwardCall call_;
  const ChosenMap* const map_;
  const bool carries_;
  const bool even_;  // blocks of keys: see tile_kv
  BufferGradients buffers_;
  CarriedBackwardCall carried_{};
  int threads_ = 1;
  std::vector<int64_t> first_block_, first_task_;  // of each sequence: blocks of queries by head, tasks
  std::vector<size_t> first_structure_;
  std::vector<Structure> structures_;
  std::vector<RowBlock> rows_;
  std::unique_ptr<float[]> statistics_;
  std::unique_ptr<std::atomic<int32_t>[]>
      turn_;  // of each block of queries: tiles that are done, or how far it is seen
  std::unique_ptr<std::atomic<int64_t>[]> progress_;  // of each task: the position of its last tile
  std::optional<Deal> row_deal_, task_deal_;
  std::atomic<int64_t> next_structure_{0};
  std::atomic<int64_t> looked_at_{0};  // structures
  std::atomic<int32_t> bad_load_{-1};
  std::atomic<bool> no_memory_{false};
};

}  // namespace

Status attend_backward(const Program& program, const Problem& given, const Gradients& gradients, const Config& config) {
  if (given.num_heads == 0 || given.num_sequences == 0) return {};
  // Gradients go straight through what queries and keys are rounded to: they are those at what the codes mean.
  Problem p = given;
  Encoded encoded;
  if (p.encoding.q_tile > 0) {
    if (!encoded.encode(p, current_isa(), worth(config.threads, 1e9))) return {Fault::no_memory, -1};
    encoded.decode(p);
  }
  Analysis analysis(program, p);
  const Facts facts = analysis.prove();
  if (facts.status.fault != Fault::none) return facts.status;
  // Rows that are listed are copied as they lie in memory.
  const bool adjacent = p.q.stride[3] == 1 && gradients.d_o.stride[3] == 1;
  if (const auto map = adjacent ? ChosenMap::of(program, p, analysis, facts, config.tile_kv) : std::nullopt) {
    Analysis of_chosen(*program.chosen, p);
    const Facts found = of_chosen.prove();
    if (found.status.fault != Fault::none) return found.status;
    return Pass(*program.chosen, p, gradients, config, of_chosen, found, nullptr, &*map).run();
  }
  return Pass(program, p, gradients, config, analysis, facts).run();
}

Status attend_carried_backward(const Program& score, const Program& carry, const Problem& p, const Carry& what,
                               const Gradients& gradients, const CarryGradients& of_carry, const Config& config) {
  if (p.num_heads == 0 || p.num_sequences == 0) return {};
  Analysis analysis(score, p), selecting(carry, p);
  const Facts facts = analysis.prove(), carry_facts = selecting.prove();
  if (facts.status.fault != Fault::none) return facts.status;
  if (carry_facts.status.fault != Fault::none) return {carry_facts.status.fault, carry_facts.status.value | kOfCarry};
  CarriedBackwardCall call{};
  call.selecting = view(carry, carry_facts);
  call.head = what.head;
  call.subtracts = subtracts(score);
  call.mask_by_head = (score.boxes.mask_reads & kReadsHead) != 0;
  call.keys = what.keys;
  call.initial = what.sums;
  call.gone = what.gone;
  call.d_carry = of_carry.d_carry;
  call.d_initial = of_carry.d_initial;
  return Pass(score, p, gradients, config, analysis, facts, &call).run();
}

}  // namespace attnkit::cpu
