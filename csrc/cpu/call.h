// One call as the kernels see it: the verified program, the problem, what was proven, and the tile sizes. Shared by the
// scheduler and by every instruction set.
#pragma once
#include <cstddef>

#include "bytecode.h"
#include "encode.h"
#include "groups.h"
#include "problem.h"
#include "readout.h"
#include "recur.h"
#include "select.h"

namespace attnkit::cpu {

inline constexpr int kMaxTileQ = 128;  // lanes: a row of blocks of the usual size
inline constexpr int kMaxTileKv = 192;
inline constexpr int kStrip = 16;  // keys a tile instruction handles at once: its operands stay in L1

// A view of the program without std types, for the files compiled per instruction set.
struct CodeView {
  const Instruction* code;
  const int32_t* order[4];
  int32_t order_size[4];
  int32_t slots[4];
  int32_t score, mask, slope, slope_f;
  int32_t in_place;  // see Program
  const LoadSlope* loads;
  int32_t num_loads;
  const uint8_t* load_in_bounds;
  bool all_loads_in_bounds;
  bool carries, unnormalized;  // see Program
};

struct Call {
  CodeView code;
  const Problem* problem;
  int32_t tile_q, tile_kv;
  bool has_score, has_mask;
  int32_t split_kv = 0;  // keys of a stretch, a multiple of tile_kv: each is summed by itself, and then they are merged
  bool subtracts = false;  // the score is s - f, and no more
  bool some_gone = false;  // keys onto which infinity was carried are gone: what they hold may not be read
  int32_t gathered = 0;  // queries of a task whose pieces are gathered, at most
  int64_t number = 0;  // no other call has it: what a thread keeps of one does not belong to the next
  int64_t kept = 0;  // floats in front of a thread's workspace, for what it keeps (kept-inl.h)
};

// A thread keeps keys and values by so many, and of each such chunk a byte of what is known of it.
inline constexpr int32_t kKeptKeys = 32;
inline constexpr int64_t kKeptOwner = 16;  // floats that say whose they are
constexpr int64_t kept_head(int64_t chunks) { return kKeptOwner + (chunks + 63) / 64 * 16; }

// What was carried onto each key, as each query of a block finds it: a row of `ld` for each key, a lane a query, or
// (a few queries) the other way round.
inline constexpr int32_t kMostByQuery = 16;
struct Carried {
  float* f = nullptr;  // of the block's first query, and of key `first`
  int64_t ld = 0;
  bool by_key = false;
  int64_t first = 0;
  int32_t tile_kv = 0;
  // Of each tile of keys what the block finds on every key at least; and, [kv head][tile], the largest norm of a key: 0
  // where nobody has looked, infinity where keys or values are not all finite.
  float *least = nullptr, *norms = nullptr;
};

// The same queries of one or a few heads. They are the lanes of its tiles: head by head, at most kMaxTileQ.
struct Task {
  int32_t sequence, head, heads;
  int64_t q_first;
  int32_t q_count;
  int64_t kv_first = 0, kv_end = INT64_MAX;  // the keys it takes, whole stretches; more than there are means all
  Carried carried = {};
  const int32_t* listed = nullptr;  // its queries, ascending, where they do not lie side by side

