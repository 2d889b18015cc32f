// Choosing tokens from logits. Included once per instruction set, inside its namespace.

constexpr int32_t kNothing = -2;

// Index of the first largest of x[0 … n-1]; -1 if the largest is not finite or anything is not a number, but kNothing if all are
// -infinity.
inline int32_t argmax_row(const float* x, int n) {
  vec best = vset1(-INFINITY);
  unsigned broken = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const vec v = vload(x + i);
    best = vmax(v, best);
    broken |= vnan(v);
  }
  float top = vmaximum(best);
  for (int j = i; j < n; ++j) {
    top = x[j] > top ? x[j] : top;
    broken |= x[j] != x[j];
  }
  if (broken || !std::isfinite(top)) return !broken && top < 0 ? kNothing : -1;
  const vec wanted = vset1(top);
  for (int j = 0; j < i; j += 16)
    if (const unsigned found = vequal(vload(x + j), wanted)) return j + __builtin_ctz(found);
  while (x[i] != top) ++i;
  return i;
}

// e^(x[at]) over the sum of e^x[0 … n-1], where x[at] is the largest.
inline float share_of_largest(const float* x, int n, int at) {
  const vec top = vset1(x[at]);
  vec sum = vzero();
  int i = 0;
  for (; i + 16 <= n; i += 16) sum = vadd(sum, vexp(vsub(vload(x + i), top)));
  float total = vsum(sum);
  for (; i < n; ++i) total += std::exp(x[i] - x[at]);
  return 1.0f / total;
}

inline void argmax(Team& team, const float* logits, int rows, int n, int32_t* out, float* likely) {
  const Pass pass(team);
  team.parallel(rows, [&](int row) {
    const float* x = logits + static_cast<size_t>(row) * n;
    out[row] = argmax_row(x, n);
    if (likely) likely[row] = out[row] < 0 ? 0.0f : share_of_largest(x, n, out[row]);
  });
}

// The `count` largest of x[0 … n-1], largest first, of equals the first; `values` and `at` have room for them. At most n.
inline void largest(const float* x, int n, int count, float* values, int32_t* at) {
  int kept = 0;
  const auto insert = [&](int i) {  // behind those that are as large
    int place = kept < count ? kept++ : count - 1;
    for (; place > 0 && values[place - 1] < x[i]; --place) {
      values[place] = values[place - 1];
      at[place] = at[place - 1];
    }
    values[place] = x[i];
    at[place] = i;
  };
  int i = 0;
  for (; i < n && kept < count; ++i) insert(i);
  for (; i < n && i % 16; ++i)
    if (x[i] > values[count - 1]) insert(i);
  for (; i + 16 <= n; i += 16)
    for (unsigned found = vatleast(vload(x + i), vset1(values[count - 1])); found; found &= found - 1)
      if (const int j = i + __builtin_ctz(found); x[j] > values[count - 1]) insert(j);
  for (; i < n; ++i)
    if (x[i] > values[count - 1]) insert(i);
}

// How many of x[0 … n-1] are larger than `value`.
inline int number_above(const float* x, int n, float value) {
  const vec v = vset1(value);
  int count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const vec here = vload(x + i);
    count += __builtin_popcount(vatleast(here, v)) - __builtin_popcount(vequal(here, v));
  }
  for (; i < n; ++i) count += x[i] > value;
  return count;
}

// Log-probabilities at temperature 1, see kernels/ops.py: of tokens[row], with its rank, and of the `count` most likely.
inline void log_probabilities(Team& team, const float* logits, int rows, int n, const int32_t* tokens, int count, float* own,
                              int32_t* ranks, int32_t* top_tokens, float* top) {
  const Pass pass(team);
  team.parallel(rows, [&](int row) {
    const float* x = logits + static_cast<size_t>(row) * n;
    int32_t* best = top_tokens + static_cast<size_t>(row) * count;
    float* values = top + static_cast<size_t>(row) * count;
    const int token = tokens[row], first = argmax_row(x, n), there = std::min(count, n);
    for (int i = 0; i < count; ++i) {
      best[i] = -1;
      values[i] = first < 0 ? NAN : -INFINITY;
    }
    if (first < 0) {
      ranks[row] = token >= 0;
      own[row] = NAN;
      return;
    }
    const float sum = x[first] - std::log(share_of_largest(x, n, first));
    own[row] = token < 0 ? -INFINITY : x[token] - sum;
    ranks[row] = token < 0 ? 0 : 1 + number_above(x, n, x[token]);
    if (there) largest(x, n, there, values, best);
    for (int i = 0; i < there; ++i) values[i] -= sum;
  });
}

