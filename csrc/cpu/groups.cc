#include "groups.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "attend.h"
#include "backward.h"
#include "run.h"

namespace attnkit::cpu {
namespace {

int64_t length_of(const int32_t* list, int64_t most) {
  return std::partition_point(list, list + most, [](int32_t token) { return token >= 0; }) - list;
}

// The groups of a problem as sequences.
class Grouped {
 public:
  Grouped(const Problem& p, const Lists& queries, const Lists& keys) : problem(p) {
    const int64_t entries = p.num_sequences, sets = std::max(queries.heads, keys.heads);
    const auto heads = static_cast<int32_t>(p.num_heads / sets);
    const auto n = static_cast<size_t>(entries * sets * queries.groups);
    groups_.reserve(n);
    sequences_.reserve(n);
    for (int32_t b = 0; b < entries; ++b)
      for (int32_t set = 0; set < sets; ++set)
        for (int64_t g = 0; g < queries.groups; ++g) {
          const int32_t *q = queries.of(b, set, g), *k = keys.of(b, set, g);
          groups_.push_back({b, set * heads, heads, q, k, g * queries.most, g * keys.most});
          sequences_.push_back({b, 0, length_of(q, queries.most), 0, length_of(k, keys.most)});
        }
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

// Calls work(i, memory) for i < n on so many threads, each with so much memory of its own. False: there is not as much.
template <class Work>
bool each(int64_t n, int threads, size_t bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  on_threads(static_cast<int>(std::clamp<int64_t>(n, 1, std::max(threads, 1))), [&] {
    float* memory = bytes == 0 ? nullptr : workspace(bytes);
    if (bytes != 0 && memory == nullptr) {
      no_memory = true;
      return;
    }
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i, memory);
  });
  return !no_memory;
}

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
  return attend(program, Grouped(p, queries, keys).problem, config);
}

Status attend_groups_backward(const Program& program, const Problem& p, const Gradients& gradients,
                              const Lists& queries, const Lists& keys, const Config& config) {
  return attend_backward(program, Grouped(p, queries, keys).problem, gradients, config);
}

void sum_rows(const RowSums& sums, const Lists& lists, int64_t batches, int64_t heads, int64_t tokens, int threads) {
  constexpr int64_t kTokens = 1024;
  threads = worth(threads, static_cast<double>(batches * heads * tokens) * sums.channels);
  std::vector<Inverse> inverses;
  for (int64_t plane = 0; plane < lists.batches * lists.heads; ++plane)
    inverses.emplace_back(lists.tokens + plane * lists.rows(), lists.rows(), tokens);
  const int64_t parts = (tokens + kTokens - 1) / kTokens, group = heads / lists.heads;
  each(batches * heads * parts, threads, 0, [&](int64_t i, float*) {
    const int64_t plane = i / parts, b = plane / heads, h = plane % heads, first = i % parts * kTokens;
    const Inverse& of = inverses[static_cast<size_t>(b % lists.batches * lists.heads + h / group)];
    current_isa().groups.sum_rows(sums, {of.first.data(), of.rows.data()}, static_cast<int32_t>(b),
                                  static_cast<int32_t>(h), plane * lists.rows(), first,
                                  std::min(first + kTokens, tokens));
  });
}

}  // namespace attnkit::cpu
