// Draft tokens one behind the other, without the interpreter in between: a token takes less time than what it would have to do.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "api.h"

namespace {

// What the next token of some sequences is drawn with.
struct Race {
  std::vector<float> temperature, min_p, top_p, scores;
  std::vector<int32_t> top_k, places;
  std::vector<uint64_t> seeds, indices;

  // Draws the column and the probability of each; `x` [count, columns] are their logits, and overwritten.
  void run(const SlipChains& c, const int32_t* sequences, int count, int depth, float* x, int32_t* columns, double* likely) {
    const auto take = [&](auto& into, const auto* from) {
      into.clear();
      for (int i = 0; i < count; ++i) into.push_back(from[sequences[i]]);
    };
    take(temperature, c.temperature);
    take(top_k, c.top_k);
    take(min_p, c.min_p);
    take(top_p, c.top_p);
    take(seeds, c.seeds);
    take(indices, c.indices);
    for (auto& index : indices) index += depth;
    places.resize(static_cast<size_t>(count) * c.runners);
    scores.resize(places.size());
    slip_distribution(x, count, c.columns, temperature.data(), top_k.data(), min_p.data(), top_p.data());
    slip_race(x, count, c.columns, seeds.data(), indices.data(), c.vocabulary, c.runners, places.data(), scores.data());
    for (int i = 0; i < count; ++i) {
      const float* mine = scores.data() + static_cast<size_t>(i) * c.runners;
      double sum = 0;
      for (int j = 0; j < c.runners; ++j) sum += std::pow(static_cast<double>(mine[j]), c.sharpness);
      columns[i] = places[static_cast<size_t>(i) * c.runners];
      likely[i] = std::pow(static_cast<double>(mine[0]), c.sharpness) / std::max(sum, std::numeric_limits<double>::min());
    }
  }
};

void most_likely(const SlipChains& c, int count, const float* x, int32_t* columns, double* likely) {
  std::vector<float> found(count);
  slip_argmax(x, count, c.columns, columns, found.data());
  std::copy(found.begin(), found.end(), likely);
}

}  // namespace

extern "C" void slip_draft(const SlipModel* m, const SlipBatch* b, const SlipChains* c, float* hidden, float* logits,
                           void* workspace) {
  const int all = b->num_segments;
  // `going` are the sequences whose chains go on, in the order of rows of hidden.
  std::vector<int32_t> going(all), order(all + 1), columns(all), ids(all), ends(all), tables(all);
  std::vector<double> likely(all), chance(all, 1.0);
  std::iota(going.begin(), going.end(), 0);
  std::iota(order.begin(), order.end(), 0);
  std::fill(c->counts, c->counts + all, 0);
  Race race;
  for (int depth = 0, count = all; count > 0; ++depth) {
    slip_logits(m, hidden, order.data(), count, logits, c->columns, workspace);
    for (int begin = 0, end; begin < count; begin = end) {
      const bool races = c->temperature[going[begin]] > 0;
      for (end = begin + 1; end < count && (c->temperature[going[end]] > 0) == races;) ++end;
      float* x = logits + static_cast<size_t>(begin) * c->columns;
      if (races) race.run(*c, going.data() + begin, end - begin, depth, x, columns.data() + begin, likely.data() + begin);
      else most_likely(*c, end - begin, x, columns.data() + begin, likely.data() + begin);
    }
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const int sequence = going[i], start = b->kv_len[sequence];
      if (!(likely[i] > 0)) continue;
      const int32_t token = c->vocabulary ? c->vocabulary[columns[i]] : columns[i];
      const size_t at = static_cast<size_t>(sequence) * c->depth + depth;
      c->tokens[at] = token, c->likely[at] = likely[i], c->counts[sequence] = depth + 1;
      chance[sequence] *= likely[i];
      if (depth + 1 >= c->most[sequence] || chance[sequence] < c->stop_below || start + depth >= c->mapped[sequence]) continue;
      if (kept != i) std::memcpy(hidden + static_cast<size_t>(kept) * m->hidden, hidden + static_cast<size_t>(i) * m->hidden,
                                 m->hidden * sizeof(float));
      ids[kept] = token, ends[kept] = start + depth + 1, tables[kept] = b->table_row[sequence], going[kept] = sequence;
      ++kept;
    }
    count = kept;
    if (!count) break;
    SlipBatch next = *b;
    next.num_tokens = next.num_segments = count;
    next.token_ids = ids.data(), next.q_start = order.data(), next.kv_len = ends.data(), next.table_row = tables.data();
    slip_forward(m, &next, hidden, workspace);
  }
}
