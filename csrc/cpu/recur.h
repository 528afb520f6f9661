// Linear recurrences: a state per head that every token decays, corrects, writes to and reads. The equation:
// python/attnkit/variants/linear.py.
#pragma once
#include "problem.h"

namespace attnkit::cpu {

enum class RowNorm : uint8_t { none, l2, layer };
enum class FeatureMap : uint8_t { identity, elu1 };

inline constexpr int kMaxChunk = 128;     // tokens
inline constexpr int kChannelChunk = 16;  // of a gate for each channel, or a bonus
// At most so many tokens are computed together. A gate for each channel takes its products token by token, so that a
// chunk of more would cost more than it saves; and up to 64 channels of keys, tokens beyond the 32nd cost more in pairs
// than a state that is read again. States of a polynomial are larger.
inline constexpr int32_t most_tokens(int32_t head_dim, bool by_channel, bool polynomial) {
  return by_channel ? kChannelChunk : head_dim <= 64 && !polynomial ? 32 : kMaxChunk;
}

// Numbers for tokens, float32: [batch, head, token, channel], strides in elements, 0 where all are alike.
struct Numbers {
  const float* at;  // null: there are none
  int64_t stride[4];
};

struct Stretch {
  int32_t batch;
  int64_t first, length;  // tokens
};

struct Recurrence {
  View q, k, v, o;
  DType dtype;  // of their elements; every sum is float32
  int32_t q_heads, k_heads, heads;  // those of the state are v's
  int32_t head_dim, v_head_dim;
  int64_t tokens;  // of a batch entry
  RowNorm row_norm;
  FeatureMap map;
  float scale;
  bool causal, normalize;
  float epsilon;
  Numbers gate, beta;  // decays' logarithms; how much of a correction is made
  bool channels;  // the gate has them
  const float* bonus;  // [heads, head_dim], contiguous, or null
  // [sequences, heads, head_dim, v_head_dim] and [sequences, heads, head_dim], contiguous; null: zero.
  const float *initial, *initial_norm;
  float *state, *norm;  // of the end: written
  const Stretch* sequences;
  int32_t num_sequences;
  int32_t chunk;  // tokens that are computed together, a multiple of 16, at most `most_tokens`
  // Of a polynomial of products, 1 or 2, with its coefficients; 0: the recurrence is linear. A polynomial's is
  // normalised, has no gate, beta or bonus, and its states a row for each of 1, x and (order 2) x (x) x.
  int32_t order;
  float coefficients[3];

  int64_t features() const {  // rows of a state
    const int64_t d = head_dim;
    return order == 0 ? d : 1 + d + (order == 2 ? d * d : 0);
  }
  int32_t outputs() const { return q_heads > heads ? q_heads : heads; }  // heads of o
  int32_t readers() const { return outputs() / heads; }  // of one state
};

// The cotangents of a recurrence, and where its gradients go: contiguous where a pointer has no strides. dq and dk have
// a head for each reader and for each state: who shares one among several adds them up.
struct RecurGradients {
  View d_o;  // as o
  const float *d_state, *d_norm;  // as state and norm; null: zero
  View dq, dk, dv;  // [batch, outputs, ..], [batch, heads, ..] twice
  DType dq_dtype, dk_dtype;  // float32 or that of q; dv has that of v
  float *d_gate, *d_beta;  // [batch, heads, token (, head_dim)]; null: not wanted
  float* d_bonus;  // [sequences, heads, head_dim], or null
  float *d_initial, *d_initial_norm;  // as initial and initial_norm, or null
};

// Of one state head of one sequence.
struct RecurKernel {
  size_t (*bytes)(const Recurrence&);
  void (*forward)(const Recurrence&, int32_t sequence, int32_t head, float* workspace);
  size_t (*backward_bytes)(const Recurrence&);
  void (*backward)(const Recurrence&, const RecurGradients&, int32_t sequence, int32_t head, float* workspace);
};

Status recur(const Recurrence& problem, int threads);
// Of the problem's results it reads o and the last states, where the call is normalised or not causal.
Status recur_backward(const Recurrence& problem, const RecurGradients& gradients, int threads);

}  // namespace attnkit::cpu
