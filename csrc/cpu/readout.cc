#include "readout.h"

#include <algorithm>
#include <atomic>
#include <span>

#include "blocks.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

constexpr int32_t kQueries = 96;    // of a tile: it orders sums over queries
constexpr int64_t kMostKeys = 1024;  // of a task of columns: they stay in the cache while the queries go by

// Some heads of a sequence that share a kv head, and the part-th stretch of what a pass goes by.
struct Piece {
  int32_t sequence, head, heads;
  int64_t part;
};

class Passes {
 public:
  Passes(const Program& program, const Problem& p, const Readout& out, const Config& config, const Analysis& proven,
         const Facts& facts)
      : program_(program),
        p_(p),
        out_(out),
        config_(config),
        proven_(proven),
        facts_(facts),
        call_(call_of(program, facts, p, config, kQueries)),
        chunk_(blocks_of(kMostKeys, config.tile_kv) * config.tile_kv),
        kernel_(current_isa().readout) {}

  // What belongs to a query, of all its keys.
  Status rows() {
    Readout out = only();
    out.row_max = out_.row_max;
    out.entropy = out_.entropy;
    out.best = out_.best;
    const auto blocks = [&](const Sequence& s) { return blocks_of(s.q_len, call_.tile_q); };
    return run(pieces(blocks, true), [&](const Piece& piece, RowPlan& plan, float* memory) {
      return visit(queries(piece, piece.part), plan, out, memory);
    });
  }

  // What belongs to a key, of all queries, in their order.
  Status columns() {
    Readout out = only();
    out.column_sum = out_.column_sum;
    out.column_max = out_.column_max;
    const auto chunks = [&](const Sequence& s) { return blocks_of(s.kv_len, chunk_); };
    return run(pieces(chunks, true), [&](const Piece& piece, RowPlan& plan, float* memory) {
      int32_t bad = -1;
      for (int64_t block = 0; block < blocks_of(p_.sequences[piece.sequence].q_len, call_.tile_q); ++block) {
        Task task = queries(piece, block);
        task.kv_first = piece.part * chunk_;
        task.kv_end = task.kv_first + chunk_;
        bad = std::max(bad, visit(task, plan, out, memory));
      }
      return bad;
    });
  }

  // The weights of the rows that are listed.
  Status weights() {
    std::vector<std::vector<int32_t>> listed;  // of each sequence, by its own numbers
    std::vector<int64_t> before;               // rows of sequences before it in the batch entry
    for (int32_t i = 0; i < p_.num_sequences; ++i) {
      const Sequence& s = p_.sequences[i];
      const int32_t* end = out_.rows + out_.num_rows;
      const int32_t* first = std::lower_bound(out_.rows, end, s.q_start);
      before.push_back(first - out_.rows);
      std::vector<int32_t> own(first, std::lower_bound(first, end, s.q_start + s.q_len));
      for (int32_t& row : own) row -= static_cast<int32_t>(s.q_start);
      listed.push_back(std::move(own));
    }
    const auto of = [&](const Sequence& s) { return static_cast<size_t>(&s - p_.sequences); };
    const auto blocks = [&](const Sequence& s) {
      return blocks_of(static_cast<int64_t>(listed[of(s)].size()), call_.tile_q);
    };
    return run(pieces(blocks, false), [&](const Piece& piece, RowPlan& plan, float* memory) {
      const auto sequence = static_cast<size_t>(piece.sequence);
      const int64_t first = piece.part * call_.tile_q;
      Task task{piece.sequence, piece.head, 1, 0, 0};
      task.listed = listed[sequence].data() + first;
      task.q_count =
          static_cast<int32_t>(std::min<int64_t>(call_.tile_q, static_cast<int64_t>(listed[sequence].size()) - first));
      Readout out = only();
      out.weights = out_.weights + (before[sequence] + first) * out_.keys;
      return visit(task, plan, out, memory);
    });
  }

 private:
  // Nothing of what is asked for.
  Readout only() const {
    Readout out = out_;
    out.column_sum = out.column_max = out.row_max = out.entropy = out.best = out.weights = nullptr;
    return out;
  }

  // `parts(sequence)`: of each head. `together`: few queries of the heads that share keys are one piece.
  template <class Parts>
  std::vector<Piece> pieces(const Parts& parts, bool together) const {
    const int32_t group = p_.num_heads / p_.num_kv_heads;
    std::vector<Piece> all;
    for (int32_t i = 0; i < p_.num_sequences; ++i) {
      const int32_t heads = together && p_.sequences[i].q_len * group <= call_.tile_q ? group : 1;
      for (int32_t head = 0; head < p_.num_heads; head += heads)
        for (int64_t part = 0; part < parts(p_.sequences[i]); ++part) all.push_back({i, head, heads, part});
    }
    return all;
  }

  Task queries(const Piece& piece, int64_t block) const {
    const int64_t first = block * call_.tile_q, left = p_.sequences[piece.sequence].q_len - first;
    return {piece.sequence, piece.head, piece.heads, first,
            static_cast<int32_t>(std::min<int64_t>(call_.tile_q, left))};
  }

  int32_t visit(const Task& task, RowPlan& plan, const Readout& out, float* memory) const {
    const std::vector<KeyRange>& ranges = plan.plan(task);
    return ranges.empty() ? -1 : kernel_.run(call_, task, ranges.data(), ranges.size(), out, memory);
  }

  template <class Work>
  Status run(const std::vector<Piece>& pieces, const Work& work) const {
    double flops = 0;
    for (int32_t i = 0; i < p_.num_sequences; ++i)
      flops += 2.0 * static_cast<double>(p_.sequences[i].q_len) * static_cast<double>(p_.sequences[i].kv_len) *
               p_.head_dim * p_.num_heads;
    const auto count = static_cast<int64_t>(pieces.size());
    if (count == 0) return {};
    const int threads = static_cast<int>(std::min<int64_t>(worth(config_.threads, flops), count));
    Deal deal(count, threads);
    std::atomic<int32_t> bad_load{-1};
    const bool enough = on_threads_with_memory(threads, kernel_.bytes(call_), [&](int thread, float* memory) {
      RowPlan plan(program_, p_, call_, proven_, facts_);
      for (int64_t i; (i = deal.take(thread)) >= 0;)
        if (const int32_t bad = work(pieces[static_cast<size_t>(i)], plan, memory); bad >= 0) bad_load = bad;
    });
    if (!enough) return {Fault::no_memory, -1};
    ran(current_isa());
    if (bad_load >= 0) return {Fault::index_range, bad_load};
    return {};
  }

  const Program& program_;
  const Problem& p_;
  const Readout& out_;
  const Config& config_;
  const Analysis& proven_;
  const Facts& facts_;
  const Call call_;
  const int64_t chunk_;
  const ReadoutKernel& kernel_;
};

}  // namespace

Status readout(const Program& program, const Problem& p, const Readout& out, const Config& config) {
  if (p.num_heads == 0 || p.num_sequences == 0) return {};
  Analysis analysis(program, p);
  const Facts facts = analysis.prove();
  if (facts.status.fault != Fault::none) return facts.status;
  Passes passes(program, p, out, config, analysis, facts);
  Status status;
  if (out.row_max != nullptr || out.entropy != nullptr || out.best != nullptr) status = passes.rows();
  if (status.fault == Fault::none && (out.column_sum != nullptr || out.column_max != nullptr))
    status = passes.columns();
  if (status.fault == Fault::none && out.weights != nullptr) status = passes.weights();
  return status;
}

}  // namespace attnkit::cpu
