// An exponential race among the tokens of a row. Included once per instruction set, inside its namespace.
//
// Noise is what kernels/random.py says, number for number; here it is made only where it can win. The smallest noise of each
// block of 64 ids bounds that of all of them, so most blocks need nothing else, and at most some 64 tokens of a row, however its
// weight is spread, are expected to need noise of their own once a good token is known.

constexpr int kBlock = 64;    // ids whose smallest noise is drawn together
constexpr float kAhead = 16;   // groups whose largest weight is this part of the largest of all are looked at first
constexpr uint32_t kLeastStream = 1, kAboveStream = 2;
constexpr double kLeastBar = 0x1p-60;  // below, products of bars and bounds might not be normal floats
constexpr float kLess = 1 - 0x1p-22f;  // what is rounded to float is not to be more than it was

// Philox-4x32-10 (Salmon et al. 2011) for 16 places from `first` on: out[word][lane].
inline void philox16(uint64_t key, uint64_t counter, uint32_t stream, uint32_t first, uint32_t (*out)[16]) {
  // Words lie in the low halves of wide lanes; what is in the high ones takes no part.
  constexpr int kLanes = sizeof(wide) / 8, kParts = 16 / kLanes;
  uint64_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = first + i;
  wide c0[kParts], c1[kParts], c2[kParts], c3[kParts];
  for (int i = 0; i < kParts; ++i)
    c0[i] = wset1(counter), c1[i] = wset1(counter >> 32), c2[i] = wset1(stream), c3[i] = wload(lanes + i * kLanes);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < kParts; ++i) {
      const wide p0 = wproduct(wset1(0xD2511F53u), c0[i]), p1 = wproduct(wset1(0xCD9E8D57u), c2[i]);
      c0[i] = wxor(wxor(whigh(p1), c1[i]), wset1(k0));
      c1[i] = p1;
      c2[i] = wxor(wxor(whigh(p0), c3[i]), wset1(k1));
      c3[i] = p0;
    }
  const wide* const words[4] = {c0, c1, c2, c3};
  for (int word = 0; word < 4; ++word) {
    for (int i = 0; i < kParts; ++i) wstore(lanes + i * kLanes, words[word][i]);
    for (int i = 0; i < 16; ++i) out[word][i] = static_cast<uint32_t>(lanes[i]);
  }
}

inline uint32_t philox_word(uint64_t key, uint64_t counter, uint32_t stream, uint32_t place, int word) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = place;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  return words[word];
}

// The noise of one row's tokens.
struct Noise {
  uint64_t seed, index;
  std::vector<uint32_t> words[4];  // of each block: what its smallest noise is made of
  std::vector<float> bounds;       // of each block: no noise in it is smaller
  int at_block;                    // the block whose smallest noise is at hand
  double smallest;

  void begin(uint64_t its_seed, uint64_t its_index, int blocks) {
    seed = its_seed, index = its_index, at_block = -1;
    const int width = (blocks + 15) / 16 * 16;
    bounds.resize(width);
    for (auto& word : words) word.resize(width);
    for (int block = 0; block < width; block += 16) {
      uint32_t made[4][16];
      philox16(seed, index, kLeastStream, block, made);
      for (int i = 0; i < 4; ++i) std::memcpy(words[i].data() + block, made[i], sizeof made[i]);
      // -log(1 - x) is more than x, which is more than its first bits.
      for (int i = 0; i < 16; ++i) bounds[block + i] = static_cast<float>(static_cast<int32_t>(made[0][i] >> 8)) * (0x1p-24f / kBlock);
    }
  }

