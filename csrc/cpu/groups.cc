#include "groups.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attend.h"
#include "backward.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

constexpr int64_t kMostRowFloats = int64_t{1} << 22;  // at a time, unless one head has more

int64_t length_of(const int32_t* list, int64_t most) {
  return std::partition_point(list, list + most, [](int32_t token) { return token >= 0; }) - list;
}

// The heads of a batch entry that have lists in common, one plane after the other.
struct PlanesOf {
  int64_t sets, count;  // of heads, of planes
  int32_t heads;        // of each

  PlanesOf(const Problem& p, const Lists& queries, const Lists& keys)
      : sets(std::max(queries.heads, keys.heads)),
        count(p.num_sequences * sets),
        heads(static_cast<int32_t>(p.num_heads / sets)) {}
};

// The groups of planes first .. end - 1 as sequences.
class Grouped {
 public:
  Grouped(const Problem& p, const Lists& queries, const Lists& keys, int64_t first, int64_t end) : problem(p) {
    const PlanesOf planes(p, queries, keys);
    const auto n = static_cast<size_t>((end - first) * queries.groups);
    groups_.reserve(n);
    sequences_.reserve(n);
    for (int64_t plane = first; plane < end; ++plane)
      for (int64_t g = 0; g < queries.groups; ++g) {
        const auto b = static_cast<int32_t>(plane / planes.sets), set = static_cast<int32_t>(plane % planes.sets);
        const int32_t *q = queries.of(b, set, g), *k = keys.of(b, set, g);
        groups_.push_back({b, set * planes.heads, planes.heads, q, k, g * queries.most, g * keys.most});
        sequences_.push_back({b, 0, length_of(q, queries.most), 0, length_of(k, keys.most)});
      }
    const int64_t entries = p.num_sequences;
    problem.q_tokens = entries > 0 ? p.sequences[0].q_len : 0;
    problem.kv_tokens = entries > 0 ? p.sequences[0].kv_len : 0;
    problem.groups = groups_.data();
    problem.sequences = sequences_.data();
    problem.num_sequences = static_cast<int32_t>(sequences_.size());
  }

  Problem problem;

 private:
  std::vector<Group> groups_;
  std::vector<Sequence> sequences_;
};

// The rows of each token of one head, in the order of groups.
struct Inverse {
  std::vector<int32_t> first, rows;

  Inverse(const int32_t* lists, int64_t rows_of_head, int64_t tokens)
      : first(static_cast<size_t>(tokens) + 2), rows(static_cast<size_t>(rows_of_head)) {
    for (int64_t r = 0; r < rows_of_head; ++r)
      if (lists[r] >= 0) ++first[static_cast<size_t>(lists[r]) + 2];
    for (size_t t = 2; t < first.size(); ++t) first[t] += first[t - 1];
    for (int64_t r = 0; r < rows_of_head; ++r)
      if (lists[r] >= 0)
        rows[static_cast<size_t>(first[static_cast<size_t>(lists[r]) + 1]++)] = static_cast<int32_t>(r);
  }
};

// Heads first .. end - 1, those of one batch entry after those of another.
void sum_planes(const RowSums& sums, const Lists& lists, int64_t first, int64_t end, int64_t heads, int64_t tokens,
                int threads) {
  constexpr int64_t kTokens = 1024;
  threads = worth(threads, static_cast<double>((end - first) * tokens) * sums.channels);
  const int64_t parts = (tokens + kTokens - 1) / kTokens, group = heads / lists.heads;
  const auto lists_of = [&](int64_t head) { return head / heads % lists.batches * lists.heads + head % heads / group; };
  std::vector<std::unique_ptr<Inverse>> inverses(static_cast<size_t>(lists.batches * lists.heads));
  for (int64_t head = first; head < end; ++head)
    if (std::unique_ptr<Inverse>& of = inverses[static_cast<size_t>(lists_of(head))]; !of)
      of = std::make_unique<Inverse>(lists.tokens + lists_of(head) * lists.rows(), lists.rows(), tokens);
  each_task((end - first) * parts, threads, 0, [&](int64_t i, float*) {
    const int64_t head = first + i / parts, token = i % parts * kTokens;
    const Inverse& of = *inverses[static_cast<size_t>(lists_of(head))];
    current_isa().groups.sum_rows(sums, {of.first.data(), of.rows.data()}, static_cast<int32_t>(head / heads),
                                  static_cast<int32_t>(head % heads), head * lists.rows(), token,
                                  std::min(token + kTokens, tokens));
  });
}

}  // namespace

