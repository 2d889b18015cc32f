// Makes the calls that recording.py wrote down, with every variant that this processor runs: compares what they write with what
// the tests found right, and looks whether results depend on what they must not depend on.
//
//   replay FILE [VARIANT …]
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "bf16.h"

namespace {

enum Kind : int32_t { kRead = -1, kExact, kFloat, kHalf, kWeights };

struct Memory {  // begins at a multiple of 64 bytes, as the kernels are promised
  explicit Memory(size_t size) : bytes(static_cast<char*>(std::aligned_alloc(64, (size + 127) / 64 * 64)), std::free) {}
  std::unique_ptr<char, decltype(&std::free)> bytes;
};

struct Blob {
  uint64_t size;
  Kind kind;
  float tolerance;
  uint32_t row;
  std::vector<char> before, after;
};
struct Pointer {
  uint32_t blob;
  uint64_t offset;
  uint32_t target;
  uint64_t target_offset;
};
struct Argument {
  uint32_t kind;
  int64_t value, rest;
};
struct Call {
  std::string name, test;
  std::vector<Blob> blobs;
  std::vector<Pointer> pointers;
  std::vector<Argument> arguments;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) std::perror(path), std::exit(2);
  }
  bool read(Call& call) {
    uint32_t length;
    if (std::fread(&length, 1, 4, file_) != 4) return false;
    call = {};
    call.name = text(length);
    call.test = text(take<uint32_t>());
    call.blobs.resize(take<uint32_t>());
    for (Blob& blob : call.blobs) {
      blob.size = take<uint64_t>();
      blob.kind = static_cast<Kind>(take<int32_t>());
      blob.tolerance = take<float>();
      blob.row = take<uint32_t>();
      blob.before = bytes(blob.size);
      if (blob.kind != kRead) blob.after = bytes(blob.size);
    }
    call.pointers.resize(take<uint32_t>());
    for (Pointer& p : call.pointers) p = {take<uint32_t>(), take<uint64_t>(), take<uint32_t>(), take<uint64_t>()};
    call.arguments.resize(take<uint32_t>());
    for (Argument& a : call.arguments) a = {take<uint32_t>(), take<int64_t>(), take<int64_t>()};
    return true;
  }

 private:
  template <class T>
  T take() {
    T value;
    get(&value, sizeof value);
    return value;
  }
  std::string text(uint32_t length) {
    const std::vector<char> read = bytes(length);
    return {read.begin(), read.end()};
  }
  std::vector<char> bytes(size_t size) {
    std::vector<char> read(size);
    get(read.data(), size);
    return read;
  }
  void get(void* at, size_t size) {
    if (size && std::fread(at, 1, size, file_) != size) std::fprintf(stderr, "the file ends too early\n"), std::exit(2);
  }
  std::FILE* file_;
};

// A call with memory of its own, in the state before it.
class Made {
 public:
  explicit Made(const Call& call) : call_(call) {
    for (const Blob& blob : call.blobs) {
      memory_.emplace_back(blob.size);
      std::memcpy(at(memory_.size() - 1), blob.before.data(), blob.size);
    }
    for (const Pointer& p : call.pointers) {
      char* target = at(p.target) + p.target_offset;
      std::memcpy(at(p.blob) + p.offset, &target, sizeof target);
    }
  }
  char* at(size_t blob) const { return memory_[blob].bytes.get(); }
  int64_t number(size_t argument) const { return call_.arguments[argument].value; }
  template <class T>
  T* pointer(size_t argument) const {
    const Argument& a = call_.arguments[argument];
    return a.kind == 1 ? reinterpret_cast<T*>(at(a.value)) : nullptr;
  }
  void* workspace(const SlipModel* model, int64_t tokens) {
    memory_.emplace_back(slip_workspace_bytes(model, tokens));
    return memory_.back().bytes.get();
  }

 private:
  const Call& call_;
  std::vector<Memory> memory_;
};

using Rows = std::vector<char>;

Rows row_bytes(const void* from, size_t row, size_t row_size) {
  const char* at = static_cast<const char*>(from) + row * row_size;
  return {at, at + row_size};
}

// A batch of tokens begin … end - 1 of one segment of another batch, after the ones before them.
struct Part {
  int32_t q_start[2], kv_len[1], row[1];
  SlipBatch batch;
  Part(const SlipBatch& b, int segment, int begin, int end) : batch(b) {
    q_start[0] = 0, q_start[1] = end - begin;
    kv_len[0] = b.kv_len[segment] - (b.q_start[segment + 1] - end);
    row[0] = b.table_row[segment];
    batch.num_tokens = end - begin, batch.num_segments = 1, batch.num_mirrors = 0;
    batch.token_ids = b.token_ids + begin;
    batch.q_start = q_start, batch.kv_len = kv_len, batch.table_row = row;
  }
};

