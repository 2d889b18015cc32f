// Causal attention over the paged cache, and the cache writes. Included once per instruction set, inside its namespace.
//
// Keys are visited in chunks of kChunk positions counted from the beginning of the sequence, with one online-softmax
// update per chunk (Milakov & Gimelshein 2018). Chunk borders and the order within a chunk depend on positions only,
// so a query gets the same bits in a prefill, a decode step or a verification of drafts.

constexpr int kChunk = 128;          // positions per softmax update
constexpr int kChunkTiles = kChunk / 16;
constexpr int kMaxQueryRows = 32;    // query heads x queries that share one pass over the keys
constexpr int kMaxHeadDim = 256;

template <class D>
struct Cache {
  const SlipAttention& a;
  const SlipBatch& b;
  size_t tile_elems() const { return static_cast<size_t>(a.head_dim) * 16; }
  int tile(int segment, int index) const {
    const int32_t* table = b.block_tables + static_cast<size_t>(b.table_row[segment]) * b.table_stride;
    return table[index / b.tiles_per_block] * b.tiles_per_block + index % b.tiles_per_block;
  }
  template <class T>
  T* at(T* cache, int tile_index, int kv_head) const {
    return cache + (static_cast<size_t>(tile_index) * a.kv_heads + kv_head) * tile_elems();
  }
};

// Writes k, v [head_dim] of one token and head at its place in the tile.
template <class D>
inline void store_token(typename D::elem* k_tile, typename D::elem* v_tile, int slot, const float* k, const float* v,
                        int head_dim) {
  constexpr int kPair = D::kPair;
  for (int d = 0; d < head_dim; ++d) k_tile[(d / kPair) * 16 * kPair + slot * kPair + d % kPair] = D::narrow(k[d]);
  for (int d = 0; d < head_dim; ++d)
    v_tile[static_cast<size_t>(d / 16) * 256 + (slot / kPair) * 16 * kPair + (d % 16) * kPair + slot % kPair] =
        D::narrow(v[d]);
}

// Writes k, v [kv_heads, head_dim] of one token where the mirror (token, block, offset) says.
template <class D>
inline void store_mirror(const Cache<D>& cache, typename D::elem* k_cache, typename D::elem* v_cache, const int32_t* mirror,
                         const float* k, const float* v) {
  const int head_dim = cache.a.head_dim;
  const int tile = mirror[1] * cache.b.tiles_per_block + mirror[2] / 16;
  for (int h = 0; h < cache.a.kv_heads; ++h)
    store_token<D>(cache.at(k_cache, tile, h), cache.at(v_cache, tile, h), mirror[2] % 16, k + h * head_dim,
                   v + h * head_dim, head_dim);
}

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

// One query tile: rows are (query, head of the group), all against the same KV head.
template <class D>
struct QueryTile {
  alignas(64) typename D::row q[kMaxQueryRows * kMaxHeadDim];
  alignas(64) float scores[kMaxQueryRows * kChunk];
  alignas(64) typename D::row probs[kMaxQueryRows * kChunk];
  alignas(64) float acc[kMaxQueryRows * kMaxHeadDim];
  vec sum[kMaxQueryRows];
  float top[kMaxQueryRows];
  int position[kMaxQueryRows];
};

