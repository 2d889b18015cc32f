// The C interface of the native CPU kernels, loaded with ctypes (see native/library.py for the Python twin).
//
// Layouts. A "panel" is 16 output columns of a matrix, interleaved so that one 16-lane vector holds the 16 columns
// at one step along the reduction: bfloat16 [k/2][16][2] (pairs along k, what a bf16 dot product wants), float32
// [k][16]. Weights are panels of rows of the [n, k] matrix, four of them interleaved step by step, so that what is read
// together lies together; the K cache of 16 tokens is a panel per KV head (columns = tokens, reduction = head_dim); the V
// cache of 16 tokens is head_dim/16 panels per KV head (columns = head_dim, reduction = tokens). One micro-kernel
// therefore serves linear layers, scores and weighted values. Keys and values of 8 bits lie as those of the dtype would, byte by
// byte, and their scales apart.
//
// Row results do not depend on the other rows: every output element is reduced over k in one fixed sequence.
#pragma once
#include <cstdint>

extern "C" {

enum SlipDtype : int32_t { SLIP_F32 = 0, SLIP_BF16 = 1, SLIP_BYTES = 2 };  // the last is for slip_multiply only

// Panels of a matrix that are quantised in one form (forms.h).
struct SlipPart {
  int32_t form;
  int32_t first_panel;  // of the matrix
  int32_t panels;
  int32_t reserved;
  const void* data;     // begins at a multiple of 64 bytes
};

// How a quantised matrix is computed: with its numbers widened to float32; or with the inputs quantised by blocks of 32, to one byte
// or to two; or with its numbers and the inputs rounded to bfloat16, in a model that is computed in bfloat16.
enum SlipArithmetic : int32_t { SLIP_EXACT = 0, SLIP_INT8 = 1, SLIP_INT16 = 2, SLIP_ROUNDED = 3 };

// y = x W^T + bias with W [n, k]; n and k are the padded sizes (n to 16, k to 2), out_n the real number of columns.
// It is either in the model's dtype, and has panels, or quantised, and has parts, each of whole panels and ascending.
struct SlipLinear {
  int32_t n;
  int32_t k;
  const void* panels;  // [n/64][k/2][4][16][2] bf16 or [n/64][k][4][16] f32, the last group filled up
  const float* bias;   // [n] or null
  const SlipPart* parts;
  int32_t num_parts;
  int32_t arithmetic;
};

// How keys and values are kept: in the model's dtype; or in 8 bits, divided by a bfloat16 for each token and KV head, as whole
// numbers from -127 to 127 or as e4m3 (Micikevicius et al. 2022).
enum SlipCacheForm : int32_t { SLIP_CACHE_PLAIN = 0, SLIP_CACHE_INT8 = 1, SLIP_CACHE_FP8 = 2 };

enum SlipMatrix : int32_t { SLIP_QKV = 0, SLIP_OUT = 1, SLIP_GATE_UP = 2, SLIP_DOWN = 3 };

// What an adapter adds to the matrices of a layer: x A^T B^T.
struct SlipAdapter {
  SlipLinear down[4];        // A of each matrix, in the model's dtype; n = 0: it adds nothing there
  const void* up[4];         // B of the same dtype, a panel of rank[4] steps for each of the matrix
  const int32_t* begins[4];  // for each panel, where of x A^T the numbers begin that it reads; -1: nothing is added to it
  int32_t rank[4];           // how many these are
};

struct SlipLayer {
  SlipLinear qkv;      // q heads, then k heads, then v heads
  SlipLinear out;
  SlipLinear gate_up;  // panels alternate: gate, up, gate, up, …
  SlipLinear down;
  const float* attn_norm;  // [hidden] or null: qkv reads the hidden state as it is
  const float* embed_norm;  // [hidden] or null. If set, qkv reads [embedding of the token, hidden], each normalised
  const float* mlp_norm;   // [hidden]
  const float* q_norm;     // [head_dim] or null
  const float* k_norm;     // [head_dim] or null
  void* k_cache;           // [tiles][kv_heads][head_dim * 16] of the dtype, or bytes
  void* v_cache;
  uint16_t* k_scales;      // [tiles][kv_heads][16] bfloat16 of tokens kept in 8 bits, else null
  uint16_t* v_scales;
  int32_t window;          // attend to the last `window` tokens; 0 = all
  int32_t reserved;
  const SlipAdapter* adapters;
};

struct SlipModel {
  int32_t dtype;
  int32_t hidden;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t intermediate;
  int32_t num_layers;
  float norm_eps;
  const float* rope_cos;  // [max_positions][head_dim/2]
  const float* rope_sin;
  const SlipLayer* layers;
  SlipLinear embed;       // used as a lookup table
  SlipLinear lm_head;
  const float* final_norm;  // [hidden] or null: lm_head reads the hidden state as it is
  int32_t quantised;      // some matrix is: what matrices read is float32 then, and rounded to dtype for those that are not
  int32_t given_hidden;  // hidden holds the input of the first layer already; else the tokens' embeddings
  int32_t num_taps;
  int32_t adapter_rank;   // the largest down.n of all adapters; 0 where there are none
  const int32_t* taps;   // [num_taps] ascending: the input of these layers (num_layers: the output of the last) …
  float* features;       // … goes here, [tokens][num_taps][hidden]
  int32_t cache_form;
  int32_t reserved;
};

// A ragged batch: segment s holds tokens [q_start[s], q_start[s+1]) of one sequence whose length, these tokens
// included, is kv_len[s]. Tiles are groups of 16 tokens; block_table maps a sequence's blocks to cache blocks.
struct SlipBatch {
  int32_t num_tokens;
  int32_t num_segments;
  const int32_t* token_ids;     // [num_tokens]
  const int32_t* q_start;       // [num_segments + 1]
  const int32_t* kv_len;        // [num_segments]
  const int32_t* block_tables;  // row of segment s begins at block_tables + table_row[s] * table_stride
  const int32_t* table_row;     // [num_segments]
  int32_t table_stride;
  int32_t tiles_per_block;
  int32_t num_mirrors;
  const int32_t* mirrors;       // [num_mirrors][3]: what this token stores is stored in this block at this offset too
  const int32_t* adapters;      // [num_tokens] of each layer's, from 1 on, 0 for none; null where no token has any
};

struct SlipAttention {
  int32_t dtype;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t window;
  float scale;
  int32_t cache_form;
  int32_t reserved;
  uint16_t* k_scales;  // as those of a layer
  uint16_t* v_scales;
};

// Chains of draft tokens: of each sequence so many, each drawn from the model's logits behind the one before. A token is the most
// likely one (slip_argmax) where the temperature is 0, else the first of a race (slip_distribution, slip_race); its probability is
// then its share in the scores of the first `runners`, each to the power of `sharpness`.
struct SlipChains {
  int32_t columns;            // of the logits
  int32_t runners;
  double sharpness;
  double stop_below;          // a chain ends where the product of its probabilities is less
  const int32_t* vocabulary;  // [columns] the token that each column stands for; null: the column itself
  const int32_t* most;        // [sequences] tokens, at most; 1 at least
  const int32_t* mapped;      // [sequences] positions that have a block: a token without one is the last
  const float* temperature;   // [sequences], and so on: what slip_distribution and slip_race take
  const int32_t* top_k;
  const float* min_p;
  const float* top_p;
  const uint64_t* seeds;
  const uint64_t* indices;    // of each sequence's first token
  int32_t depth;              // the largest of `most`
  int32_t reserved;
  int32_t* tokens;            // told: [sequences, depth]
  double* likely;             // told: [sequences, depth] their probabilities, if those before them are right
  int32_t* counts;            // told: [sequences] how many there are
};

#define SLIP_API __attribute__((visibility("default")))

// What the structs above take, all in one number: whoever was written for others must not call anything else.
SLIP_API int64_t slip_layout(void);
// Picks the best instruction set this processor has. Returns its name, or null when none of ours runs here.
SLIP_API const char* slip_init(int32_t threads);
SLIP_API const char* slip_isa(void);
// Variant number `index` that was compiled, the best one first, and whether this processor runs it; null behind the last one.
SLIP_API const char* slip_variant(int32_t index, int32_t* runs_here);
// Selects an instruction set by name; 0 on success.
SLIP_API int32_t slip_select(const char* isa);
SLIP_API void slip_set_threads(int32_t threads);

// out[m, :n] (f32, row stride ld) = x[m, k] (f32, rounded to dtype) W^T + bias
SLIP_API void slip_linear(int32_t dtype, const SlipLinear* w, const float* x, int32_t rows, float* out, int32_t ld);
// The form that rows of k inputs of a GGUF type are packed into, 0 if they cannot be; and the memory a part of it takes.
SLIP_API int32_t slip_form(const char* format, int32_t k);
SLIP_API int64_t slip_part_bytes(int32_t form, int32_t panels, int32_t k);
// Packs rows first_row … of a matrix whose panels are first_panel, first_panel + stride, … of the part; rows as in the file.
SLIP_API void slip_pack(const char* format, const uint8_t* rows, int64_t row_bytes, int32_t count, const SlipPart* part, int32_t k,
                        int32_t first_row, int32_t first_panel, int32_t stride);
// The same into panels of a dtype, whose memory is that of a SlipLinear: the numbers that the rows stand for.
SLIP_API void slip_dequantise(const char* format, const uint8_t* rows, int64_t row_bytes, int32_t count, int32_t dtype, void* panels,
                              int32_t k, int32_t first_row, int32_t first_panel, int32_t stride);
// out [count, k] = some rows of such a part.
SLIP_API void slip_unpack(const SlipPart* part, int32_t k, const int64_t* rows, int32_t count, int32_t first_panel,
                          int32_t stride, float* out);
// out [count, k / 32, SLIP_KEPT_BYTES] = some rows of such a part as they are kept: packing takes them as "form N", and numbers that
// are to become rows of that form as "form N of F32" and "form N of BF16".
#define SLIP_KEPT_BYTES 40
SLIP_API void slip_keep(const SlipPart* part, int32_t k, const int64_t* rows, int32_t count, int32_t first_panel, int32_t stride,
                        uint8_t* out);
// Stores k and v [tokens, kv_heads, head_dim] (f32) of a ragged batch into one layer's cache.
SLIP_API void slip_store_kv(const SlipAttention* a, const SlipBatch* b, const float* k, const float* v, void* k_cache,
                            void* v_cache);
// out [tokens, heads, head_dim] = causal attention of q over the paged cache.
SLIP_API void slip_attention(const SlipAttention* a, const SlipBatch* b, const float* q, const void* k_cache,
                             const void* v_cache, float* out);
// hidden [tokens, hidden] f32 before the final norm. `workspace` holds slip_workspace_bytes(model, tokens).
SLIP_API int64_t slip_workspace_bytes(const SlipModel* m, int32_t tokens);
SLIP_API void slip_forward(const SlipModel* m, const SlipBatch* b, float* hidden, void* workspace);
// logits [num_rows, vocab] f32 of the chosen rows of hidden, final norm included.
SLIP_API void slip_logits(const SlipModel* m, const float* hidden, const int32_t* rows, int32_t num_rows, float* logits,
                          int32_t vocab, void* workspace);
// out[row] = index of the first largest of logits[row, n], -1 if it is not finite or the row holds a NaN; likely[row] (or
// null) = its probability.
SLIP_API void slip_argmax(const float* logits, int32_t rows, int32_t n, int32_t* out, float* likely);
// Log-probabilities by logits [rows, n] at temperature 1: own[row] and ranks[row] of tokens[row] (-1: none), and top_tokens and
// top [rows, count] of the most likely, best first (-1 where there are no more). NaN where slip_argmax finds none.
SLIP_API void slip_log_probabilities(const float* logits, int32_t rows, int32_t n, const int32_t* tokens, int32_t count,
                                     float* own, int32_t* ranks, int32_t* top_tokens, float* top);
// Logits [rows, n] become weights proportional to the probabilities of drawing each token, in place. Per row:
// temperature > 0, top_k (0 keeps all), min_p (0 keeps all), top_p (1 keeps all).
SLIP_API void slip_distribution(float* logits, int32_t rows, int32_t n, const float* temperature, const int32_t* top_k,
                                const float* min_p, const float* top_p);
// The first `count` of an exponential race per row of weights [rows, n]: places[rows, count] and their scores, weight / noise.
// The noise belongs to seeds[row], indices[row] and the token at the place, ids[place] (null: the place itself). -1 and 0 where
// fewer have weight. See kernels/random.py for how noise is made.
SLIP_API void slip_race(const float* weights, int32_t rows, int32_t n, const uint64_t* seeds, const uint64_t* indices,
                        const int32_t* ids, int32_t count, int32_t* places, float* scores);
// Makes chains. The batch has a segment per sequence, whose kv_len is where the first token goes; its tokens say nothing. hidden
// [sequences, hidden] f32 is the output before that, and overwritten; so is logits [sequences, columns].
SLIP_API void slip_draft(const SlipModel* m, const SlipBatch* b, const SlipChains* c, float* hidden, float* logits, void* workspace);
// To measure the machine: reads [count] floats once; multiplies and adds numbers of a dtype, or bytes, in registers, and returns how many
// operations that was. On all threads.
SLIP_API void slip_read(const float* memory, int64_t count);
SLIP_API double slip_multiply(int32_t dtype, int64_t times);
}