// How each function is called, and what of its results must not change: `alone` gets a fresh copy of the call's memory, the memory
// after the call as it was recorded, and a function that is told of bytes that should be equal.
using Same = std::function<void(const void*, const void*, size_t)>;
struct Function {
  void (*call)(Made&);
  void (*alone)(const Call&, const Made&, const Same&);
};

void call_linear(Made& m) {
  slip_linear(m.number(0), m.pointer<SlipLinear>(1), m.pointer<float>(2), m.number(3), m.pointer<float>(4), m.number(5));
}
void linear_alone(const Call&, const Made& m, const Same& same) {
  const auto* w = m.pointer<SlipLinear>(1);
  const int64_t ld = m.number(5);
  std::vector<float> out(ld);
  for (int64_t row = 0; row < m.number(3); ++row) {
    slip_linear(m.number(0), w, m.pointer<float>(2) + row * w->k, 1, out.data(), ld);
    same(out.data(), m.pointer<float>(4) + row * ld, ld * sizeof(float));
  }
}
void call_store_kv(Made& m) {
  slip_store_kv(m.pointer<SlipAttention>(0), m.pointer<SlipBatch>(1), m.pointer<float>(2), m.pointer<float>(3),
                m.pointer<void>(4), m.pointer<void>(5));
}
void call_attention(Made& m) {
  slip_attention(m.pointer<SlipAttention>(0), m.pointer<SlipBatch>(1), m.pointer<float>(2), m.pointer<void>(3),
                 m.pointer<void>(4), m.pointer<float>(5));
}
void attention_alone(const Call&, const Made& m, const Same& same) {
  const auto* a = m.pointer<SlipAttention>(0);
  const auto& b = *m.pointer<SlipBatch>(1);
  const int64_t width = static_cast<int64_t>(a->heads) * a->head_dim;
  std::vector<float> out(width);
  for (int s = 0; s < b.num_segments; ++s)
    for (int token = b.q_start[s]; token < b.q_start[s + 1]; token += 1 + token % 5) {
      const Part part(b, s, token, token + 1);
      slip_attention(a, &part.batch, m.pointer<float>(2) + token * width, m.pointer<void>(3), m.pointer<void>(4), out.data());
      same(out.data(), m.pointer<float>(5) + token * width, width * sizeof(float));
    }
}
void call_forward(Made& m) {
  const auto* model = m.pointer<SlipModel>(0);
  slip_forward(model, m.pointer<SlipBatch>(1), m.pointer<float>(2), m.workspace(model, m.number(3)));
}
// Each segment alone, in two steps.
void forward_alone(const Call& call, const Made& together, const Same& same) {
  if (together.pointer<SlipBatch>(1)->num_mirrors) return;
  Made m(call);
  SlipModel model = *m.pointer<SlipModel>(0);
  model.num_taps = 0;
  const auto& b = *m.pointer<SlipBatch>(1);
  for (int s = 0; s < b.num_segments; ++s) {
    const int begin = b.q_start[s], end = b.q_start[s + 1], middle = begin + (end - begin + 1) / 2;
    for (const auto& [from, to] : {std::pair(begin, middle), std::pair(middle, end)}) {
      if (from == to) continue;
      const Part part(b, s, from, to);
      float* hidden = m.pointer<float>(2) + static_cast<int64_t>(from) * model.hidden;
      slip_forward(&model, &part.batch, hidden, m.workspace(&model, to - from));
      same(hidden, together.pointer<float>(2) + static_cast<int64_t>(from) * model.hidden,
           static_cast<size_t>(to - from) * model.hidden * sizeof(float));
    }
  }
}
void call_logits(Made& m) {
  const auto* model = m.pointer<SlipModel>(0);
  slip_logits(model, m.pointer<float>(1), m.pointer<int32_t>(2), m.number(3), m.pointer<float>(4), m.number(5),
              m.workspace(model, m.number(6)));
}
void logits_alone(const Call& call, const Made& together, const Same& same) {
  Made m(call);
  const auto* model = m.pointer<SlipModel>(0);
  const int64_t vocab = m.number(5);
  std::vector<float> out(vocab);
  for (int64_t row = 0; row < m.number(3); ++row) {
    slip_logits(model, m.pointer<float>(1), m.pointer<int32_t>(2) + row, 1, out.data(), vocab, m.workspace(model, 1));
    same(out.data(), together.pointer<float>(4) + row * vocab, vocab * sizeof(float));
  }
}
void call_argmax(Made& m) {
  slip_argmax(m.pointer<float>(0), m.number(1), m.number(2), m.pointer<int32_t>(3), m.pointer<float>(4));
}
void call_distribution(Made& m) {
  slip_distribution(m.pointer<float>(0), m.number(1), m.number(2), m.pointer<float>(3), m.pointer<int32_t>(4), m.pointer<float>(5),
                    m.pointer<float>(6));
}
void call_race(Made& m) {
  slip_race(m.pointer<float>(0), m.number(1), m.number(2), m.pointer<uint64_t>(3), m.pointer<uint64_t>(4), m.pointer<int32_t>(5),
            m.number(6), m.pointer<int32_t>(7), m.pointer<float>(8));
}