  int32_t lanes() const { return heads * q_count; }
  int64_t query(int32_t i) const { return listed == nullptr ? q_first + i : listed[i]; }
  int64_t last_query() const { return query(q_count - 1); }
  Task part(int32_t first, int32_t count) const {
    Task t = *this;
    t.q_first += first;
    t.q_count = count;
    if (listed != nullptr) t.listed += first;
    return t;
  }
};

// Stretches of keys that a row of tiles must visit, in order. Filled by the scheduler's block analysis.
struct KeyRange {
  int64_t first;
  int32_t count;
  bool full;
};

// Some queries of a task that is gathered, and keys that they see.
struct Piece {
  Task queries;  // listed
  const KeyRange* ranges;
  size_t num_ranges;  // all in one stretch
};

// How such a task gets at its pieces: those of a stretch of keys together, and for each query in the order of keys.
struct Pieces {
  void* state;
  bool (*next)(void* state, Piece* piece);
};

// Where the tasks that share the keys of some lanes leave what they summed: for each stretch a row of `part_floats`
// floats, and whether it is there, for a stretch that no lane sees is not visited.
struct Parts {
  float* at;
  uint8_t* there;
  int64_t count;
};

inline int64_t padded_channels(const Problem& p) { return (p.v_head_dim + 15) / 16 * 16; }

// o not yet divided, a row for each lane; then their maxima; then the sums of their weights.
inline int64_t part_floats(const Problem& p, int32_t lanes) { return lanes * (padded_channels(p) + 2); }
// The backward goes through the pairs by blocks of keys: a task is one block of one kv head, and the blocks of queries
// of its heads that see it, in order.
struct BackwardCall {
  CodeView code;
  const Problem* problem;
  const Gradients* gradients;
  int32_t tile_q, tile_kv;
  bool has_score;  // or derivatives: a program has to run in full tiles too
  bool gathers = false;  // queries of tiles are listed
};

// What one program load adds to: the gradient of its buffer, or a thread's own part of it.
struct LoadTarget {
  float* data;
  int64_t stride[kMaxArgs];
  int64_t first, end;  // of the elements that were touched
};

struct BackwardTask {
  int32_t sequence, kv_head;
  int64_t first;  // key
  int32_t count;
  LoadTarget* targets;  // one for each of the program's loads
};

// What is known of a block of queries of one head before the tasks begin.
struct RowBlock {
  float* lse;  // tile_q of them; +inf in a row that has no weights
  float* delta;  // sum_c do[c] o[c] - dlse
  bool dead;  // some row has no weights
  bool finite;  // all elements of q and do are
};

struct BackwardTile {
  Task queries;  // of one head
  RowBlock rows;
  int64_t first;  // key
  int32_t count;
  bool full;
  int64_t block;  // the scheduler's number of the block of queries,
  int32_t turn;  // and how many tiles come before this one in its row
};

// How a task gets at its tiles.
struct Tiles {
  void* state;
  bool (*next)(void* state, BackwardTile* tile);
  // Returns when what the program's loads add may be added,
  void (*order)(void* state, const BackwardTile& tile);
  // and when the tiles before this one have been added to the gradient of its queries.
  void (*wait)(void* state, const BackwardTile& tile);
  void (*done)(void* state, const BackwardTile& tile);
};

// The same of attention that carries: a task is a block of keys of all heads, and the blocks of queries that see it.
struct CarriedBackwardCall {
  BackwardCall pairs;
  CodeView selecting;  // the program whose score is carried, of head `head`
  int32_t head;
  bool subtracts;  // the score is s - f, and no more; else it is that of something else, less f
  bool mask_by_head;
  int64_t most_blocks;  // of queries, in a sequence
  int64_t keys;  // in a row, for each batch entry, of what follows
  const float *initial, *d_carry;  // what was carried before; the cotangent of what is carried after; or null
  const int32_t* gone;  // see CarryKernel::accumulate
  float* d_initial;  // or null
};

// How its task gets at the blocks of queries: any of them, of any head.
struct CarriedTiles {
  Tiles tiles;  // of which `next` says nothing
  void* state;
  int32_t blocks;
  bool (*at)(void* state, int32_t block, int32_t head, BackwardTile* tile);  // false: none of them sees a key
};

// What an instruction set has for attention that carries.
struct CarryKernel {
  // The score of a task's queries, of one head, and of whole tiles of keys goes where its `carried` says, -infinity for
  // pairs that do not exist; and then (`sums`) `accumulate` follows, tile by tile.
  int32_t (*select)(const Call&, const Task&, const KeyRange*, size_t num_ranges, float* sums, float* workspace);
  // What queries add to a key becomes what each of them finds there: the sum before it. `sums`, of each key, is what
  // was carried before, and then after; a key is gone from query `gone` on, if not null.
  void (*accumulate)(const Task&, int64_t first, int64_t count, float* sums, const int32_t* gone);
  size_t (*backward_bytes)(const CarriedBackwardCall&);
  int32_t (*backward)(const CarriedBackwardCall&, const BackwardTask&, const CarriedTiles&, float* workspace);
};

// What it has for read-outs. `run` brings what is asked for up to the pairs of a task, whole tiles of keys; returns as
// Kernel::run does.
struct ReadoutKernel {
  size_t (*bytes)(const Call&);
  int32_t (*run)(const Call&, const Task&, const KeyRange*, size_t num_ranges, const Readout&, float* workspace);
};

// What one instruction set provides.
struct Kernel {
  const char* name;
  size_t (*workspace_bytes)(const Call&);
  // Runs one task over the given key ranges, to the end or (`parts`) as far as its stretches go. Returns the
  // instruction of an out-of-range load, or -1.
  int32_t (*run)(const Call&, const Task&, const KeyRange*, size_t num_ranges, const Parts* parts, float* workspace);
  // Runs one task piece by piece: at most `gathered` queries of one head.
  int32_t (*gather)(const Call&, const Task&, const Pieces&, float* workspace);
  // Brings the stretches that several tasks left to the end: `task` is any of them.
  void (*merge)(const Call&, const Task& task, const Parts&, float* workspace);
  // Tokens as int8: a workspace of encode_floats floats.
  void (*encode)(const EncodeTask&, float* workspace);
  size_t (*backward_bytes)(const BackwardCall&);
  void (*backward_rows)(const BackwardCall&, const Task&, RowBlock&);
  // As `run`. The task's rows of dk and dv are written, also where it has no tiles.
  int32_t (*backward)(const BackwardCall&, const BackwardTask&, const Tiles&, float* workspace);
  // dst[i] = op(a[i], b[i] ...) over n lanes, n a multiple of 16: the expression routines by themselves, for tests.
  // Of an argument that is `same` there is one element, for all lanes.
  void (*evaluate)(Op, float* dst, const float* const* args, const bool* same, int32_t n);
  // Fused multiply-adds on registers alone; returns the floating-point operations done. The compute ceiling.
  double (*fma_burst)(int64_t rounds);
  // Reads n floats once; the memory ceiling. The sum keeps the reads alive.
  float (*read_burst)(const float* p, int64_t n);
  RecurKernel recur;
  GroupKernel groups;
  SelectKernel select;
  CarryKernel carry;
  ReadoutKernel readout;
  // The same as fma_burst with bfloat16 dot products; null where the instruction set has none.
  double (*dot_burst)(int64_t rounds) = nullptr;
};

extern const Kernel kScalarKernel;
#ifdef ATTNKIT_HAS_AVX2
extern const Kernel kAvx2Kernel;
#endif
#ifdef ATTNKIT_HAS_AVX512
extern const Kernel kAvx512Kernel;
#endif
#ifdef ATTNKIT_HAS_AVX512BF16
Kernel with_dot_products(const Kernel& avx512);
const Kernel& dot_products();  // to be called where the machine has them
#endif
#ifdef ATTNKIT_HAS_AVX512AMX
Kernel with_tile_registers(const Kernel& dots);
const Kernel& tile_registers();
#endif

}  // namespace attnkit::cpu
