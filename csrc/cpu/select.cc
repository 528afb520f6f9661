#include "select.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <vector>

#include "attend.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

// One of the selection's expressions, and what was proven of it.
class Expression {
 public:
  Expression(const Program& program, const Problem& pairs) : analysis_(program, pairs) {
    facts_ = analysis_.prove(true);
    code_ = view(program, facts_);
  }
  Status status() const { return facts_.status; }
  const CodeView* code() const { return &code_; }

 private:
  Analysis analysis_;
  Facts facts_;
  CodeView code_;
};

int64_t pieces_of(int64_t n) { return (n + kSelectRows - 1) / kSelectRows; }

// Runs work(batch entry, head, piece, workspace), which returns the instruction of a bad load or -1, for all of them.
template <class Work>
Status each(const Selection& s, int32_t heads, int64_t pieces, int threads, size_t bytes, const Work& work) {
  const int64_t tasks = int64_t{s.batch} * heads * pieces;
  std::atomic<int32_t> bad_load{-1};
  const bool enough = each_task(tasks, threads, bytes, [&](int64_t i, float* memory) {
    const auto b = static_cast<int32_t>(i / pieces / heads), head = static_cast<int32_t>(i / pieces % heads);
    const int32_t bad = work(b, head, i % pieces, memory);
    if (bad >= 0) bad_load = bad;
  });
  if (!enough) return {Fault::no_memory, -1};
  if (bad_load >= 0) return {Fault::index_range, bad_load};
  return {};
}

int32_t count_of(int64_t piece, int64_t n) {
  return static_cast<int32_t>(std::min<int64_t>(kSelectRows, n - piece * kSelectRows));
}

}  // namespace

Status select(Selection s, const Program* mask, const Program* force, int threads) {
  const int64_t rows = s.rows(), columns = s.columns();
  if (s.batch == 0 || s.q_heads == 0 || rows == 0 || columns == 0) return {};
  std::optional<Expression> of_mask, of_force;
  if (mask != nullptr) s.mask = of_mask.emplace(*mask, *s.pairs).code();
  if (force != nullptr) s.force = of_force.emplace(*force, *s.pairs).code();
  for (const auto* expression : {&of_mask, &of_force})
    if (*expression && (*expression)->status().fault != Fault::none) return (*expression)->status();

  constexpr int64_t kVectors = 32;  // two of any instruction set
  s.stride = (columns + kVectors - 1) / kVectors * kVectors;
  const auto key_heads = static_cast<size_t>(s.batch) * static_cast<size_t>(s.k_heads);
  std::vector<float> means(key_heads * static_cast<size_t>(s.head_dim * s.stride));
  std::vector<int32_t> is_coherent(s.coherent ? key_heads * static_cast<size_t>(s.stride) : 0);
  std::vector<float> center(s.centered ? key_heads * static_cast<size_t>(s.head_dim) : 0);
  s.means = means.data();
  s.is_coherent = is_coherent.data();
  s.center = center.data();

  const SelectKernel& kernel = current_isa().select;
  const size_t bytes = kernel.bytes(s);
  const double dim = s.head_dim, batch = s.batch, q_tokens = static_cast<double>(s.q_len) * s.q_heads,
               k_tokens = static_cast<double>(s.kv_len) * s.k_heads,
               pairs = static_cast<double>(rows) * static_cast<double>(columns) * s.q_heads;
  threads = worth(threads, batch * (dim * (q_tokens + k_tokens + 2 * pairs) + 32 * pairs));
  Status status;
  if (s.centered)
    status = each(s, s.k_heads, 1, threads, bytes, [&](int32_t b, int32_t head, int64_t, float* memory) {
      kernel.center(s, b, head, memory);
      return -1;
    });
  if (status.fault == Fault::none)
    status = each(s, s.k_heads, pieces_of(columns), threads, bytes,
                  [&](int32_t b, int32_t head, int64_t piece, float* memory) {
                    kernel.columns(s, b, head, piece * kSelectRows, count_of(piece, columns), memory);
                    return -1;
                  });
  if (status.fault == Fault::none)
    status = each(s, s.choosers(), pieces_of(rows), threads, bytes,
                  [&](int32_t b, int32_t head, int64_t piece, float* memory) {
                    return kernel.rows(s, b, head, piece * kSelectRows, count_of(piece, rows), memory);
                  });
  if (status.fault == Fault::none) ran(current_isa());
  return status;
}

}  // namespace attnkit::cpu
