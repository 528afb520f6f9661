// Tokens become codes at the end of each row of a cache.
#pragma once
#include "problem.h"

namespace attnkit::cpu {

// What goes to one row: `count` tokens behind the `length` that there are. Those before num_coded are codes, where the
// newest are kept apart; and before num_coded_after they will be.
struct Appended {
  int64_t length, count, num_coded, num_coded_after;
};

// `tokens`: [batch, head, token, channel] of `dtype`. Everything fits, and every token has its page: the caller has
// checked. Throws std::bad_alloc.
void append(const Store& store, const Pages& pages, const Appended* rows, int64_t batch, int64_t heads,
            const View& tokens, DType dtype, int threads);

}  // namespace attnkit::cpu
