// Causal attention over the paged cache. Included once per instruction set, inside its namespace.
//
// Keys are visited in chunks of kChunk positions counted from the beginning of the sequence. Each chunk has a softmax of its
// own, and these are joined in order (Milakov & Gimelshein 2018), by the thread that computes them or by another one where
// few queries are shared among threads (Dao et al. 2023, "Flash-Decoding"). Borders and order depend on positions only, so a
// query gets the same bits in a prefill, a decode step or a verification of drafts.

constexpr int kChunk = 128;
constexpr int kChunkTiles = kChunk / 16;
// Query heads x queries that share one pass over the keys, which takes longer where these are widened first.
constexpr int kMaxQueryRows = 64;
constexpr int most_rows(int cache_form) { return cache_form == SLIP_CACHE_PLAIN ? 32 : kMaxQueryRows; }

inline int segment_of(const SlipBatch& b, int token) {
  int low = 0, high = b.num_segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (b.q_start[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

inline int position_of(const SlipBatch& b, int segment, int token) {
  return b.kv_len[segment] - (b.q_start[segment + 1] - token);
}

#include "attention_work.h"

// One query tile: rows are (query, head of the group), all against the same KV head.
template <class D>
struct QueryTile {
  alignas(64) typename D::row q[kMaxQueryRows * kMaxHeadDim];
  alignas(64) float scores[kMaxQueryRows * kChunk];
  alignas(64) typename D::row probs[kMaxQueryRows * kChunk];
  alignas(64) float scales[kChunk];  // of keys, then of values, that are kept in 8 bits
  int position[kMaxQueryRows];
  // Of the chunks so far: values times their weights, the weights' sums, and the largest scores, to which weights relate.
  alignas(64) float acc[kMaxQueryRows * kMaxHeadDim];
  vec sum[kMaxQueryRows];
  float top[kMaxQueryRows];
  // What the next chunk makes of `acc`: kept * acc + added * its own.
  float kept[kMaxQueryRows], added[kMaxQueryRows];

  void clear(int rows, int head_dim) {
    for (int row = 0; row < rows; ++row) top[row] = -INFINITY, sum[row] = vzero();
    for (int i = 0; i < rows * head_dim; i += 16) vstore(acc + i, vzero());
  }
  // Joins a chunk's sum, and says how its values are to be joined.
  void join(int row, float chunk_top, vec chunk_sum) {
    const float largest = chunk_top > top[row] ? chunk_top : top[row];
    const auto share = [largest](float of) {
      if (of == largest) return 1.0f;
      float lanes[16];
      vstore(lanes, vexp(vset1(of - largest)));
      return lanes[0];
    };
    kept[row] = share(top[row]), added[row] = share(chunk_top);
    sum[row] = vfma(chunk_sum, vset1(added[row]), vmul(sum[row], vset1(kept[row])));
    top[row] = largest;
  }
  vec joined(int row, vec before, vec chunk) const { return vfma(chunk, vset1(added[row]), vmul(before, vset1(kept[row]))); }
};

// Tiles that are asked for while others are computed with, at the pace at which these are read: they lie scattered, which the
// hardware does not foresee, and what is asked for all at once is waited for.
struct Soon {
  const char* tiles[kChunkTiles];
  const uint16_t* scales[kChunkTiles];  // of tiles of 8 bits
  int count = 0;

  // Asks for lines [first, first + lines) of P tiles from `tile` on.
  template <int P>
  void ask(int tile, int first, int lines) const {
    for (int p = 0; p < P; ++p) {
      if (tile + p >= count) return;
      const char* from = tiles[tile + p] + 64 * first;
      for (int line = 0; line < lines; ++line) __builtin_prefetch(from + 64 * line, 0, 3);
    }
  }
};
constexpr int kPace = 8;  // steps between two times of asking

// `scaled`: scores are multiplied by t.scales.
template <class D, int R>
inline void score_rows(QueryTile<D>& t, int row, const typename D::elem* const* k_tiles, int tiles, int head_dim, bool scaled,
                       const Soon* soon) {
  const typename D::row* q = t.q + row * head_dim;
  const auto score = [&]<int P>(int j) {
    vec acc[R][P];
    clear(acc);
    const typename D::elem* at[P];
    for (int p = 0; p < P; ++p) at[p] = k_tiles[j + p];
    const int steps = head_dim / D::kPair;
    for (int step = 0; step < steps; step += kPace) {
      if (soon) soon->template ask<P>(j, step, kPace);
      accumulate<D, R, P, 1>(q + step * D::kPair, head_dim, at, kPace, acc);
      for (int p = 0; p < P; ++p) at[p] += kPace * 16 * D::kPair;
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        const vec score = scaled ? vmul(acc[r][p], vload(t.scales + (j + p) * 16)) : acc[r][p];
        vstore(t.scores + (row + r) * kChunk + (j + p) * 16, score);
      }
  };
  constexpr int P = tile_panels(R);
  int j = 0;
  for (; j + P <= tiles; j += P) score.template operator()<P>(j);
  if constexpr (P > 1)
    for (; j < tiles; ++j) score.template operator()<1>(j);
}

// Copies a tile of values with zeros in place of the tokens from `count` on, which are somebody else's or nobody's: their
// weight is 0, and 0 times what they left there is 0 only if that is finite.
template <class D>
inline void copy_first_values(const typename D::elem* tile, int count, int head_dim, typename D::elem* out) {
  constexpr int kPair = D::kPair, kPairElems = 16 * kPair;
  const int begun = count / kPair, whole = (count + kPair - 1) / kPair;
  std::memcpy(out, tile, sizeof(typename D::elem) * head_dim * 16);
  for (typename D::elem* panel = out; panel < out + head_dim * 16; panel += 256) {
    for (int i = count % kPair; i && i < kPairElems; ++i)
      if (i % kPair >= count % kPair) panel[begun * kPairElems + i] = typename D::elem{};
    std::memset(panel + whole * kPairElems, 0, sizeof(typename D::elem) * (256 - whole * kPairElems));
  }
}

// P panels of 16 head dimensions at `d`, over all tiles of the chunk.
template <class D, int R, int P>
inline void weigh_rows(QueryTile<D>& t, int row, const typename D::elem* const* v_tiles, int tiles, int head_dim, int d,
                       const Soon* soon) {
  vec acc[R][P];
  clear(acc);
  float* out = t.acc + row * head_dim + d;
  constexpr int lines = 16 / D::kPair * P;
  for (int j = 0; j < tiles; ++j) {
    if (soon) soon->template ask<1>(j, d / 16 * (16 / D::kPair), lines);
    const typename D::elem* panels[P];
    for (int p = 0; p < P; ++p) panels[p] = v_tiles[j] + static_cast<size_t>(d / 16 + p) * 256;
    accumulate<D, R, P, 1>(t.probs + row * kChunk + j * 16, kChunk, panels, 16 / D::kPair, acc);
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) {
      float* to = out + r * head_dim + p * 16;
      vstore(to, t.joined(row + r, vload(to), acc[r][p]));
    }
}

// Lanes of the tile at `base` that a query at `position` sees, the others `fill`.
inline vec visible(vec x, int base, int position, int window, float fill) {
  x = vkeep(x, position + 1 - base, fill);
  const int first = window > 0 ? position + 1 - window - base : 0;
  if (first <= 0) return x;
  float lanes[16];
  vstore(lanes, x);
  for (int i = 0; i < 16 && i < first; ++i) lanes[i] = fill;
  return vload(lanes);
}

// Softmax numerators of one row for the chunk that begins at `base`; what values are multiplied with are these, `scaled` by
// t.scales.
template <class D>
inline void soften_row(QueryTile<D>& t, int row, int base, int tiles, int window, float scale, bool scaled) {
  const int position = t.position[row];
  float* scores = t.scores + row * kChunk;
  // Tiles before `whole` are seen whole, unless a window begins here.
  const int whole = window > 0 ? 0 : std::min(tiles, (position + 1 - base) / 16);
  vec best = vset1(-INFINITY);
  for (int j = 0; j < whole; ++j) best = vmax(best, vload(scores + j * 16));
  for (int j = whole; j < tiles; ++j)
    best = vmax(best, visible(vload(scores + j * 16), base + j * 16, position, window, -INFINITY));
  const float top = vmaximum(best) * scale;
  typename D::row* probs = t.probs + row * kChunk;
  if (top == -INFINITY) {  // nothing visible yet: a window that begins in a later chunk
    for (int j = 0; j < tiles; ++j) D::store(probs + j * 16, vzero());
    t.kept[row] = 1.0f, t.added[row] = 0.0f;
    return;
  }
  const vec factor = vset1(scale), shift = vset1(-top);
  vec sum = vzero();
  for (int j = 0; j < tiles; ++j) {
    vec p = vexp(vfma(vload(scores + j * 16), factor, shift));
    if (j >= whole) p = visible(p, base + j * 16, position, window, 0.0f);
    sum = vadd(sum, p);
    if (scaled) {
      p = vmul(p, vload(t.scales + j * 16));
      if (j >= whole) p = visible(p, base + j * 16, position, window, 0.0f);  // scales that nobody wrote may be no numbers
    }
    D::store(probs + j * 16, p);
  }
  t.join(row, top, sum);
}

// Writes what a tile's rows came to; out is [tokens, heads, head_dim].
template <class D, class O>
inline void store_tile(const SlipAttention& a, const AttentionWork::Tile& tile, int head0, int heads, const QueryTile<D>& t, O* out) {
  int row = 0;
  for (int token = tile.begin; token < tile.end; ++token) {
    O* to = out + (static_cast<size_t>(token) * a.heads + head0) * a.head_dim;
    for (int h = 0; h < heads; ++h, ++row) {
      const vec inverse = vset1(1.0f / vsum(t.sum[row]));
      for (int d = 0; d < a.head_dim; d += 16) {
        const vec y = vmul(vload(t.acc + row * a.head_dim + d), inverse);
        if constexpr (std::is_same_v<O, typename D::row>) D::store(to + h * a.head_dim + d, y);
        else vstore(to + h * a.head_dim + d, y);
      }
    }
  }
}

// The chunk that the rows just saw, for whoever joins it with the others.
template <class D>
inline void store_partial(const AttentionWork& work, const AttentionWork::Tile& tile, int chunk, int rows, int head_dim,
                          const QueryTile<D>& t) {
  for (int row = 0; row < rows; ++row) {
    float* to = work.partial(tile, chunk, row);
    for (int d = 0; d < head_dim; d += 16) vstore(to + d, vload(t.acc + row * head_dim + d));
    vstore(to + head_dim, t.sum[row]);
    to[head_dim + 16] = t.top[row];
  }
}

template <class D>
inline void join_partials(const AttentionWork& work, const AttentionWork::Tile& tile, int first_chunk, int end_chunk, int rows,
                          int head_dim, QueryTile<D>& t) {
  t.clear(rows, head_dim);
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk)
    for (int row = 0; row < rows; ++row) {
      const float* from = work.partial(tile, chunk, row);
      const float top = from[head_dim + 16];
      if (top == -INFINITY) continue;
      t.join(row, top, vload(from + head_dim));
      float* acc = t.acc + row * head_dim;
      for (int d = 0; d < head_dim; d += 16) vstore(acc + d, t.joined(row, vload(acc + d), vload(from + d)));
    }
}

// One work item; q and out are [tokens, heads, head_dim]. `after` is the item this thread will probably take next: its
// first keys are asked for before this one is done. Nobody did that for a `first` one.
template <class D, class Q, class O>
inline void attend(const Cache<D>& cache, const AttentionWork& work, const AttentionWork::Item& item,
                   const AttentionWork::Item* after, bool first, const Q* q, const void* k_cache, const void* v_cache, O* out) {
  using elem = typename D::elem;
  const SlipAttention& a = cache.a;
  const SlipBatch& b = cache.b;
  const int head_dim = a.head_dim;
  const AttentionWork::Tile& tile = work.tiles[item.tile];
  const int head0 = tile.kv_head * work.heads_per_kv + tile.group * work.heads_per_tile;
  const int heads = std::min(work.heads_per_tile, work.heads_per_kv - tile.group * work.heads_per_tile);

  const bool scaled = a.cache_form != SLIP_CACHE_PLAIN;
  const size_t tile_bytes = cache.tile_elems() * (scaled ? 1 : sizeof(elem));
  const int lines = static_cast<int>(tile_bytes / 64);
  Soon keys, values, next;
  const auto find = [&](const void* in, const uint16_t* scales, const AttentionWork::Tile& of, int chunk, Soon& found) {
    const int last = position_of(b, of.segment, of.end - 1);
    found.count = std::min(kChunkTiles, (last - chunk * kChunk) / 16 + 1);
    for (int j = 0; j < found.count; ++j) {
      const int index = cache.tile(of.segment, chunk * kChunkTiles + j);
      found.tiles[j] = static_cast<const char*>(in) + (static_cast<size_t>(index) * a.kv_heads + of.kv_head) * tile_bytes;
      if (scaled) __builtin_prefetch(found.scales[j] = scales + cache.scales(index, of.kv_head));
    }
  };
  const auto first_seen = [&](const AttentionWork::Tile& of) {
    const int lowest = position_of(b, of.segment, of.begin);
    return a.window > 0 ? std::max(0, lowest + 1 - a.window) / kChunk : 0;
  };
  const auto first_of = [&](const AttentionWork::Item& of) { return std::max(of.first_chunk, first_seen(work.tiles[of.tile])); };
  int chunk = first_of(item);
  if (chunk < item.end_chunk) {
    find(k_cache, a.k_scales, tile, chunk, keys);
    if (first) keys.template ask<kChunkTiles>(0, 0, lines);
  }

  QueryTile<D> t;
  int rows = 0;
  for (int token = tile.begin; token < tile.end; ++token) {
    const Q* from = q + (static_cast<size_t>(token) * a.heads + head0) * head_dim;
    for (int h = 0; h < heads; ++h, ++rows) {
      t.position[rows] = position_of(b, tile.segment, token);
      if constexpr (std::is_same_v<Q, typename D::row>) {
        std::memcpy(t.q + rows * head_dim, from + h * head_dim, head_dim * sizeof(Q));
      } else {
        for (int d = 0; d < head_dim; d += 16) D::store(t.q + rows * head_dim + d, vload(from + h * head_dim + d));
      }
    }
  }
  t.clear(rows, head_dim);

  const int highest = t.position[rows - 1];
  alignas(64) elem last_values[16 * kMaxHeadDim];
  alignas(64) elem widened[kChunk * kMaxHeadDim];
  const elem* panels[kChunkTiles];
  // What is computed with: the tiles, or what their bytes are widened to, while others are asked for.
  const auto take = [&](const Soon& found, const Soon& soon) {
    for (int j = 0; j < found.count; ++j) {
      panels[j] = reinterpret_cast<const elem*>(found.tiles[j]);
      if (!scaled) continue;
      soon.template ask<1>(j, 0, lines);
      elem* to = widened + j * cache.tile_elems();
      widen_tile<D>(a.cache_form, reinterpret_cast<const uint8_t*>(found.tiles[j]), cache.tile_elems(), to);
      panels[j] = to;
      vstore(t.scales + j * 16, vhalves(found.scales[j]));
    }
  };
  for (; chunk < item.end_chunk; ++chunk) {
    const int base = chunk * kChunk, tiles = keys.count;
    find(v_cache, a.v_scales, tile, chunk, values);
    next.count = 0;
    if (chunk + 1 < item.end_chunk) find(k_cache, a.k_scales, tile, chunk + 1, next);
    else if (after && first_of(*after) < after->end_chunk) find(k_cache, a.k_scales, work.tiles[after->tile], first_of(*after), next);
    take(keys, values);
    for_row_tiles(rows, [&]<int R>(int row) {
      score_rows<D, R>(t, row, panels, tiles, head_dim, scaled, row || scaled ? nullptr : &values);
    });
    take(values, next);
    for (int row = 0; row < rows; ++row) soften_row<D>(t, row, base, tiles, a.window, a.scale, scaled);
    const int seen = highest % 16 + 1;  // of the last tile
    if (!scaled && base + kChunk > highest && seen < 16) {  // bytes are numbers, whoever left them
      copy_first_values<D>(panels[tiles - 1], seen, head_dim, last_values);
      panels[tiles - 1] = last_values;
    }
    for_row_tiles(rows, [&]<int R>(int row) {
      constexpr int P = tile_panels(R);
      int d = 0;
      const auto* soon = row || scaled ? nullptr : &next;
      for (; d + 16 * P <= head_dim; d += 16 * P) weigh_rows<D, R, P>(t, row, panels, tiles, head_dim, d, soon);
      if constexpr (P > 1)
        for (; d < head_dim; d += 16) weigh_rows<D, R, 1>(t, row, panels, tiles, head_dim, d, soon);
    });
    next.template ask<kChunkTiles>(tiles, 0, lines);
    std::swap(keys, next);
    if (tile.parts > 1) {
      store_partial<D>(work, tile, chunk, rows, head_dim, t);
      t.clear(rows, head_dim);
    }
  }
  if (tile.parts > 1) {
    if ((work.done[item.tile].fetch_add(1, std::memory_order_acq_rel) + 1) % tile.parts) return;  // somebody else joins them
    join_partials<D>(work, tile, first_seen(tile), highest / kChunk + 1, rows, head_dim, t);
  }
  store_tile<D>(a, tile, head0, heads, t, out);
}

template <class D, class Q, class O>
inline void attend_all(Team& team, const Cache<D>& cache, const AttentionWork& work, const Q* q, const void* k_cache,
                       const void* v_cache, O* out) {
  const auto& items = work.items;
  const size_t stride = team.size();
  team.parallel(static_cast<int>(items.size()), [&](size_t item) {
    const auto* after = item + stride < items.size() ? &items[item + stride] : nullptr;
    attend<D>(cache, work, items[item], after, item < stride, q, k_cache, v_cache, out);
  });
}
