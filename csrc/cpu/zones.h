// Zone maps: least and greatest elements of stretches of captured tensors, so that a load's range on a box costs
// O(log n). They live as long as one call: a tensor's contents may be others in the next.
#pragma once
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "interval.h"
#include "linear.h"
#include "problem.h"

namespace attnkit::cpu {

// A line of elements, each of them a range where lo and hi are not the same memory.
struct Line {
  DType dtype;
  const void *lo, *hi;
  int64_t stride, count;
};

// Ranges over stretches of a line: a pyramid, each level 1/8 of the one below.
class ZoneMap {
 public:
  explicit ZoneMap(const Line& line);
  Interval range(int64_t first, int64_t last) const;

 private:
  Line line_;
  std::vector<std::vector<Interval>> levels_;
};

// An inclusive range of indices in each dimension of a buffer.
struct IndexBox {
  int64_t lo[kMaxArgs], hi[kMaxArgs];
};

class Zones {
 public:
  // `shared` was built before, for the same call, and is only read.
  Zones(const Program& program, const Problem& problem, const Zones* shared = nullptr);

  // What load instruction `number` can read inside a box that lies in its buffer. While proving, floats and bools are
  // not looked at: no proof needs them.
  Interval load(size_t number, const IndexBox& box, bool proving);

 private:
  struct Band;  // a stretch of rows of a buffer of pairs, each column reduced to its range
  struct Last {
    int64_t base;
    const ZoneMap* map = nullptr;
  };
  const ZoneMap& line(size_t number, int64_t base);
  Interval band(size_t number, const IndexBox& box);

  const Program& program_;
  const Problem& problem_;
  const Zones* shared_;
  std::map<std::tuple<int32_t, int, int64_t>, ZoneMap> lines_;
  std::vector<Last> last_;                         // of each load, the line it read last
  std::map<size_t, std::pair<std::shared_ptr<Band>, std::shared_ptr<Band>>> bands_;  // of each load: a row's, a part's
};

}  // namespace attnkit::cpu
