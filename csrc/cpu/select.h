// Which columns (keys, or blocks of them) each row (a query, or a block of queries) keeps, by the scores of their
// means. The definition: docs/ir.md, select.
#pragma once
#include "problem.h"

namespace attnkit::cpu {

struct CodeView;

inline constexpr int kSelectRows = 16;  // rows, or columns, of a task

enum class Rule : uint8_t { count, mass, threshold };

struct Selection {
  View q, k;
  DType dtype;  // of their elements; every sum is float32
  int32_t batch, q_heads, k_heads, head_dim;
  int64_t q_len, kv_len;
  int32_t row_block, column_block;  // tokens that a row, a column is the mean of
  float scale;
  Rule rule;
  float value;     // so many columns; so much of a row's softmax; the score that is not enough
  bool at_least_one;
  bool of_group;   // the query heads that share keys choose together, by the mean of their softmax
  bool centered;   // the mean of all keys is taken from each
  bool
      coherent;  // rows and columns of which the mean cosine of all pairs of tokens is not above `least` are kept whole
  float least;
  const Problem* pairs;  // rows are its queries and columns its keys: what expressions read
  const CodeView *mask, *force;  // of candidates, of what is kept in any case; or null
  uint8_t* chosen;  // [batch, choosers(), columns(), rows()]: the queries of a tile of attention are adjacent
  // Set by `select`.
  float* means;  // of columns: [batch, k_heads, head_dim, stride]
  int32_t* is_coherent;  // [batch, k_heads, stride], a mask
  float* center;  // [batch, k_heads, head_dim]
  int64_t stride;  // columns, rounded up to whole vectors, two at a time

  int64_t rows() const { return (q_len + row_block - 1) / row_block; }
  int64_t columns() const { return (kv_len + column_block - 1) / column_block; }
  int32_t choosers() const { return of_group ? k_heads : q_heads; }
};

struct SelectKernel {
  size_t (*bytes)(const Selection&);
  // Of one head of keys: the mean of all, and those of some columns, at most kSelectRows.
  void (*center)(const Selection&, int32_t b, int32_t head, float* workspace);
  void (*columns)(const Selection&, int32_t b, int32_t head, int64_t first, int32_t count, float* workspace);
  // What some rows of one chooser keep, at most kSelectRows. Returns the instruction of an out-of-range load, or -1.
  int32_t (*rows)(const Selection&, int32_t b, int32_t head, int64_t first, int32_t count, float* workspace);
};

struct Program;

// The expressions have been compiled with a mask alone; null: there is none. `selection.mask` and `force` are set here.
Status select(Selection selection, const Program* mask, const Program* force, int threads);

}  // namespace attnkit::cpu
