// What one call computes: tensors, sizes, sequences. Plain views; nothing here owns memory or knows torch or Python.
#pragma once
#include <cstdint>

#include "bytecode.h"

namespace attnkit::cpu {

enum class DType : uint8_t { f32, i32, i64, u8, bf16, f16, byte };  // u8: a bool tensor; byte: of codes

constexpr int32_t element_size(DType dtype) {
  return dtype == DType::i64                           ? 8
         : dtype == DType::u8 || dtype == DType::byte  ? 1
         : dtype == DType::bf16 || dtype == DType::f16 ? 2
                                                       : 4;
}

struct Buffer {
  const void* data;
  DType dtype;
  int32_t rank;
  int64_t size[kMaxArgs];
  int64_t stride[kMaxArgs];  // in elements
};

// [batch, head, token, channel]. Packed sequences share batch 0 and differ in their start.
struct View {
  char* data;
  int64_t stride[4];  // in elements
};

// Keys and values in pages: of batch entry b, token t is token t % size of page table[b, t / size]. The views' first
// dimension then counts pages, and those that the table names for tokens that exist are there.
struct Pages {
  static constexpr int32_t kLeast = 16;  // tokens; as many are adjacent wherever a tile of keys begins
  const int32_t* table = nullptr;        // null: there are none
  int64_t columns = 0;
  int32_t shift = 0;  // 2^shift tokens each
};

struct Sequence {
  int32_t batch;  // index into the tensors' batch dimension
  int64_t q_start, q_len, kv_start, kv_len;
  int64_t num_coded = 0;  // of stores that keep the newest tokens apart: the tokens before those, a multiple of kRun
};

// What makes a sequence some tokens of a batch entry, apart from all others: its q_len queries and kv_len keys are
// lists of them, ascending. Programs know the tokens by their own numbers.
struct Group {
  int32_t entry;            // the batch entry
  int32_t head, heads;      // the query heads that it is for
  const int32_t *queries, *keys;
  int64_t q_row,
      kv_row;  // where the rows of its queries and keys begin, in tensors that have one for each entry of a list
};

// The lists of all groups, [batches][heads][groups][most], -1 after a list's last; one batch or head stands for all.
struct Lists {
  const int32_t* tokens;
  int64_t batches, heads, groups, most;

  const int32_t* of(int64_t batch, int64_t head, int64_t group) const {
    return tokens + ((batch % batches * heads + head % heads) * groups + group) * most;
  }
  int64_t rows() const { return groups * most; }  // of a head
};

enum class Codec : uint8_t { plain, int8, fp8, int4, int2 };

// Keys or values as a cache keeps them. What belongs to one head of a batch entry (or page) is in one piece, of which
// store-inl.h has the layouts.
struct Store {
  Codec codec;
  bool is_keys;
  DType dtype;         // of plain elements
  int32_t channels;
  int32_t group;       // tokens (of keys) or channels (of values) that share a scale, of int4 and int2
  char* codes;         // or the elements themselves
  int64_t codes_stride[2];   // from one batch entry or page to the next, from head to head: in bytes
  uint16_t* scales;          // bfloat16
  int64_t scales_stride[2];  // likewise, in elements
  const float* head_scale;   // of fp8: one a head, or null where all are 1
  uint16_t* newest;          // token t at slot t % slots; null where all are codes
  int64_t newest_stride[2];  // likewise, in elements, of batch entries
  int32_t slots;
};

// Dropout of weights. Which pairs are kept: csrc/cpu/dropout-inl.h.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // of a pair's random word: below it the pair is dropped. 0: there is no dropout
  float factor;        // of the weights that are kept
};

// Queries and keys that are multiplied as int8, with a scale for every so many tokens of a sequence and head.
struct Encoding {
  int32_t q_tile = 0, kv_tile = 0;  // tokens; 0: they are multiplied as they are
  bool center = false;              // the mean key is taken from keys before, and given back to scores
};

// Such tokens, sequence by sequence, head by head. See encode.h.
struct Codes {
  int8_t* data;      // rows of `stride` bytes, zeros behind the last channel
  float* steps;      // what a code is worth: one a tile
  int32_t* starts;   // of keys: -128 times the sum of a row
  float* means;      // of centred keys: a row of `width` for each sequence and head, zeros behind the last channel
  int64_t* rows;     // of each sequence the first row,
  int64_t* tiles;    // and the first tile
  int64_t stride, width;
  int32_t heads, tile;