  // Whether a token of this weight scores more than `bar`, and its score.
  bool exceeds(float bar, int token, float weight, double* score) {
    const int block = token / kBlock, place = token % kBlock;
    if (block != at_block) {
      const uint64_t bits = (static_cast<uint64_t>(words[0][block]) << 32 | words[1][block]) >> 12;
      smallest = -std::log(1.0 - (static_cast<double>(bits) + 0.5) * 0x1p-52) / kBlock;
      at_block = block;
    }
    double noise = smallest;
    if (place != static_cast<int>(words[2][block] % kBlock)) {
      const uint32_t word = philox_word(seed, index, kAboveStream, block * 16 + place % 16, place / 16);
      const double share = (word + 0.5) * 0x1p-32;
      if (weight < bar * (smallest + share)) return false;  // -log(1 - x) is more than x
      noise -= std::log(1.0 - share);
    }
    *score = weight / noise;
    return *score > bar;
  }
};

// The best of a race so far, best first; of equal scores the first place.
struct Podium {
  int count;
  int32_t* places;
  double* scores;
  float bar = 0;  // what a score has to exceed

  void take(int32_t place, double score) {
    int rank = count;
    while (rank > 0 && (score > scores[rank - 1] || (score == scores[rank - 1] && place < places[rank - 1]))) --rank;
    if (rank == count) return;
    for (int i = count - 1; i > rank; --i) places[i] = places[i - 1], scores[i] = scores[i - 1];
    places[rank] = place, scores[rank] = score;
    const double last = scores[count - 1];
    bar = last > kLeastBar ? static_cast<float>(last) * kLess : 0;
  }
};

// The largest of each group of 64 weights, or less than 0 for a group without weight.
inline void group_maxima(const float* weights, int n, float* largest) {
  for (int group = 0; group * kBlock < n; ++group) {
    const float* x = weights + group * kBlock;
    const int size = std::min(n - group * kBlock, kBlock);
    vec best = vzero();
    int i = 0;
    for (; i + 16 <= size; i += 16) best = vmax(vload(x + i), best);
    float top = vmaximum(best);
    for (; i < size; ++i) top = x[i] > top ? x[i] : top;
    largest[group] = top > 0 ? top : -1;
  }
}

// Runs the race of one row; ids that are not given are the places.
inline void race_row(const float* weights, int n, const int32_t* ids, Noise& noise, std::vector<float>& largest, Podium& podium) {
  const int groups = (n + kBlock - 1) / kBlock;
  largest.resize(groups);
  group_maxima(weights, n, largest.data());
  const float* bounds = noise.bounds.data();
  const float least = ids ? *std::min_element(noise.bounds.begin(), noise.bounds.end()) : 0;
  auto run = [&](int group) {
    const int begin = group * kBlock, end = std::min(begin + kBlock, n);
    for (int place = begin; place < end; ++place) {
      const int token = ids ? ids[place] : place;
      double score;
      if (weights[place] > podium.bar * bounds[token / kBlock] && noise.exceeds(podium.bar, token, weights[place], &score))
        podium.take(place, score);
    }
    largest[group] = -1;
  };
  // Groups with large weights come first: what they give passes most of the others.
  const float large = *std::max_element(largest.begin(), largest.end()) / kAhead;
  for (int group = 0; group < groups; ++group)
    if (largest[group] >= large && largest[group] > podium.bar * (ids ? least : bounds[group])) run(group);
  for (int group = 0; group < groups; ++group)
    if (largest[group] > podium.bar * (ids ? least : bounds[group])) run(group);
}

inline void race(Team& team, const float* weights, int rows, int n, const uint64_t* seeds, const uint64_t* indices,
                 const int32_t* ids, int count, int32_t* places, float* scores) {
  const int last = ids && n ? *std::max_element(ids, ids + n) : n - 1;
  const Pass pass(team);
  team.parallel(rows, [&](int row) {
    thread_local Noise noise;
    thread_local std::vector<float> largest;
    thread_local std::vector<double> best;
    best.assign(count, 0);
    int32_t* mine = places + static_cast<size_t>(row) * count;
    std::fill_n(mine, count, -1);
    noise.begin(seeds[row], indices[row], last / kBlock + 1);
    Podium podium{count, mine, best.data()};
    race_row(weights + static_cast<size_t>(row) * n, n, ids, noise, largest, podium);
    for (int i = 0; i < count; ++i) scores[static_cast<size_t>(row) * count + i] = static_cast<float>(best[i]);
  });
}
