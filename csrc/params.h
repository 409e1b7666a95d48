#pragma once

// The plain parameters of every kernel, on the CPU and in CUDA. Letters: B batch, M query rows, N
// tree keys, S cache capacity, P prefix length, Hq and Hkv heads, D head dim, Dv that of values
// where it may be another, V vocabulary, L layers; of products, K summands and N columns. Strides
// are in elements; the last dimension of a tensor with strides has stride 1.

#include <cstdint>

namespace specextend {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

constexpr int kMaxCaches = 256;         // one launch of compact_kv serves no more caches
constexpr int kMaxRotatedPairs = 4096;  // the table of gather_chunks fits shared memory
constexpr int kMaxHeadDim = 576, kMaxValueDim = 512;  // of attention: latent keys, their values

// tree_attention: M rows attend to a prefix, which all of them see, and to N tree keys behind it.
struct TreeAttentionParams {
  const void* q;  // [B, M, Hq, D]
  const void* k;  // [B, S, Hkv, D]; rows [0, P) are the prefix, rows [P, P + N) the tree's own
  const void* v;  // [B, S, Hkv, Dv]
  int64_t q_stride_b, q_stride_m, q_stride_h;
  int64_t k_stride_b, k_stride_s, k_stride_h;
  int64_t v_stride_b, v_stride_s, v_stride_h;
  const int32_t* prefix_lens;  // [B]: P, clamped to [0, S - N]
  const uint64_t* mask;        // [B, M, ceil(N / 64)] packed visibility (tree.h); null: a chain
  const int32_t* q_depths;     // [B, M]: position of a row is P + depth; null: a chain's
  const int32_t* k_depths;     // [B, N]: likewise for the tree's keys; for windows and chunks alone
  const float* sinks;          // [Hq]: a logit in the softmax that has no value; or null
  void* out;                   // [B, M, Hq, Dv], contiguous; or null: v is not read
  float* lse;                  // [B, M, Hq], natural log, over the keys alone (without the sink)
  float* chunk_lse;            // [B, M, Hq, num_chunks] over the prefix's chunks, or null
  int64_t capacity;            // S
  int batch, num_rows, num_tree_keys, num_heads, num_kv_heads, head_dim;  // head_dim: of q and k
  int value_dim;                                                          // of v and out
  int chunk_size, num_chunks;  // num_chunks = ceil(S / chunk_size)
  int window;                  // keys at positions > position - window are seen; 0: all
  int attention_chunk;         // a row sees from the start of its own chunk on; 0: all
  float scale, softcap;        // softcap > 0: logits become softcap * tanh(logit / softcap)
};

// merge_states: two partial attentions over disjoint key sets become one. All tensors are
// contiguous.
struct MergeStatesParams {
  const void* o_a;     // [rows, D]
  const float* lse_a;  // [rows], natural log; -inf or +inf marks an empty key set
  const void* o_b;
  const float* lse_b;
  void* o;
  float* lse;
  int64_t num_rows;
  int head_dim;
};

// invariant_linear: y = x w^T + bias, a product for each batch. The last dimension of x, and one of
// the last two of w, has stride 1.
struct InvariantLinearParams {
  const void* x;     // [B, M, K]
  const void* w;     // [B, N, K]
  const void* bias;  // [N], or null
  void* y;           // [B, M, N], contiguous
  int64_t x_stride_b, x_stride_m;
  int64_t w_stride_b;
  int64_t w_stride;  // elements from one column of y to the next, or, if `by_k`, from k to k + 1
  bool by_k;         // w lies in memory as [K, N]
  int64_t batch, num_rows, num_columns, depth;  // B, M, N, K
};

// Rows [.., N], with at most kRowDims dimensions before the last; sizes of those that are not there
// are 1.
constexpr int kRowDims = 3;
struct RowShape {
  int64_t sizes[kRowDims];
  int64_t num_rows;  // the product of the sizes
  int64_t length;    // N
};
struct Rows {
  const void* data;
  int64_t strides[kRowDims];
};

// rms_norm, add_rms_norm: rows are divided by the root of the mean of their squares. All results
// are contiguous.
struct RmsNormParams {
  RowShape shape;
  Rows x;
  Rows residual;       // is added to x before; data may be null: nothing is
  const void* weight;  // [N]
  void* out;
  void* total;  // residual + x; null if there is none
  float eps;
  float offset;      // is added to the weight
  bool round_first;  // to the dtype, before the product with the weight
};

// silu_mul: silu(gate) * up.
struct SiluMulParams {
  RowShape shape;
  Rows gate, up;
  void* out;  // contiguous
};

// compact_kv: rows P + path[i] move to P + i, i <= num_accepted, in every cache (K and V of all
// layers).
struct CompactKvParams {
  void* caches[kMaxCaches];     // [B, S, Hkv, D] each, all of one shape and with the same strides
  const int32_t* prefix_lens;   // [B]: P
  const int32_t* path;          // [B, path_len], path[0] = 0, strictly increasing
  const int32_t* num_accepted;  // [B], < path_len
  int64_t stride_b, stride_s, stride_h;  // bytes
  int64_t row_bytes;                     // of one head
  int64_t capacity;                      // S
  int num_caches, batch, path_len, num_kv_heads;
};

// A tensor [B, S, Hkv, D] whose rows the ops on caches move.
struct KvRows {
  void* data;
  int64_t stride_b, stride_s, stride_h;  // bytes
};

// append_kv: new keys and values go to rows [len, len + M) of their caches. Each pair is keys,
// values.
struct AppendKvParams {
  KvRows caches[2];      // [B, S, Hkv, D]
  KvRows rows[2];        // [B, M, Hkv, D]
  int64_t row_bytes[2];  // of one head
  const int32_t* lens;   // [B]
  int64_t capacity;      // S
  int batch, num_rows, num_kv_heads;
};

// rotary_append: q and the new keys are rotated, and the latter appended with their values. All are
// of one dtype.
struct RotaryAppendParams {
  AppendKvParams append;
  KvRows q, out;  // [B, M, Hq, D]
  KvRows cos;     // [B, M, 1, R]
  KvRows sin;
  int num_heads;   // Hq
  int rotary_dim;  // R, even
};

// gather_chunks: these are the caches of one layer. Each pair is keys, values.
struct GatherLayer {
  KvRows full[2];        // [B, S, Hkv, D]
  KvRows work[2];        // [B, Sw, Hkv, D]
  int64_t row_bytes[2];  // of one head
  int num_kv_heads[2];
  const float* inv_freq;  // [R / 2]
};

// gather_chunks: chunk ids[i] of the full caches goes to rows [i * chunk_size, ...) of the working
// caches.
struct GatherChunksParams {
  const GatherLayer* layers;  // on the host
  const int32_t* ids;         // [B, budget], ascending
  const int32_t* counts;      // [B], <= budget
  const int32_t* lens;        // [B]: tokens in the full caches
  int32_t* work_lens;         // [B]
  int64_t capacity;           // S
  int64_t work_capacity;      // Sw
  int num_layers, batch, budget, chunk_size;
  int rotary_dim;      // R; 0: keys are copied as they are
  bool interleaved;    // pairs are neighbours, else halves of the first R dimensions
  bool right_aligned;  // positions end where the last chunk ends, else begin at 0
};

// verify_tree: finds the longest path of a tree along the target's own choices. All tensors are
// contiguous.
struct VerifyTreeParams {
  const int64_t* tokens;         // [B, N], root first
  const int32_t* parents;        // [B, N], in any order but for the root, which is node 0
  const int64_t* target_tokens;  // [B, N]: the target's choice after each node; negative: none
  int32_t* path;                 // [B, N] nodes, path[0] = 0, tail -1
  int32_t* num_accepted;         // [B]
  int64_t* emitted;              // [B, N]: accepted tokens, then the target's own, tail -1
  int64_t* next_root;            // [B]: the last token emitted
  int batch, num_nodes;
};

// sample_nodes: takes one token per row of logits, the largest, or draws it with a uniform number.
struct SampleNodesParams {
  const void* logits;  // [B, N, V]
  int64_t stride_b, stride_n;
  const void* uniforms;  // [B, N] contiguous, or null: the largest
  bool uniforms_are_double;
  int64_t* tokens;  // [B, N]
  int64_t vocab;
  int batch, num_nodes;
};

// expand_tree: finds the top_k children of every frontier node (one level of a beam search), and
// the best `width` of all, the next frontier.
struct ExpandTreeParams {
  const void* logits;  // [B, F, V]
  int64_t stride_b, stride_f;
  const float* beam_logp;  // [B, F] cumulative
  int64_t* cand_tokens;    // [B, F, top_k]
  float* cand_logp;        // [B, F, top_k] cumulative, descending per node
  int32_t* beam;           // [B, width] indices into the F * top_k candidates
  float* beam_logp_out;    // [B, width]
  int64_t vocab;
  int batch, frontier, top_k, width;
};

// finalize_tree: makes a tree of the best nodes of a pool of candidates. All tensors are
// contiguous.
struct FinalizeTreeParams {
  const float* logp;       // [B, T] cumulative
  const int32_t* parents;  // [B, T] pool indices below their own; -1: the root
  int32_t* nodes;          // [B, n] pool indices, ascending
  int32_t* tree_parents;   // [B, 1 + n], the root being node 0
  int32_t* depths;         // [B, 1 + n]
  uint64_t* mask;          // [B, 1 + n, ceil((1 + n) / 64)] ancestor-or-self (tree.h)
  int batch, num_candidates, num_nodes;
};

// chunk_scores: adds the softmax mass of every chunk of the prefix up over the heads, for one query
// row per sequence.
struct ChunkScoresParams {
  const float* chunk_lse;  // [B, M, Hq, C]
  const float* lse;        // [B, M, Hq]; -inf, +inf or NaN: the head sees nothing and adds nothing
  int64_t chunk_stride_b, chunk_stride_m, chunk_stride_h;
  int64_t lse_stride_b, lse_stride_m;
  const int32_t* rows;         // [B], clamped to [0, M)
  const int32_t* prefix_lens;  // [B]
  float* scores;               // [B, C]
  int batch, num_rows, num_heads, num_chunks, chunk_size;
  bool largest;  // of the heads; else their mean
  bool tree;     // a head's mass that no chunk has is that of tree keys behind the prefix
};

// chunk_scores.keys: makes the same from the keys alone, of which the row sees all. `attention` has
// no values, outputs, tree or sinks, and its prefix is all keys.
struct ChunkScoresKeysParams {
  TreeAttentionParams attention;
  const int32_t* rows;  // [B], clamped to [0, M)
  float* scores;        // [B, C]
  bool largest;
};

// select_chunks: chooses the best chunks within a budget, the first and the newest ones always. All
// tensors are contiguous.
struct SelectChunksParams {
  const float* scores;  // [B, C]
  const int32_t* lens;  // [B] keys; ceil(len / chunk_size) chunks hold some
  int32_t* ids;         // [B, budget] ascending, tail -1
  int32_t* counts;      // [B]
  int batch, num_chunks, chunk_size, budget, num_sinks, num_recent;
};

}  // namespace specextend