// Floats in order as integers, so that a search can halve the distance between any two of them.
inline uint32_t order_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float float_at(uint32_t order) {
  return __builtin_bit_cast(float, order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

struct Above {
  int count;
  float mass;
};

// How many of x[0 … n-1] are at least `border`, and their sum. n is a multiple of 16.
inline Above above(const float* x, int n, float border) {
  const vec b = vset1(border);
  int count = 0;
  vec mass = vzero();
  for (int i = 0; i < n; i += 16) {
    const vec v = vload(x + i);
    count += __builtin_popcount(vatleast(v, b));
    mass = vadd(mass, vkeep_atleast(v, b));
  }
  return {count, vsum(mass)};
}

// The largest border for which enough(above(border)) holds, or a smaller one that keeps the same values.
// enough() must hold for `low` and, once it holds, for everything below.
template <class Enough>
inline float search_border(const float* x, int n, float low, float high, const Enough& enough) {
  Above at_low = above(x, n, low);
  Above at_high = above(x, n, high);
  if (enough(at_high)) return high;
  uint32_t lo = order_of(low), hi = order_of(high);
  while (hi - lo > 1 && at_low.count - at_high.count > 1) {
    const uint32_t middle = lo + (hi - lo) / 2;
    const Above here = above(x, n, float_at(middle));
    if (enough(here)) {
      lo = middle;
      at_low = here;
    } else {
      hi = middle;
      at_high = here;
    }
  }
  return float_at(lo);
}

// Turns logits x[0 … n-1] into weights proportional to the probabilities a token is drawn with; the largest is 1.
// `padded` is scratch of n rounded up to 16 floats.
inline void distribution_row(float* x, int n, float temperature, int top_k, float min_p, float top_p, float* padded) {
  const int width = (n + 15) / 16 * 16;
  std::memcpy(padded, x, n * sizeof(float));
  for (int i = n; i < width; ++i) padded[i] = -INFINITY;
  vec best = vset1(-INFINITY);
  for (int i = 0; i < width; i += 16) best = vmax(vload(padded + i), best);
  const float top = vmaximum(best);
  float border = -INFINITY;
  if (top_k > 0 && top_k < n)
    border = search_border(padded, width, -std::numeric_limits<float>::max(), top,
                           [&](const Above& a) { return a.count >= top_k; });
  // Masked tokens have weight 0 like those too unlikely for a float.
  const vec inverse = vset1(1.0f / temperature);
  for (int i = 0; i < width; i += 16) {
    const vec v = vload(padded + i);
    const vec w = vexp(vmul(vsub(v, vset1(top)), inverse));
    alignas(64) float lanes[16];
    vstore(lanes, w);
    if (const unsigned kept = vatleast(v, vset1(border)); kept != 0xffff)
      for (int lane = 0; lane < 16; ++lane)
        if (!(kept >> lane & 1)) lanes[lane] = 0.0f;
    vstore(padded + i, vload(lanes));
  }
  float least = std::max(min_p, std::numeric_limits<float>::min());
  if (top_p < 1.0f) {
    const float wanted = above(padded, width, least).mass * top_p;
    least = search_border(padded, width, least, 1.0f, [&](const Above& a) { return a.mass >= wanted; });
  }
  for (int i = 0; i < width; i += 16) vstore(padded + i, vkeep_atleast(vload(padded + i), vset1(least)));
  std::memcpy(x, padded, n * sizeof(float));
}

inline void distribution(Team& team, float* x, int rows, int n, const float* temperature, const int32_t* top_k, const float* min_p,
                         const float* top_p) {
  const Pass pass(team);
  team.parallel(rows, [&](int row) {
    thread_local std::vector<float> padded;
    padded.resize(n + 16);
    distribution_row(x + static_cast<size_t>(row) * n, n, temperature[row], top_k[row], min_p[row], top_p[row], padded.data());
  });
}