template <class D, int R>
inline void score_rows(QueryTile<D>& t, int row, const typename D::elem* const* k_tiles, int tiles, int head_dim) {
  const typename D::row* q = t.q + row * head_dim;
  const auto score = [&]<int P>(int j) {
    vec acc[R][P];
    clear(acc);
    accumulate<D, R, P, 1>(q, head_dim, k_tiles + j, head_dim / D::kPair, acc);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) vstore(t.scores + (row + r) * kChunk + (j + p) * 16, acc[r][p]);
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

// P panels of 16 head dimensions at `d`, accumulated over all tiles of the chunk.
template <class D, int R, int P>
inline void weigh_rows(QueryTile<D>& t, int row, const typename D::elem* const* v_tiles, int tiles, int head_dim, int d) {
  vec acc[R][P];
  float* out = t.acc + row * head_dim + d;
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) acc[r][p] = vload(out + r * head_dim + p * 16);
  for (int j = 0; j < tiles; ++j) {
    const typename D::elem* panels[P];
    for (int p = 0; p < P; ++p) panels[p] = v_tiles[j] + static_cast<size_t>(d / 16 + p) * 256;
    accumulate<D, R, P, 1>(t.probs + row * kChunk + j * 16, kChunk, panels, 16 / D::kPair, acc);
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) vstore(out + r * head_dim + p * 16, acc[r][p]);
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

// Softmax numerators of one row for the chunk that begins at `base`; rescales what came before.
template <class D>
inline void soften_row(QueryTile<D>& t, int row, int base, int tiles, int window, float scale, int head_dim) {
  const int position = t.position[row];
  float* scores = t.scores + row * kChunk;
  // Tiles before `whole` are seen whole, unless a window begins here.
  const int whole = window > 0 ? 0 : std::min(tiles, (position + 1 - base) / 16);
  vec best = vset1(-INFINITY);
  for (int j = 0; j < whole; ++j) best = vmax(best, vload(scores + j * 16));
  for (int j = whole; j < tiles; ++j)
    best = vmax(best, visible(vload(scores + j * 16), base + j * 16, position, window, -INFINITY));
  const float previous = t.top[row];
  const float chunk_top = vmaximum(best) * scale;
  const float top = chunk_top > previous ? chunk_top : previous;
  typename D::row* probs = t.probs + row * kChunk;
  if (top == -INFINITY) {  // nothing visible yet: a window that begins in a later chunk
    for (int j = 0; j < tiles; ++j) D::store(probs + j * 16, vzero());
    return;
  }
  if (top > previous) {
    float factor[16];
    vstore(factor, vexp(vset1(previous - top)));
    const vec f = vset1(factor[0]);
    for (int d = 0; d < head_dim; d += 16) vstore(t.acc + row * head_dim + d, vmul(vload(t.acc + row * head_dim + d), f));
    t.sum[row] = vmul(t.sum[row], f);
    t.top[row] = top;
  }
  const vec factor = vset1(scale), shift = vset1(-top);
  vec sum = t.sum[row];
  for (int j = 0; j < tiles; ++j) {
    vec p = vexp(vfma(vload(scores + j * 16), factor, shift));
    if (j >= whole) p = visible(p, base + j * 16, position, window, 0.0f);
    sum = vadd(sum, p);
    D::store(probs + j * 16, p);
  }
  t.sum[row] = sum;
}

// Work split of one attention call: an item is a tile of queries of one segment against one KV head, for a group of its
// query heads. Long items come first, so that no thread begins one when the others are done; the tiles of a head come
// one after the other, so that its keys and values are still in the cache for the next tile.
struct AttentionWork {
  struct Item {
    int segment, begin, end;  // query tokens [begin, end)
    int kv_head, group;
  };
  int heads_per_kv, heads_per_tile;
  std::vector<Item> items;

  AttentionWork(const SlipAttention& a, const SlipBatch& b, int threads) {
    heads_per_kv = a.heads / a.kv_heads;
    heads_per_tile = std::min(heads_per_kv, kMaxQueryRows);
    const int groups = (heads_per_kv + heads_per_tile - 1) / heads_per_tile;
    const int most = kMaxQueryRows / heads_per_tile;
    std::vector<int> order(b.num_segments);
    std::iota(order.begin(), order.end(), 0);
    const auto queries = [&](int s) { return b.q_start[s + 1] - b.q_start[s]; };
    const auto cost = [&](int s) { return static_cast<int64_t>(std::min(queries(s), most)) * b.kv_len[s]; };
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return cost(x) > cost(y); });
    // A few tiles more where there are few items, so that two threads can share three heads evenly.
    const int heads = std::max(b.num_segments * a.kv_heads * groups, 1);
    const int least = (2 * threads + heads - 1) / heads;
    for (int s : order) {
      const int tiles = std::max((queries(s) + most - 1) / most, std::min(queries(s), least));
      for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head)
        for (int group = 0; group < groups; ++group)
          for (int t = 0; t < tiles; ++t) {
            const auto border = [&](int i) { return b.q_start[s] + static_cast<int>(int64_t{queries(s)} * i / tiles); };
            items.push_back({s, border(t), border(t + 1), kv_head, group});
          }
    }
  }
};

