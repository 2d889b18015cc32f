// A matrix of a layer times rows, in whatever form it is, with what adapters add. Included once per instruction set, inside its
// namespace.

// rows of x times a matrix. If x is of D's elements the matrix is, too; else x is float32 and the matrix may be quantised. `scratch`
// holds scratch_bytes(k) per row.
template <class D, class X, class Epilogue>
inline void project(Team& team, const SlipLinear& w, const typename X::row* x, int rows, void* scratch, const Epilogue& epilogue) {
  const size_t k = w.k;
  if constexpr (std::is_same_v<X, F32>) {
    if (w.num_parts) {
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
    for_each(team, rows, 4, [&](int row) {
      for (size_t i = row * k; i < (row + 1) * k; i += 16) D::store(rounded + i, vload(x + i));
    });
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
struct Additions {
  const int32_t* of_row;  // [rows] adapter of each, from 1 on; 0 for none. Null: no row has any
  const SlipAdapter* adapters;
  SlipMatrix matrix;
  float* inner;  // [rows, ld] x A^T
  size_t ld;

  const SlipAdapter* adapter(int row) const {
    const SlipAdapter* found = of_row && of_row[row] ? adapters + of_row[row] - 1 : nullptr;
    return found && found->down[matrix].n ? found : nullptr;
  }
};

template <class Epilogue>
struct Adapted {
  Additions added;
  Epilogue then;

  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    if (const SlipAdapter* adapter = added.adapter(row)) {
      const int rank = adapter->down[added.matrix].n;
      const float* inner = added.inner + row * added.ld;
      for (int p = 0; p < P; ++p) {
        const float* up = adapter->up[added.matrix] + static_cast<size_t>(panel + p) * rank * 16;
        for (int r = 0; r < rank; ++r) acc[p] = vfma(vset1(inner[r]), vload(up + r * 16), acc[p]);
      }
    }
    then.template operator()<P>(row, panel, acc);
  }
};

// As project, with what adapters add.
template <class D, class X, class Epilogue>
inline void project_adapted(Team& team, const SlipLinear& w, const Additions& added, const typename X::row* x, int rows, void* scratch,
                            const Epilogue& epilogue) {
  for (int from = 0, to; added.of_row && from < rows; from = to) {
    for (to = from + 1; to < rows && added.of_row[to] == added.of_row[from];) ++to;
    if (const SlipAdapter* adapter = added.adapter(from)) {
      const SlipLinear& down = adapter->down[added.matrix];
      project<D, X>(team, down, x + static_cast<size_t>(from) * down.k, to - from, scratch,
                    StoreRows{added.inner + from * added.ld, added.ld, down.n, nullptr});
    }
  }
  project<D, X>(team, w, x, rows, scratch, Adapted<Epilogue>{added, epilogue});
}