const std::map<std::string, Function> kFunctions = {
    {"slip_linear", {call_linear, linear_alone}},       {"slip_store_kv", {call_store_kv, nullptr}},
    {"slip_attention", {call_attention, attention_alone}}, {"slip_forward", {call_forward, forward_alone}},
    {"slip_logits", {call_logits, logits_alone}},       {"slip_argmax", {call_argmax, nullptr}},
    {"slip_distribution", {call_distribution, nullptr}}, {"slip_race", {call_race, nullptr}},
};

float number_at(const char* at, const Blob& blob, size_t i) {
  if (blob.kind == kHalf) {
    uint16_t bits;
    std::memcpy(&bits, at + 2 * i, 2);
    return slip::bf16_to_float(bits);
  }
  float x;
  std::memcpy(&x, at + 4 * i, 4);
  return x;
}

// The largest difference relative to the largest expected number; infinite where one is no number and the other is.
double difference(const Blob& blob, const char* found) {
  if (blob.kind == kExact) return std::memcmp(found, blob.after.data(), blob.size) ? INFINITY : 0.0;
  const size_t count = blob.size / (blob.kind == kHalf ? 2 : 4);
  double largest = 1e-30, worst = 0.0;
  for (size_t i = 0; i < count; ++i) {
    const double x = std::fabs(number_at(blob.after.data(), blob, i));
    if (std::isfinite(x)) largest = std::max(largest, x);
  }
  uint32_t spared = 0;
  for (size_t i = 0; i < count; ++i) {
    if (blob.kind == kWeights && i % blob.row == 0) spared = 1;
    const double x = number_at(found, blob, i), y = number_at(blob.after.data(), blob, i);
    if (std::memcmp(&x, &y, sizeof x) == 0 || (std::isnan(x) && std::isnan(y))) continue;
    if (blob.kind == kWeights && spared && (x == 0) != (y == 0)) {
      --spared;
      continue;
    }
    const double apart = std::fabs(x - y);
    worst = std::max(worst, std::isfinite(apart) ? apart / largest : INFINITY);
  }
  return worst;
}

struct Tally {
  int calls = 0, checks = 0, failures = 0;
  double worst = 0.0;
};

bool replay(const Call& call, Tally& tally) {
  const Function& function = kFunctions.at(call.name);
  bool good = true;
  const auto fail = [&](const std::string& why) {
    if (good) std::printf("FAILED %s by %s: %s\n", call.name.c_str(), call.test.c_str(), why.c_str());
    good = false;
  };
  slip_set_threads(2);
  Made first(call);
  function.call(first);
  for (size_t i = 0; i < call.blobs.size(); ++i) {
    const Blob& blob = call.blobs[i];
    if (blob.kind == kRead) continue;
    const double apart = difference(blob, first.at(i));
    if (std::isfinite(apart)) tally.worst = std::max(tally.worst, apart);
    if (!(apart <= blob.tolerance))
      fail("memory " + std::to_string(i) + " differs by " + std::to_string(apart) + ", more than " + std::to_string(blob.tolerance));
  }
  for (const int threads : {1, 3}) {
    slip_set_threads(threads);
    Made again(call);
    function.call(again);
    for (size_t i = 0; i < call.blobs.size(); ++i) {
      if (call.blobs[i].kind == kRead) continue;
      ++tally.checks;
      if (std::memcmp(again.at(i), first.at(i), call.blobs[i].size)) fail("other bits with " + std::to_string(threads) + " threads");
    }
  }
  slip_set_threads(1);
  if (function.alone)
    function.alone(call, first, [&](const void* x, const void* y, size_t size) {
      ++tally.checks;
      if (std::memcmp(x, y, size)) fail("other bits alone than in the batch");
    });
  ++tally.calls;
  tally.failures += !good;
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return std::fprintf(stderr, "replay FILE [VARIANT …]\n"), 2;
  const char* chosen = slip_init(2);
  if (!chosen) return std::fprintf(stderr, "this processor runs none of the variants\n"), 2;
  std::printf("chosen: %s\n", chosen);
  std::vector<std::string> variants(arguments + 2, arguments + count);
  int32_t runs;
  if (variants.empty())
    for (int i = 0; const char* name = slip_variant(i, &runs); ++i)
      if (runs) variants.push_back(name);
  int passed = 0, failed = 0;
  for (const std::string& variant : variants) {
    if (slip_select(variant.c_str())) return std::fprintf(stderr, "%s does not run here\n", variant.c_str()), 2;
    std::map<std::string, Tally> tallies;
    Reader reader(arguments[1]);
    for (Call call; reader.read(call);) (replay(call, tallies[call.name]) ? passed : failed) += 1;
    for (const auto& [name, tally] : tallies)
      std::printf("%-10s %-18s %5d calls, largest difference %.1e, %6d times the same bits alone and on other threads, %d failed\n",
                  variant.c_str(), name.c_str(), tally.calls, tally.worst, tally.checks, tally.failures);
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
