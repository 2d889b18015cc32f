// How one attention call is shared among threads. Included once per instruction set, inside its namespace, by attention.h.
//
// A tile is some queries of one segment against one KV head, for a group of its query heads; an item is a tile, or some chunks
// of one where there are too few tiles for all threads. Long items come first, so that no thread begins one when the others
// are done; the items of a head come one after the other, so that its keys and values are still in the cache for the next one.
struct AttentionWork {
  struct Tile {
    int segment, begin, end;  // query tokens [begin, end)
    int kv_head, group;
    int rows;         // queries times heads, at most
    int parts;        // items
    int64_t partial;  // where the first chunk's partial result is, if there are several
  };
  struct Item {
    int tile, first_chunk, end_chunk;
  };
  int heads_per_kv, heads_per_tile;
  int64_t row_floats;  // of a partial result: acc, sum and top of one row
  std::vector<Tile> tiles;
  std::vector<Item> items;
  // Shared by the threads while a call is under way, of which there is one at a time.
  std::unique_ptr<float[]> partials;
  std::unique_ptr<std::atomic<int>[]> done;  // items of each tile, over all calls

  AttentionWork(const SlipAttention& a, const SlipBatch& b, int threads) {
    heads_per_kv = a.heads / a.kv_heads;
    heads_per_tile = std::min(heads_per_kv, most_rows(a.cache_form));
    row_floats = a.head_dim + 32;
    const int groups = (heads_per_kv + heads_per_tile - 1) / heads_per_tile;
    const int most = most_rows(a.cache_form) / heads_per_tile;
    std::vector<int> order(b.num_segments);
    std::iota(order.begin(), order.end(), 0);
    const auto queries = [&](int s) { return b.q_start[s + 1] - b.q_start[s]; };
    const auto tiles_of = [&](int s) { return (queries(s) + most - 1) / most; };
    const auto cost = [&](int s) { return static_cast<int64_t>(std::min(queries(s), most)) * b.kv_len[s]; };
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return cost(x) > cost(y); });
    int count = 0;
    for (int s : order) count += tiles_of(s) * a.kv_heads * groups;
    const bool few = threads > 1 && count < 2 * threads;
    const int most_parts = few ? (8 * threads + count - 1) / std::max(count, 1) : 1;
    int64_t num_floats = 0;
    for (int s : order) {
      const int chunks_of_segment = (b.kv_len[s] + kChunk - 1) / kChunk;
      // What is too short to be shared by chunks is shared by queries.
      const int in_s = few && chunks_of_segment == 1 ? std::max(tiles_of(s), std::min(queries(s), most_parts)) : tiles_of(s);
      for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head)
        for (int group = 0; group < groups; ++group)
          for (int t = 0; t < in_s; ++t) {
            const auto border = [&](int i) { return b.q_start[s] + static_cast<int>(int64_t{queries(s)} * i / in_s); };
            const int chunks = position_of(b, s, border(t + 1) - 1) / kChunk + 1;
            const int parts = std::min(chunks, most_parts);
            const int tile = static_cast<int>(tiles.size());
            const int rows = (border(t + 1) - border(t)) * heads_per_tile;
            tiles.push_back({s, border(t), border(t + 1), kv_head, group, rows, parts, num_floats});
            if (parts > 1) num_floats += chunks * rows * row_floats;
            for (int i = 0; i < parts; ++i) items.push_back({tile, chunks * i / parts, chunks * (i + 1) / parts});
          }
    }
    if (num_floats) {
      partials.reset(new float[num_floats]);
      done.reset(new std::atomic<int>[tiles.size()]());
    }
  }
  float* partial(const Tile& tile, int chunk, int row) const {
    return partials.get() + tile.partial + (chunk * tile.rows + row) * row_floats;
  }
};