ListFacts look_at(const Lists& lists, int64_t tokens) {
  ListFacts facts;
  std::vector<uint8_t> seen(static_cast<size_t>(tokens));
  for (int64_t plane = 0; plane < lists.batches * lists.heads; ++plane) {
    std::fill(seen.begin(), seen.end(), 0);
    int64_t found = 0;
    for (int64_t g = 0; g < lists.groups; ++g) {
      const int32_t* list = lists.tokens + (plane * lists.groups + g) * lists.most;
      int32_t last = -1;
      bool ended = false;
      for (int64_t i = 0; i < lists.most; ++i) {
        const int32_t token = list[i];
        if (token == -1) {
          ended = true;
          continue;
        }
        if (ended || token <= last || token >= tokens) {
          facts.valid = false;
          return facts;
        }
        last = token;
        facts.shared |= seen[static_cast<size_t>(token)] != 0;
        found += seen[static_cast<size_t>(token)] == 0;
        seen[static_cast<size_t>(token)] = 1;
      }
    }
    facts.complete &= found == tokens;
  }
  return facts;
}

Status attend_groups(const Program& program, const Problem& p, const Lists& queries, const Lists& keys,
                     const Config& config) {
  return attend(program, Grouped(p, queries, keys, 0, PlanesOf(p, queries, keys).count).problem, config);
}

Status attend_groups_mean(const Program& program, const Problem& p, const Lists& queries, const Lists& keys,
                          const Config& config) {
  const PlanesOf planes(p, queries, keys);
  const int64_t of_head = queries.rows() * p.v_head_dim, of_plane = of_head * planes.heads;
  const int64_t at_once = std::clamp<int64_t>(kMostRowFloats / std::max<int64_t>(of_plane, 1), 1, planes.count);
  const std::unique_ptr<float[]> rows(new (std::nothrow) float[static_cast<size_t>(at_once * of_plane)]);
  if (!rows) return {Fault::no_memory, -1};
  for (int64_t first = 0; first < planes.count; first += at_once) {
    const int64_t end = std::min(first + at_once, planes.count);
    Grouped grouped(p, queries, keys, first, end);
    // As if those of all heads were there.
    const auto start =
        reinterpret_cast<uintptr_t>(rows.get()) - static_cast<uintptr_t>(first * of_plane) * sizeof(float);
    grouped.problem.o = {reinterpret_cast<char*>(start), {of_head * p.num_heads, of_head, p.v_head_dim, 1}};
    grouped.problem.q_rows = true;
    const Status status = attend(program, grouped.problem, config);
    if (status.fault != Fault::none) return status;
    const RowSums sums{grouped.problem.o, p.o, p.dtype, p.v_head_dim, true, nullptr};
    sum_planes(sums, queries, first * planes.heads, end * planes.heads, p.num_heads, p.sequences[0].q_len,
               config.threads);
  }
  return {};
}

Status attend_groups_backward(const Program& program, const Problem& p, const Gradients& gradients,
                              const Lists& queries, const Lists& keys, const Config& config) {
  return attend_backward(program, Grouped(p, queries, keys, 0, PlanesOf(p, queries, keys).count).problem, gradients,
                         config);
}

void sum_rows(const RowSums& sums, const Lists& lists, int64_t batches, int64_t heads, int64_t tokens, int threads) {
  sum_planes(sums, lists, 0, batches * heads, heads, tokens, threads);
}

}  // namespace attnkit::cpu
