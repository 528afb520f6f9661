// Read-outs: what people ask of the weights of attention, exp(score - lse), without wanting all of them. `lse` is
// given: it may be of more keys than these.
#pragma once
#include <cstdint>

#include "problem.h"

namespace attnkit::cpu {

// Each is null or contiguous, and before it holds what rows and columns without a pair have: 0, of keys -1.
struct Readout {
  int64_t queries, keys;  // of a batch entry
  float *column_sum, *column_max;  // [batch, head, key]: of the weights of a key
  float *row_max, *entropy;  // [batch, head, query]: of those of a query; -sum w log w
  // The largest weights of a query, of equal ones the first, and their keys: [batch, head, query, top_k].
  float* best;
  int64_t* best_keys;
  int32_t top_k;
  // [batch, head, row, key]: the weights of some queries, numbered as in the tensor, ascending.
  float* weights;
  const int32_t* rows;
  int64_t num_rows;
};

struct Config;
struct Program;

// The config's tile_q and split_kv say nothing.
Status readout(const Program& program, const Problem& problem, const Readout& out, const Config& config);

}  // namespace attnkit::cpu