// Asks for the tiles' memory ahead of their use; they lie scattered, which the hardware does not foresee.
template <class T>
inline void prefetch_tiles(const T* const* tiles, int count, size_t elems) {
  for (int j = 0; j < count; ++j) {
    const char* from = reinterpret_cast<const char*>(tiles[j]);
    for (size_t at = 0; at < elems * sizeof(T); at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// One work item; q and out are [tokens, heads, head_dim]. `after` is the item this thread will probably take next: its
// first keys are asked for before this one is done.
template <class D, class Q, class O>
inline void attend(const Cache<D>& cache, const AttentionWork& work, const AttentionWork::Item& item,
                   const AttentionWork::Item* after, const Q* q, const typename D::elem* k_cache,
                   const typename D::elem* v_cache, O* out) {
  const SlipAttention& a = cache.a;
  const SlipBatch& b = cache.b;
  const int head_dim = a.head_dim;
  const auto [segment, begin, end, kv_head, group] = item;
  const int head0 = kv_head * work.heads_per_kv + group * work.heads_per_tile;
  const int heads = std::min(work.heads_per_tile, work.heads_per_kv - group * work.heads_per_tile);

  QueryTile<D> t;
  int rows = 0;
  for (int token = begin; token < end; ++token) {
    const Q* from = q + (static_cast<size_t>(token) * a.heads + head0) * head_dim;
    for (int h = 0; h < heads; ++h, ++rows) {
      t.position[rows] = position_of(b, segment, token);
      t.top[rows] = -INFINITY;
      t.sum[rows] = vzero();
      if constexpr (std::is_same_v<Q, typename D::row>) {
        std::memcpy(t.q + rows * head_dim, from + h * head_dim, head_dim * sizeof(Q));
      } else {
        for (int d = 0; d < head_dim; d += 16) D::store(t.q + rows * head_dim + d, vload(from + h * head_dim + d));
      }
    }
  }
  for (int i = 0; i < rows * head_dim; i += 16) vstore(t.acc + i, vzero());

  const int highest = t.position[rows - 1];
  const typename D::elem *k_tiles[kChunkTiles], *v_tiles[kChunkTiles];
  alignas(64) typename D::elem last_values[16 * kMaxHeadDim];
  auto find = [&](const typename D::elem* in, const AttentionWork::Item& of, int base, const typename D::elem** found) {
    const int last = position_of(b, of.segment, of.end - 1);
    const int tiles = std::min(kChunkTiles, (last - base) / 16 + 1);
    for (int j = 0; j < tiles; ++j) found[j] = cache.at(in, cache.tile(of.segment, base / 16 + j), of.kv_head);
    return tiles;
  };
  auto first_base = [&](const AttentionWork::Item& of) {
    const int lowest = position_of(b, of.segment, of.begin);
    return a.window > 0 ? std::max(0, lowest + 1 - a.window) / kChunk * kChunk : 0;
  };
  int base = first_base(item);
  find(k_cache, item, base, k_tiles);
  for (; base <= highest; base += kChunk) {
    const int tiles = find(v_cache, item, base, v_tiles);
    prefetch_tiles(v_tiles, tiles, cache.tile_elems());
    const bool more = base + kChunk <= highest;
    const int seen = highest % 16 + 1;  // of the last tile
    for_row_tiles(rows, [&]<int R>(int row) { score_rows<D, R>(t, row, k_tiles, tiles, head_dim); });
    if (more || after)
      prefetch_tiles(k_tiles, more ? find(k_cache, item, base + kChunk, k_tiles) : find(k_cache, *after, first_base(*after), k_tiles),
                     cache.tile_elems());
    for (int row = 0; row < rows; ++row) soften_row<D>(t, row, base, tiles, a.window, a.scale, head_dim);
    if (!more && seen < 16) {
      copy_first_values<D>(v_tiles[tiles - 1], seen, head_dim, last_values);
      v_tiles[tiles - 1] = last_values;
    }
    for_row_tiles(rows, [&]<int R>(int row) {
      constexpr int P = tile_panels(R);
      int d = 0;
      for (; d + 16 * P <= head_dim; d += 16 * P) weigh_rows<D, R, P>(t, row, v_tiles, tiles, head_dim, d);
      if constexpr (P > 1)
        for (; d < head_dim; d += 16) weigh_rows<D, R, 1>(t, row, v_tiles, tiles, head_dim, d);
    });
  }

  rows = 0;
  for (int token = begin; token < end; ++token) {
    O* to = out + (static_cast<size_t>(token) * a.heads + head0) * head_dim;
    for (int h = 0; h < heads; ++h, ++rows) {
      const vec inverse = vset1(1.0f / vsum(t.sum[rows]));
      for (int d = 0; d < head_dim; d += 16) {
        const vec y = vmul(vload(t.acc + rows * head_dim + d), inverse);
        if constexpr (std::is_same_v<O, typename D::row>) D::store(to + h * head_dim + d, y);
        else vstore(to + h * head_dim + d, y);
      }
    }
  }
}

template <class D, class Q, class O>
inline void attend_all(Team& team, const Cache<D>& cache, const AttentionWork& work, const Q* q,
                       const typename D::elem* k_cache, const typename D::elem* v_cache, O* out) {
  const auto& items = work.items;
  const size_t stride = team.size();
  team.parallel(static_cast<int>(items.size()), [&](size_t item) {
    const auto* after = item + stride < items.size() ? &items[item + stride] : nullptr;
    attend<D>(cache, work, items[item], after, q, k_cache, v_cache, out);
  });
}
