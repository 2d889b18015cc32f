// The decoder stack of the Llama family (Llama, Mistral, Qwen2, Qwen3) as one call. Included once per instruction
// set, inside its namespace. The residual stream and all reductions are float32; what is cached is rounded to D, and so are
// matrix inputs, but for those of a model with quantised matrices (X is F32 then).

// Without a weight only rounds to D.
template <class D>
inline void norm_row(const float* x, const float* weight, int n, float eps, typename D::row* out) {
  if (!weight) {
    for (int i = 0; i < n; i += 16) D::store(out + i, vload(x + i));
    return;
  }
  vec sum = vzero();
  for (int i = 0; i < n; i += 16) {
    const vec v = vload(x + i);
    sum = vfma(v, v, sum);
  }
  const vec inverse = vset1(1.0f / std::sqrt(vsum(sum) / n + eps));
  for (int i = 0; i < n; i += 16) D::store(out + i, vmul(vmul(vload(x + i), inverse), vload(weight + i)));
}

template <class D>
inline void norm_rows(Team& team, const float* x, const int32_t* rows, const float* weight, int count, int n, float eps,
                      typename D::row* out) {
  for_each(team, count, 8, [&](int r) {
    norm_row<D>(x + static_cast<size_t>(rows ? rows[r] : r) * n, weight, n, eps, out + static_cast<size_t>(r) * n);
  });
}

