// Attention within groups of tokens, and how tokens are routed to groups: python/attnkit/variants/routing.py.
//
// A group is a sequence of its own to the kernels: they copy its listed keys a tile at a time, as they need them. Where
// a token is in several groups, each group leaves rows of its own, and a token's rows are then summed in the order of
// groups.
#pragma once
#include "problem.h"
#include "recur.h"

namespace attnkit::cpu {

struct Config;
struct Program;

// Tokens of [batch, head, token, channel] against the centroids of their head.
struct Affinities {
  View x;
  DType dtype;
  int32_t head_dim;
  RowNorm norm;  // of the tokens
  const float* centroids;  // [head][channel][lanes], 0 beyond the last centroid
  int32_t count, lanes;  // of them; whole vectors of any instruction set
  int64_t stride;  // from one centroid's affinities to the next's
};

// Of one head of a batch entry: the rows of token t are rows[first[t]] .. rows[first[t + 1] - 1].
struct TokenRows {
  const int32_t *first, *rows;
};

struct RowSums {
  View from;  // float32 [batch, head, row, channel], channels adjacent
  View to;  // [batch, head, token, channel]
  DType dtype;
  int32_t channels;
  bool mean;
  float* lse;  // of rows, contiguous: each is raised by the logarithm of how many a token has. Or null
};

// What an instruction set does.
struct GroupKernel {
  size_t (*affinity_bytes)(const Affinities&);
  // to[c * stride + n] = norm(token n) . centroid c for tokens first .. first + count - 1; first is a multiple of 16.
  void (*affinities)(const Affinities&, int32_t batch, int32_t head, int64_t first, int32_t count, float* to,
                     float* workspace);
  // The places of the w largest of n numbers, ascending; ties to the first, NaN last. w < n; `keys` has room for n
  // numbers, rounded up to 16.
  void (*best)(const float* numbers, int64_t n, int64_t w, float* keys, int32_t* places);
  void (*sum_rows)(const RowSums&, const TokenRows&, int32_t batch, int32_t head, int64_t row_of_head, int64_t first,
                   int64_t end);
};
inline constexpr int32_t kAffinityTokens = 64;  // at once, at most

// Whether every list ascends and names tokens there are; whether some token is in several of a head's lists, and
// whether each is in one.
struct ListFacts {
  bool valid = true, shared = false, complete = true;
};
ListFacts look_at(const Lists& lists, int64_t tokens);

// `attend` and `attend_backward` within groups. The problem has a sequence for each batch entry; what it says of rows
// (Problem::q_rows, kv_rows) stays. Lists of queries and keys are `valid`.
Status attend_groups(const Program& program, const Problem& problem, const Lists& queries, const Lists& keys,
                     const Config& config);
Status attend_groups_backward(const Program& program, const Problem& problem, const Gradients& gradients,
                              const Lists& queries, const Lists& keys, const Config& config);

// The mean over the groups that a token is in, straight into o: rows are kept for some heads at a time. No lse.
Status attend_groups_mean(const Program& program, const Problem& problem, const Lists& queries, const Lists& keys,
                          const Config& config);

// The rows of lists, summed (averaged) for each of `tokens`; a token without any gets 0.
void sum_rows(const RowSums& sums, const Lists& lists, int64_t batches, int64_t heads, int64_t tokens, int threads);

// out[batch][head][c][0 .. w - 1]: the w tokens of largest affinity to centroid c, ascending; ties to the first.
Status route(const Affinities& of, int64_t batches, int64_t heads, int64_t tokens, int64_t w, int32_t* out,
             int threads);

// Strictly causal: a group for each block of positions and each centroid. Query i stands at position i + keys -
// queries; it goes to the centroid of largest affinity, and its group's keys are the w best of those before the block,
// and the block. Lists are [batch][head][blocks * count][block] and [..][w + block], filled up with -1.
struct PrefixBlocks {
  int64_t block, first, count;  // tokens; the first block that has queries, and how many there are
  PrefixBlocks(int64_t block, int64_t queries, int64_t keys)
      : block(block),
        first((keys > queries ? keys - queries : 0) / block),
        count(queries > 0 && keys > 0 ? (keys + block - 1) / block - first : 0) {}
};
Status route_prefix(const Affinities& queries, const Affinities& keys, int64_t batches, int64_t heads, int64_t q_tokens,
                    int64_t kv_tokens, int64_t w, int64_t block, int32_t* q_lists, int32_t* kv_lists, int threads);

}  // namespace attnkit::cpu
