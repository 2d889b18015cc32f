// A matrix of a layer times rows, in whatever form it is, with what adapters add. Included once per instruction set, inside its
// namespace.

template <class D>
inline void round_rows(Team& team, const float* x, int rows, size_t k, typename D::row* out) {
  for_each(team, rows, 4, [&](int row) {
    for (size_t i = row * k; i < (row + 1) * k; i += 16) D::store(out + i, vload(x + i));
  });
}

// rows of x times a matrix. If x is of D's elements the matrix is, too; else x is float32 and the matrix may be quantised. `scratch`
// holds scratch_bytes(k) per row.
template <class D, class X, class Epilogue>
inline void project(Team& team, const SlipLinear& w, const typename X::row* x, int rows, void* scratch, const Epilogue& epilogue) {
  const size_t k = w.k;
  const bool is_rounded = D::kPair == 2 && w.num_parts && w.arithmetic == SLIP_ROUNDED;
  if constexpr (std::is_same_v<X, F32>) {
    if (w.num_parts && !is_rounded) {
      const Prepared in = prepare(team, w, x, rows, scratch);
      if (w.arithmetic == SLIP_EXACT) return packed_matmul<Exact>(team, w, in, rows, epilogue);
      if (w.arithmetic == SLIP_INT8) return packed_matmul<Int8>(team, w, in, rows, epilogue);
      return packed_matmul<Int16>(team, w, in, rows, epilogue);
    }
  }
  if constexpr (std::is_same_v<X, D>) {
    matmul<D>(team, w, x, k, rows, epilogue);
  } else {
    auto* rounded = static_cast<typename D::row*>(scratch);
    round_rows<D>(team, x, rows, k, rounded);
    if constexpr (D::kPair == 2) {
      if (is_rounded) return rounded_matmul<D>(team, w, rounded, rows, epilogue);
    }
    matmul<D>(team, w, rounded, k, rows, epilogue);
  }
}

inline size_t scratch_bytes(int k) { return prepared_bytes(k) + 64; }

// Adapters are low-rank additions to matrices (Hu et al. 2021), other ones for other rows of a batch.
//
// x A^T is computed before the matrix, for runs of rows with the same adapter; times B it joins the sums of the matrix before
// anything is made of these. So whatever becomes of results stays as it is, and rows without an adapter have the bits they have
// in a batch without any.

// The additions to one matrix of a layer.
template <class D>
struct Additions {
  const int32_t* of_row;  // [rows] adapter of each, from 1 on; 0 for none. Null: no row has any
  const SlipAdapter* adapters;
  SlipMatrix matrix;
  typename D::row* inner;  // [rows, ld] x A^T
  size_t ld;

  const SlipAdapter* adapter(int row) const {
    const SlipAdapter* found = of_row && of_row[row] ? adapters + of_row[row] - 1 : nullptr;
    return found && found->down[matrix].n ? found : nullptr;
  }
};

template <class D>
struct RoundRows {
  typename D::row* out;
  size_t ld;
  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    for (int p = 0; p < P; ++p) D::store(out + row * ld + (panel + p) * 16, acc[p]);
  }
};

// A group of panels of one adapter's A, for some rows.
struct DownWork {
  const SlipLinear* down;
  int from, rows, panel;
};

// x A^T of all rows: adapters are small, so threads share out their panels instead of going through one after the other together.
template <class D, class X>
inline void multiply_down(Team& team, const Additions<D>& added, const typename X::row* x, int rows, int k, void* scratch) {
  std::vector<DownWork> work;
  for (int from = 0, to; from < rows; from = to) {
    for (to = from + 1; to < rows && added.of_row[to] == added.of_row[from];) ++to;
    if (const SlipAdapter* adapter = added.adapter(from))
      for (int panel = 0; panel < adapter->down[added.matrix].n / 16; panel += kGroup)
        work.push_back({&adapter->down[added.matrix], from, to - from, panel});
  }
  if (work.empty()) return;
  const typename D::row* in;
  if constexpr (std::is_same_v<X, D>) {
    in = x;
  } else {
    auto* rounded = static_cast<typename D::row*>(scratch);
    round_rows<D>(team, x, rows, k, rounded);
    in = rounded;
  }
  for_each(team, static_cast<int>(work.size()), 1, [&](int i) {
    const DownWork& w = work[i];
    const auto* panels = static_cast<const typename D::elem*>(w.down->panels) + static_cast<size_t>(w.panel) * 16 * k;
    const typename D::row* mine = in + static_cast<size_t>(w.from) * k;
    const RoundRows<D> store{added.inner + w.from * added.ld, added.ld};
    const int count = std::min(w.down->n / 16 - w.panel, kGroup);
    if (count == kGroup) return panel_group<D, kGroup>(mine, k, w.rows, panels, k, w.panel, nullptr, store);
    for (int p = 0; p < count; ++p)
      panel_group<D, 1>(mine, k, w.rows, panels + p * 16 * D::kPair, k, w.panel + p, nullptr, store);
  });
}

template <class D, class Epilogue>
struct Adapted {
  Additions<D> added;
  Epilogue then;

  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    if (const SlipAdapter* adapter = added.adapter(row)) {
      const int rank = adapter->rank[added.matrix];
      const auto* up = static_cast<const typename D::elem*>(adapter->up[added.matrix]) + static_cast<size_t>(panel) * rank * 16;
      for (int p = 0; p < P; ++p, up += rank * 16) {
        const int begin = adapter->begins[added.matrix][panel + p];
        if (begin < 0) continue;
        const typename D::row* inner = added.inner + row * added.ld + begin;
        for (int k = 0; k < rank; k += D::kPair) {
          const typename D::elem* step = up + k * 16;
          acc[p] = D::dot(acc[p], D::broadcast(inner + k), D::template load<0>(step));
          if constexpr (D::kParts == 2) acc[p] = D::dot(acc[p], D::broadcast(inner + k + 1), D::template load<1>(step));
        }
      }
    }
    then.template operator()<P>(row, panel, acc);
  }
};

// As project, with what adapters add.
template <class D, class X, class Epilogue>
inline void project_adapted(Team& team, const SlipLinear& w, const Additions<D>& added, const typename X::row* x, int rows, void* scratch,
                            const Epilogue& epilogue) {
  if (added.of_row) multiply_down<D, X>(team, added, x, rows, w.k, scratch);
  project<D, X>(team, w, x, rows, scratch, Adapted<D, Epilogue>{added, epilogue});
}