  int64_t row(int32_t sequence, int64_t length, int32_t head, int64_t token) const {
    return rows[sequence] + head * length + token;
  }
  float step(int32_t sequence, int64_t length, int32_t head, int64_t token) const {
    return steps[tiles[sequence] + head * ((length + tile - 1) / tile) + token / tile];
  }
};

struct Problem {
  View q, k, v, o;
  Pages pages;  // of k and v
  const Store* stores;  // of k and of v, or null: then the views are what is there
  DType dtype;  // of their elements: f32, bf16 or f16; every sum is float32
  float* lse;  // [batch, head, token] by lse_stride, or null
  int64_t lse_stride[3];
  int32_t num_heads, num_kv_heads, head_dim, v_head_dim;
  float scale;
  const float* sink;  // one logit per query head, or null
  const Sequence* sequences;
  int32_t num_sequences;
  const Buffer* buffers;
  int32_t num_buffers;
  const float* params;
  int32_t num_params;
  Dropout dropout{0, 0, 1};
  Encoding encoding{};
  const Codes* codes = nullptr;  // of q and of k, where they are encoded
  float skip = 0;  // above 0: 16 queries leave out a tile of keys whose logits lie so far below those before; in log2
  // Of each sequence, or null. Then channels are adjacent, and there are no pages, stores, sink or dropout.
  const Group* groups = nullptr;
  int64_t q_tokens = 0, kv_tokens = 0;  // of a batch entry of groups
  // Whether o and lse, of keys their gradients, are float32 with a row for each entry of a list.
  bool q_rows = false, kv_rows = false;

  // A sequence as programs know it.
  int32_t entry_of(int32_t i) const { return groups == nullptr ? i : groups[i].entry; }
  int64_t q_len_of(int32_t i) const { return groups == nullptr ? sequences[i].q_len : q_tokens; }
  int64_t kv_len_of(int32_t i) const { return groups == nullptr ? sequences[i].kv_len : kv_tokens; }
  int64_t query_of(int32_t i, int64_t n) const { return groups == nullptr ? n : groups[i].queries[n]; }
  int64_t key_of(int32_t i, int64_t n) const { return groups == nullptr ? n : groups[i].keys[n]; }

  int32_t first_head(int32_t i) const { return groups == nullptr ? 0 : groups[i].head; }
  int32_t heads_of(int32_t i) const { return groups == nullptr ? num_heads : groups[i].heads; }

  // Where what belongs to a query is read, where its results are, and where those of a key are.
  int64_t query_at(int32_t i, int64_t n) const { return sequences[i].q_start + query_of(i, n); }
  int64_t result_at(int32_t i, int64_t n) const { return q_rows ? groups[i].q_row + n : query_at(i, n); }
  int64_t key_result_at(int32_t i, int64_t n) const {
    return kv_rows ? groups[i].kv_row + n : sequences[i].kv_start + key_of(i, n);
  }
  DType o_dtype() const { return q_rows ? DType::f32 : dtype; }
  DType key_result_dtype() const { return kv_rows ? DType::f32 : dtype; }
};

// What the backward of a problem reads and writes besides.
struct Gradients {
  View d_o;  // the cotangent of o
  const float* d_lse;  // the cotangent of lse [batch, head, token] by d_lse_stride, or null: it is zero
  int64_t d_lse_stride[3];
  // Written: the rows of dq, dk and dv that belong to a sequence. Groups that share rows of dq add to what is there.
  View dq, dk, dv;
  float* d_sink;  // [num_heads], or null
  float* const* buffers;  // for each buffer its gradient, contiguous and zero before, or null
};

enum class Fault : int32_t {
  none = 0,
  int_range,  // an integer of the expression may leave 32 bits; value = instruction
  div_zero,  // an integer divisor may be zero; value = instruction
  index_range,  // a pair that exists reads outside a buffer; value = instruction
  no_memory,
  no_data,  // a tensor that has elements has no address; value = which (csrc/bind/module.cc)
  misaligned,  // an address is not a multiple of the element's size; value = which
  no_page,  // the page table names no page for a token that exists; value = sequence
};

struct Status {
  Fault fault = Fault::none;
  int32_t value = -1;
};

}  // namespace attnkit::cpu
