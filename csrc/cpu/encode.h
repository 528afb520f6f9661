// Queries and keys as int8, before a call begins: once for all of its tasks.
//
// The tokens of a sequence and head are cut into tiles. A tile's codes are worth step = max |x| / 127 + 1e-7, rounded
// to float32, and are x / step, halves away from 0. x is a token without the mean, if it is centred. A tile that holds
// what is no number has a step that is none, and scores that are none follow.
#pragma once
#include <vector>

#include "problem.h"

namespace attnkit::cpu {

struct Kernel;

// One head of one sequence. Where its results go, see Codes.
struct EncodeTask {
  const View* x;
  DType dtype;
  int32_t batch, head, channels, tile;
  int64_t first, count;  // tokens
  int8_t* codes;
  int64_t stride;
  float* steps;
  int32_t* starts;  // or null
  float* mean;      // or null
};

inline constexpr int32_t kEncodeRows = 16;  // tokens that are widened at once

// Two rows of doubles or means, and the tokens.
constexpr size_t encode_floats(int32_t channels) {
  return static_cast<size_t>((kEncodeRows + 4) * ((channels + 15) / 16 * 16));
}

class Encoded {
 public:
  // Encodes the queries and keys of a problem, which from then on has the codes. False where memory is not enough.
  bool encode(Problem& problem, const Kernel& kernel, int threads);

  // Puts queries and keys into the problem that are what the codes mean, in its own dtype.
  void decode(Problem& problem);

 private:
  struct Side {
    std::vector<int64_t> rows, tiles;  // of each sequence the first
  };
  Side sides_[2];
  Codes codes_[2];
  std::vector<char> decoded_[2];
};

}  // namespace attnkit::cpu
