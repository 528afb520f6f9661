// The forward kernel of queries that are gathered (gather.h): piece by piece, a block of keys and some of the queries
// that chose it. Between its blocks what a query has summed lies in the thread's memory.

// A row for each query of the task.
struct GatheredRows {
  Places places;
  int32_t rows, dv;
  size_t o[2], max[2], sum[2];  // of the stretch, and of those before it

  explicit GatheredRows(const Call& c)
      : places(Layout(c, kMaxTileQ, false).places), rows(c.gathered), dv(round_up(c.problem->v_head_dim, kLanes)) {
    for (int i : {0, 1}) {
      o[i] = places.take(rows, dv);
      max[i] = places.take(1, rows);
      sum[i] = places.take(1, rows);
    }
  }
  Fold fold(float* workspace, int i) const { return {workspace + o[i], workspace + max[i], workspace + sum[i], dv}; }
};

// Products are those of many queries however few a piece has, for that depends on the other queries of the task.
template <class Products>
int32_t gather(const Call& c, const Task& t, const Pieces& pieces, float* workspace) {
  const GatheredRows at(c);
  const Fold now = at.fold(workspace, 0), before = at.fold(workspace, 1);
  start_fold(now, t.q_count);
  start_fold(before, t.q_count);
  int32_t bad = -1;
  int64_t stretch = -1;
  for (Piece piece; pieces.next(pieces.state, &piece);) {
    if (piece.ranges->first / c.split_kv != stretch) {
      if (stretch >= 0) {
        merge(before, before, now, t.q_count, at.dv);
        start_fold(now, t.q_count);
      }
      stretch = piece.ranges->first / c.split_kv;
    }
    Products forward(c, piece.queries, workspace, false);
    forward.pack_queries();
    forward.take_listed(now, t.q_first);
    forward.prepare(true);
    for (size_t i = 0; i < piece.num_ranges; ++i)
      for (int64_t first = piece.ranges[i].first, end = first + piece.ranges[i].count; first < end;) {
        const bool full = piece.ranges[i].full;
        const int64_t reach = forward.reach(first, full), stop = reach < end ? reach : end;
        forward.keys(first, static_cast<int32_t>(stop - first), full, -1);
        first = stop;
      }
    forward.save_listed(now, t.q_first);
    if (forward.bad_load() >= 0) bad = forward.bad_load();
  }
  merge(now, before, now, t.q_count, at.dv);
  for (int32_t m = 0; m < t.q_count; m += kMaxTileQ) {
    const Task some = t.part(m, t.q_count - m < kMaxTileQ ? t.q_count - m : kMaxTileQ);
    Products forward(c, some, workspace, false);
    forward.take(now.at(m));
    forward.finish();
  }
  return bad;
}

size_t workspace_bytes(const Call& c) {
  const size_t many = c.gathered > 0 ? GatheredRows(c).places.next : Layout(c, kMaxTileQ, false).places.next,
               few = Layout(c, kFewLanes, true).places.next;
  return (many > few ? many : few) * sizeof(float);
}
