// Where a cache keeps a token: the layouts of codes and scales, for those that write them and those that read.
//
// Codes come in words of 32 bits. Of keys a word holds adjacent channels of one token, and the words of kRun tokens lie
// side by side, [channels / per word][kRun]; of values it holds adjacent tokens of one channel, [tokens / per word]
// [channels]. A vector of words then is a vector of tokens (of channels), and no product needs a sum across its lanes.
// Within a word, a shift and a mask leave what a dot product takes: of keys four bytes, adjacent channels; so of int8
// values, adjacent tokens; of int4 and int2 values two adjacent tokens, one in each half.
//
// Scales are bfloat16: of int8 one a token; of int4 and int2 keys, for each group of tokens, [2][channels], scales and
// then zeros; of their values, for each kScaleRun tokens, [groups of channels][2][kScaleRun]. fp8 and plain elements
// lie token by token.

inline constexpr int32_t kRun = Pages::kLeast, kScaleRun = 32;

inline int32_t bits_of(Codec codec) { return codec == Codec::int4 ? 4 : codec == Codec::int2 ? 2 : 8; }
inline bool has_zeros(Codec codec) { return codec == Codec::int4 || codec == Codec::int2; }
inline bool is_words(Codec codec) { return has_zeros(codec) || codec == Codec::int8; }

// The first bit of element e of a word.
constexpr int32_t field_of(bool is_keys, int32_t bits, int32_t e) {
  return is_keys || bits == 8 ? bits * (e / 4) + e % 4 * 8 : bits * (e / 2) + e % 2 * 16;
}

constexpr int32_t round_up_to(int32_t n, int32_t step) { return (n + step - 1) / step * step; }

// Channels that there is room for.
inline int32_t stored_channels(const Store& s) {
  if (!is_words(s.codec)) return s.channels;
  return round_up_to(s.channels, s.is_keys ? 32 / bits_of(s.codec) : 16);
}
inline int32_t groups_of_channels(const Store& s) { return (s.channels + s.group - 1) / s.group; }

// Of codes and of scales: how much a run of tokens takes.
inline int64_t run_bytes(const Store& s) {
  return int64_t{kRun} * stored_channels(s) * (s.codec == Codec::plain ? element_size(s.dtype) * 8 : bits_of(s.codec)) /
         8;
}
inline int64_t scales_of_run(const Store& s, int32_t* tokens) {
  *tokens = s.codec == Codec::int8 ? 1 : s.is_keys ? s.group : kScaleRun;
  return s.codec == Codec::int8 ? 1
         : s.is_keys            ? 2 * stored_channels(s)
                                : int64_t{2} * kScaleRun * groups_of_channels(s);
}

// A token's batch entry or page, and its number there.
struct Place {
  int64_t outer, token;
};
inline Place place_of(const Pages& pages, int32_t batch, int64_t token) {
  if (pages.table == nullptr) return {batch, token};
  const int64_t page_size = int64_t{1} << pages.shift;
  return {pages.table[batch * pages.columns + (token >> pages.shift)], token & (page_size - 1)};
}

// The codes of the run that a token is in.
inline char* codes_at(const Store& s, Place p, int32_t head) {
  return s.codes + p.outer * s.codes_stride[0] + head * s.codes_stride[1] + p.token / kRun * run_bytes(s);
}
// The scales of the stretch of tokens that it shares some with (int8: its own).
inline uint16_t* scales_at(const Store& s, Place p, int32_t head) {
  int32_t tokens = 1;
  const int64_t size = scales_of_run(s, &tokens);
  return s.scales + p.outer * s.scales_stride[0] + head * s.scales_stride[1] + p.token / tokens * size;
}
inline uint16_t* newest_at(const Store& s, int64_t batch, int32_t head, int64_t token) {
  return s.newest + batch * s.newest_stride[0] + head * s.newest_stride[1] + token % s.slots * s.channels;
}
