"""What the templates of all kernels share: loads and stores of tiles, the tile that a program owns, the tiles it visits."""

from __future__ import annotations

# What every kernel calls.
TILES = '''
@triton.jit
def load_tile(x, rows, row_stride, channel_stride, live, WIDTH: tl.constexpr, PADDED: tl.constexpr, CUT: tl.constexpr):
    """Rows of WIDTH channels; zeros in the rest of PADDED and, if CUT, where `live` is false."""
    channels = tl.arange(0, PADDED)
    at = x + rows[:, None] * row_stride + channels[None, :] * channel_stride
    if CUT:
        if WIDTH == PADDED:
            tile = tl.load(at, mask=live[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=live[:, None] & (channels < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == PADDED:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(channels < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(x, rows, row_stride, channel_stride, live, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Stores the rows where `live` is true, WIDTH channels of them."""
    channels = tl.arange(0, PADDED)
    at = x + rows[:, None] * row_stride + channels[None, :] * channel_stride
    tl.store(at, tile.to(x.dtype.element_ty), mask=live[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def add_product(total, weights, exists, values, PRECISION: tl.constexpr, CAREFUL: tl.constexpr):
    """total + weights . values. If CAREFUL, infinities and NaN in a row of values reach only those that see it."""
    if CAREFUL:
        finite = tl.where(tl.abs(values) < float("inf"), values, 0.0).to(values.dtype)
        total = tl.dot(weights, finite, total, input_precision=PRECISION)
        ROWS: tl.constexpr = values.shape[0]
        rows = tl.arange(0, ROWS)
        others = tl.where(tl.abs(values) < float("inf"), 0.0, values.to(tl.float32))
        for j in tl.range(0, ROWS, num_stages=1):
            here = (rows == j)[None, :]
            seen = tl.max((exists & here).to(tl.int32), 1) > 0
            row = tl.sum(tl.where((rows == j)[:, None], others, 0.0), 0)
            if tl.max((row != 0.0).to(tl.int32), 0) > 0:
                weight = tl.sum(tl.where(here, weights.to(tl.float32), 0.0), 1)
                total += tl.where(seen[:, None] & (row != 0.0)[None, :], weight[:, None] * row[None, :], 0.0)
    else:
        total = tl.dot(weights, values, total, input_precision=PRECISION)
    return total


@triton.jit
def has_nan(tile):
    """Whether any element is not a number: something that is none met a weight, be it that of a pair that does not exist."""
    return tl.max((tile != tile).to(tl.int32)) > 0
'''

# Where the tile is that a program owns, of queries ({own} is q) or keys (kv), and of which sequence. `row` numbers the tiles of
# all sequences.
OWNER = """
    row = tl.program_id(0)
    #if packed
    low = row * 0
    high = low + sequences
    while low + 1 < high:  # tiles of sequence n start at row cu[n]{times} // {OWN} + n
        middle = (low + high) // 2
        here = tl.load(cu_{own} + middle){times} // {OWN} + middle <= row
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    b = low
    entry = b * 0
    q_start = tl.load(cu_q + b)
    kv_start = tl.load(cu_kv + b)
    q_len = tl.load(cu_q + b + 1) - q_start
    kv_len = tl.load(cu_kv + b + 1) - kv_start
    tile_of = row - {own}_start{times} // {OWN} - b
    #else
    b = row // {own}_tiles
    entry = b
    #if last_first
    tile_of = {own}_tiles - 1 - row % {own}_tiles  # a causal mask gives the last ones most to do
    #else
    tile_of = row % {own}_tiles
    #end
    q_start, kv_start = b * 0, b * 0
    #if lengths
    kv_len = tl.load(lengths + b)
    #end
    #end
    #if ragged
    if tile_of * {OWN} >= {own}_len{times}:
        return
    #end
    #if mend
    ROWS: tl.constexpr = {MENDED}  # of the tile, a program each: their registers hold no more
    {own}_rows = tile_of * {OWN} + tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    #else
    ROWS: tl.constexpr = {OWN}
    {own}_rows = tile_of * {OWN} + tl.arange(0, ROWS)
    #end
"""

# Which tiles of the other index: `full` ones, and those in which not every pair exists.
VISITS = """
    #if lists
    #if packed
    list_row = row + {head} * list_sh
    #else
    list_row = b * list_sb + {head} * list_sh + tile_of
    #end
    tiles = lists + list_row.to(tl.int64) * list_length
    partial = tl.load(counts + 2 * list_row)
    full = tl.load(counts + 2 * list_row + 1)
    #else
    lower = ({own}_idx * 0).to(tl.int32)
    upper = lower + {other}_len
    $bounds
    begin, end = tl.min(lower), tl.max(upper)  # some row sees something between these,
    #if unknown
    whole_begin, whole_end = begin, begin
    #else
    whole_begin, whole_end = tl.max(lower), tl.min(upper)  # all see everything between those
    #end
    #if newest
    whole_end = tl.minimum(whole_end, coded)  # behind which no tile is codes alone
    #end
    #if split
    begin, end = tl.maximum(begin, tl.program_id(2) * SPLIT_KV), tl.minimum(end, (tl.program_id(2) + 1) * SPLIT_KV)
    #end
    first = begin // {OTHER}
    last = tl.maximum(first, (end + {OTHER} - 1) // {OTHER})
    whole_first = tl.minimum(tl.maximum((whole_begin + {OTHER} - 1) // {OTHER}, first), last)
    whole_last = tl.minimum(tl.maximum(whole_end // {OTHER}, whole_first), last)
    full = whole_last - whole_first
    partial = last - first - full
    #end
"""

# Rows of a tile that a program makes again.
MENDED = 16

# The names by which a kernel owns tiles of queries, or of keys.
QUERIES = {"own": "q", "OWN": "TILE_Q", "other": "kv", "OTHER": "TILE_KV", "MENDED": str(MENDED)}
KEYS = {"own": "kv", "OWN": "TILE_KV", "other": "q", "OTHER": "TILE_Q", "MENDED": str(MENDED)}

# In the loop of a fold: the tile to visit, and the indices of its columns. Rows are what a program owns.
TILE = """
        #if lists
        tile = tl.load(tiles + (i // PARTS) * step)
        #else
        tile = first + i // PARTS
        if PARTIAL:
            tile += tl.where(i // PARTS < before, 0, between)
        #end
        start = tile * ({OTHER} * PARTS) + i % PARTS * {OTHER}
        present = start + lanes < {other}_len
"""

# The logits of a tile from its products `s`; if raw, the products stand for them: to be multiplied when they are weighed.
LOGITS = """
        #if indices
        {other}_idx = (start + lanes).to({int})[None, :]
        #end
        #if score
        s *= {scale}
        if PARTIAL:
            live = present[None, :]
        else:
            live = None
        $score
        logit = {score_name}
        #else
        #if raw
        logit = s
        #else
        logit = s * {scale}
        #end
        #end
        exists = None
        if PARTIAL:
            live = present[None, :]
            $mask
            exists = tl.broadcast_to({exists}, [{OWN}, {OTHER}])
            $poison
            logit = tl.where(exists, logit, float("-inf"))
"""


def padded(width: int) -> int:
    """Channels of a tile: a power of two, and enough for a matrix product."""
    return max(16, 1 << (width - 1).bit_length())
