// How a program is evaluated on boxes, worked out once per program. Sums of integers are collected into linear forms
// (factor * value + ... + constant), so that a variable that occurs twice counts once, and a comparison looks at the
// form of the difference of its sides: exact on every box.
#pragma once
#include <cstdint>
#include <vector>

namespace attnkit::cpu {

struct Instruction;

// What a range can depend on.
enum Reads : uint8_t { kReadsQuery = 1, kReadsKey = 2, kReadsBatch = 4, kReadsHead = 8 };
inline constexpr uint8_t kReadsPair = kReadsQuery | kReadsKey;

struct Term {
  int32_t value;
  double factor;
};

struct BoxStep {
  bool linear = false;  // a sum, or a comparison of integers with 0 of the difference of its sides
  uint8_t reads = 0;
  int32_t first = 0, count = 0;  // into BoxPlan::terms
  double constant = 0;
  bool unit = true;    // every factor of it is 1 or -1
  int8_t line = 0;     // of a load: the dimension along which it is summarised,
  bool plane = false;  // whether another one varies with the query or the key,
  bool wild = false;   // and whether with the key
};

struct BoxPlan {
  std::vector<BoxStep> steps;     // one per instruction
  std::vector<Term> terms;
  std::vector<int32_t> order[4];  // what the mask needs, by what of the pair it reads (kReadsPair)
  uint8_t mask_reads = 0;
  bool dense = false;  // the mask reads a map of pairs: it is analysed row by row
};

BoxPlan plan_boxes(const std::vector<Instruction>& code, int mask);

}  // namespace attnkit::cpu
