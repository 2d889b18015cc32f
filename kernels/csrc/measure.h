// What the machine can do at most, for whoever wants to know how near to that the kernels come. Included once per instruction
// set, inside its namespace.

// Reads memory once, on the whole team.
inline void read_once(Team& team, const float* memory, int64_t count) {
  constexpr int64_t kPiece = 1 << 18;
  const Pass pass(team);
  team.parallel(static_cast<int>((count + kPiece - 1) / kPiece), [&](int piece) {
    vec sums[4] = {vzero(), vzero(), vzero(), vzero()};
    const int64_t end = std::min(count, (piece + 1) * kPiece);
    for (int64_t i = piece * kPiece; i + 64 <= end; i += 64)
      for (int j = 0; j < 4; ++j) sums[j] = vadd(sums[j], vload(memory + i + 16 * j));
    for (vec& sum : sums) keep(sum);
  });
}

// Multiplies and adds in registers on the whole team; returns how many operations that was.
template <class D>
inline double multiply_in_registers(Team& team, int64_t times) {
  if constexpr (D::kTiles) {
    std::atomic<double> operations = 0.0;
    const Pass pass(team);
    team.parallel(4 * team.size(), [&](int) { operations.fetch_add(D::multiply_in_tiles(times), std::memory_order_relaxed); });
    return operations;
  }
  constexpr int R = kMaxRows, P = tile_panels(kMaxRows);
  alignas(64) typename D::elem panel[16 * D::kPair] = {};
  typename D::row row[D::kPair] = {};
  const int items = 4 * team.size();
  const Pass pass(team);
  team.parallel(items, [&](int) {
    vec acc[R][P];
    const auto keep_all = [&] {  // each as a sum of its own
      for (auto& of_row : acc)
        for (vec& sum : of_row) keep(sum);
    };
    clear(acc);
    keep_all();
    const typename D::wvec w = D::template load<0>(panel);
    const typename D::xvec x = D::broadcast(row);
    for (int64_t i = 0; i < times; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = D::dot(acc[r][p], x, w);
    }
    keep_all();
  });
  return 2.0 * 16 * D::kPair / D::kParts * R * P * items * static_cast<double>(times);
}

// The same with bytes times bytes, as quantised matrices are multiplied.
inline double multiply_bytes(Team& team, int64_t times) {
  constexpr int R = kInt8Rows;
  alignas(64) uint8_t panel[64] = {};
  const int8_t row[4] = {};
  const int items = 4 * team.size();
  const Pass pass(team);
  team.parallel(items, [&](int) {
    small_sums acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r] = small_zero();
      keep(acc[r]);  // each as a sum of its own
    }
    words w = load_words(panel);
    for (int64_t i = 0; i < times; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        keep(w);  // else a product would be made once for all
        acc[r] = dot_small(acc[r], w, row);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) keep(acc[r]);
  });
  return 2.0 * 64 * R * items * static_cast<double>(times);
}