// Normalises (Qwen3) and rotates one head in place; halves form the rotated pairs, as in Hugging Face checkpoints.
inline void rotate_head(float* x, int head_dim, const float* norm, float eps, const float* cos, const float* sin) {
  if (norm) norm_row<F32>(x, norm, head_dim, eps, x);
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// Row `token` of the embedding, read from the panels it shares with a tied LM head.
template <class D>
inline void embed_row(const SlipLinear& table, int token, float* out) {
  if (table.num_parts) {
    const SlipPart* part = table.parts + table.num_parts - 1;
    while (part->first_panel > token / 16) --part;
    const int panel = token / 16 - part->first_panel;
    const auto* group = static_cast<const uint8_t*>(part->data) + panel / 4 * layout(part->form).group(table.k);
    unpack_column(part->form, group, panel % 4, token % 16, table.k, out);
    if (table.arithmetic == SLIP_ROUNDED)
      for (int k = 0; k < table.k; ++k) out[k] = D::widen(D::narrow(out[k]));
    return;
  }
  constexpr int columns = 16 * kGroup;
  const auto* group = static_cast<const typename D::elem*>(table.panels) + static_cast<size_t>(token / columns) * columns * table.k;
  const int lane = token % columns;
  for (int k = 0; k < table.k; ++k)
    out[k] = D::widen(group[(k / D::kPair) * columns * D::kPair + lane * D::kPair + k % D::kPair]);
}

constexpr size_t kAheadBytes = 256 << 10;  // less than a core's own cache

// Has threads without work read the beginning of a quantised matrix. Others take so long to read that nothing is left to gain.
inline void read_ahead(Team& team, const SlipLinear& w) {
  if (!w.num_parts) return team.read_ahead(nullptr, 0);
  const size_t bytes = w.parts->panels / 4 * layout(w.parts->form).group(w.k);
  team.read_ahead(w.parts->data, std::min(bytes, kAheadBytes));
}

template <class D, class X>
struct Workspace {
  using row = typename D::row;
  using input = typename X::row;
  input* x;       // [tokens, hidden]
  float* qkv;     // [tokens, (heads + 2 kv_heads) head_dim]
  row* q;         // [tokens, heads, head_dim]
  input* values;  // [tokens, heads, head_dim]
  input* act;     // [tokens, intermediate]
  row* inner;     // [tokens, adapter_rank]
  void* scratch;  // what matrices make of the above
  int64_t bytes;

  Workspace(const SlipModel& m, int64_t tokens, void* memory) {
    char* at = static_cast<char*>(memory);
    auto take = [&](int64_t count, int64_t size) {
      char* mine = at;
      at += (tokens * count * size + 63) / 64 * 64;
      return mine;
    };
    const int width = m.layers[0].embed_norm ? 2 * m.hidden : m.hidden;
    x = reinterpret_cast<input*>(take(width, sizeof(input)));
    qkv = reinterpret_cast<float*>(take((m.heads + 2 * m.kv_heads) * m.head_dim, sizeof(float)));
    q = reinterpret_cast<row*>(take(m.heads * m.head_dim, sizeof(row)));
    values = reinterpret_cast<input*>(take(m.heads * m.head_dim, sizeof(input)));
    act = reinterpret_cast<input*>(take(m.intermediate, sizeof(input)));
    inner = reinterpret_cast<row*>(take(m.adapter_rank, sizeof(row)));
    scratch = at;
    if (m.quantised) take(1, scratch_bytes(std::max({width, m.heads * m.head_dim, m.intermediate})));
    bytes = at - static_cast<char*>(memory);
  }
};

template <class D, class X>
inline void decoder_layer(Team& team, const SlipModel& m, const SlipLayer& layer, const SlipBatch& b, const AttentionWork& work,
                          const Workspace<D, X>& ws, const SlipLinear& next, float* hidden) {
  const int tokens = b.num_tokens;
  const int q_width = m.heads * m.head_dim;
  const int qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  const SlipAttention a{m.dtype, m.heads, m.kv_heads, m.head_dim, layer.window, 1.0f / std::sqrt(static_cast<float>(m.head_dim)),
                        m.cache_form, 0, layer.k_scales, layer.v_scales};
  const Cache<D> cache{a, b};
  const auto added = [&](SlipMatrix matrix) {
    return Additions<D>{b.adapters, layer.adapters, matrix, ws.inner, static_cast<size_t>(m.adapter_rank)};
  };

  if (layer.embed_norm) {
    for_each(team, tokens, 4, [&](int token) {
      typename X::row* x = ws.x + static_cast<size_t>(token) * 2 * m.hidden;
      std::vector<float> embedding(m.hidden);
      embed_row<D>(m.embed, b.token_ids[token], embedding.data());
      norm_row<X>(embedding.data(), layer.embed_norm, m.hidden, m.norm_eps, x);
      norm_row<X>(hidden + static_cast<size_t>(token) * m.hidden, layer.attn_norm, m.hidden, m.norm_eps, x + m.hidden);
    });
  } else {
    norm_rows<X>(team, hidden, nullptr, layer.attn_norm, tokens, m.hidden, m.norm_eps, ws.x);
  }
  read_ahead(team, layer.out);
  project_adapted<D, X>(team, layer.qkv, added(SLIP_QKV), ws.x, tokens, ws.scratch,
                        StoreRows{ws.qkv, static_cast<size_t>(qkv_width), qkv_width, layer.qkv.bias});

  for_each(team, tokens, 2, [&](int token) {
    const int segment = segment_of(b, token);
    const int position = position_of(b, segment, token);
    const int half = m.head_dim / 2;
    const float* cos = m.rope_cos + static_cast<size_t>(position) * half;
    const float* sin = m.rope_sin + static_cast<size_t>(position) * half;
    float* qkv = ws.qkv + static_cast<size_t>(token) * qkv_width;
    for (int h = 0; h < m.heads; ++h) rotate_head(qkv + h * m.head_dim, m.head_dim, layer.q_norm, m.norm_eps, cos, sin);
    for (int i = 0; i < q_width; i += 16) D::store(ws.q + static_cast<size_t>(token) * q_width + i, vload(qkv + i));
    const int tile = cache.tile(segment, position / 16);
    for (int h = 0; h < m.kv_heads; ++h) {
      float* k = qkv + q_width + h * m.head_dim;
      rotate_head(k, m.head_dim, layer.k_norm, m.norm_eps, cos, sin);
      store_head<D>(cache, layer.k_cache, layer.v_cache, tile, h, position % 16, k, k + m.kv_heads * m.head_dim);
    }
  });
  for_each(team, b.num_mirrors, 4, [&](int i) {
    const int32_t* mirror = b.mirrors + 3 * static_cast<size_t>(i);
    const float* kv = ws.qkv + static_cast<size_t>(mirror[0]) * qkv_width + q_width;
    store_mirror<D>(cache, layer.k_cache, layer.v_cache, mirror, kv, kv + m.kv_heads * m.head_dim);
  });
  attend_all<D>(team, cache, work, ws.q, layer.k_cache, layer.v_cache, ws.values);

  read_ahead(team, layer.gate_up);
  project_adapted<D, X>(team, layer.out, added(SLIP_OUT), ws.values, tokens, ws.scratch,
                        AddRows{hidden, static_cast<size_t>(m.hidden), layer.out.bias});
  norm_rows<X>(team, hidden, nullptr, layer.mlp_norm, tokens, m.hidden, m.norm_eps, ws.x);
  read_ahead(team, layer.down);
  project_adapted<D, X>(team, layer.gate_up, added(SLIP_GATE_UP), ws.x, tokens, ws.scratch,
                        SiluMulRows<X>{ws.act, static_cast<size_t>(m.intermediate), layer.gate_up.bias});
  read_ahead(team, next);
  project_adapted<D, X>(team, layer.down, added(SLIP_DOWN), ws.act, tokens, ws.scratch,
                        AddRows{hidden, static_cast<size_t>(m.hidden), layer.down.bias});
}

template <class D, class X>
inline void forward_as(Team& team, const SlipModel& m, const SlipBatch& b, float* hidden, void* memory) {
  const Workspace<D, X> ws(m, b.num_tokens, memory);
  const SlipAttention shape{.heads = m.heads, .kv_heads = m.kv_heads, .head_dim = m.head_dim, .cache_form = m.cache_form};
  const AttentionWork work(shape, b, team.size());
  const Pass pass(team);
  if (!m.given_hidden)
    for_each(team, b.num_tokens, 8, [&](int token) {
      embed_row<D>(m.embed, b.token_ids[token], hidden + static_cast<size_t>(token) * m.hidden);
    });
  int tap = 0;
  for (int l = 0;; ++l) {
    for (; tap < m.num_taps && m.taps[tap] == l; ++tap)
      for_each(team, b.num_tokens, 32, [&](int token) {
        std::memcpy(m.features + (static_cast<size_t>(token) * m.num_taps + tap) * m.hidden,
                    hidden + static_cast<size_t>(token) * m.hidden, m.hidden * sizeof(float));
      });
    if (l == m.num_layers) break;
    decoder_layer<D, X>(team, m, m.layers[l], b, work, ws, l + 1 < m.num_layers ? m.layers[l + 1].qkv : m.lm_head, hidden);
  }
}

template <class D>
inline void forward(Team& team, const SlipModel& m, const SlipBatch& b, float* hidden, void* memory) {
  if (m.quantised) forward_as<D, F32>(team, m, b, hidden, memory);
  else forward_as<D, D>(team, m, b, hidden, memory);
}

template <class D>
inline int64_t workspace_bytes(const SlipModel& m, int64_t tokens) {
  return m.quantised ? Workspace<D, F32>(m, tokens, nullptr).bytes : Workspace<D, D>(m, tokens, nullptr).bytes;
}

template <class D, class X>
inline void logits_as(Team& team, const SlipModel& m, const float* hidden, const int32_t* rows, int num_rows, float* out,
                      int vocab, void* memory) {
  const Workspace<D, X> ws(m, num_rows, memory);
  const Pass pass(team);
  norm_rows<X>(team, hidden, rows, m.final_norm, num_rows, m.hidden, m.norm_eps, ws.x);
  project<D, X>(team, m.lm_head, ws.x, num_rows, ws.scratch,
                StoreRows{out, static_cast<size_t>(vocab), vocab, m.lm_head.bias});
}

template <class D>
inline void logits(Team& team, const SlipModel& m, const float* hidden, const int32_t* rows, int num_rows, float* out, int vocab,
                   void* memory) {
  if (m.quantised) logits_as<D, F32>(team, m, hidden, rows, num_rows, out, vocab, memory);
  else logits_as<D, D>(team, m, hidden, rows, num_rows, out, vocab, memory);
}

template <class D>
inline void linear(Team& team, const SlipLinear& w, const float* x, int rows, float* out, int ld) {
  const StoreRows store{out, static_cast<size_t>(ld), ld, w.bias};
  if (w.num_parts) {
    std::vector<char> scratch(static_cast<size_t>(rows) * scratch_bytes(w.k));
    const Pass pass(team);
    return project<D, F32>(team, w, x, rows, scratch.data(), store);
  }
  const size_t count = static_cast<size_t>(rows) * w.k, whole = count / 16 * 16;
  std::vector<typename D::row> rounded(count + 16);
  for (size_t i = 0; i < whole; i += 16) D::store(rounded.data() + i, vload(x + i));
  float rest[16] = {};
  std::copy(x + whole, x + count, rest);
  D::store(rounded.data() + whole, vload(rest));
  const Pass pass(team);
  matmul<D>(team, w, rounded.data(), w.k, rows, store);
}

template <class D>
inline void store_kv(Team& team, const SlipAttention& a, const SlipBatch& b, const float* k, const float* v, void* k_cache,
                     void* v_cache) {
  const Cache<D> cache{a, b};
  const size_t width = static_cast<size_t>(a.kv_heads) * a.head_dim;
  const Pass pass(team);
  for_each(team, b.num_tokens, 4, [&](int token) {
    const int segment = segment_of(b, token);
    const int position = position_of(b, segment, token);
    const int tile = cache.tile(segment, position / 16);
    for (int h = 0; h < a.kv_heads; ++h) {
      const size_t from = token * width + static_cast<size_t>(h) * a.head_dim;
      store_head<D>(cache, k_cache, v_cache, tile, h, position % 16, k + from, v + from);
    }
  });
  for_each(team, b.num_mirrors, 4, [&](int i) {
    const int32_t* mirror = b.mirrors + 3 * static_cast<size_t>(i);
    const size_t from = mirror[0] * width;
    store_mirror<D>(cache, k_cache, v_cache, mirror, k + from, v + from);
  });
}

template <class D>
inline void attention(Team& team, const SlipAttention& a, const SlipBatch& b, const float* q, const void* k_cache,
                      const void* v_cache, float* out) {
  const Cache<D> cache{a, b};
  const AttentionWork work(a, b, team.size());
  const Pass pass(team);
  attend_all<D>(team, cache, work, q, k_cache, v_cache, out);
}
