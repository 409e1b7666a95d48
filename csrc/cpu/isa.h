#pragma once

// The kernels that are compiled once per CPU instruction set, and the choice among them.

#include "params.h"
#include "vocab.h"

namespace specextend::cpu {

struct RowStats {
  float max;  // of the elements that are not NaN; -inf if there is none
  bool has_nan;
};

// These pass over one contiguous row of n logits of one dtype (csrc/cpu/isa/vocab.h).
struct VocabKernels {
  // Returns the lowest index of the largest element; -1 if one is NaN or all are -inf.
  int64_t (*argmax)(const void* row, int64_t n);
  // Writes for each block its largest element (ref), the sum of exp(x - ref), where NaN counts as
  // -inf, and the largest element of each lane.
  RowStats (*row_stats)(const void* row, int64_t n, float* block_refs, double* block_sums,
                        float* lane_max);
  // Writes exp(x - ref) to out, with the bits that row_stats summed. n <= kVocabBlock.
  void (*exp_block)(const void* row, int n, float ref, float* out);
  // Collects the elements >= threshold, NaN counting as -inf, in index order, but of those equal to
  // it only the first max_equal; returns their number. lane_max is what row_stats gave.
  int64_t (*collect)(const void* row, int64_t n, const float* lane_max, float threshold,
                     int64_t max_equal, float* values, int32_t* indices);
};

// Adds exp(chunk_lse[c] - lse) to mass[c], or takes the larger of both, for c < n; returns the sum
// of these exponentials. NaN and +inf count as -inf. `mass` has room for a multiple of kVocabLanes.
using ChunkMassKernel = double (*)(const float* chunk_lse, int64_t n, float lse, double* mass);

// Rotates the first 2 * pairs elements of a key: each pair (a, b) becomes (a cos - b sin,
// b cos + a sin). `to` and `from` do not overlap.
using RotateKernel = void (*)(const void* from, void* to, const float* cos, const float* sin,
                              int pairs);
struct RotateKernels {
  RotateKernel halves;      // pair i: elements i and pairs + i
  RotateKernel neighbours;  // pair i: elements 2 i and 2 i + 1
};

constexpr int kAttentionBlock = 128;     // keys between two updates of the running maximum
constexpr int kAttentionSegment = 1024;  // keys that are summed apart

// An item is some rows of one KV head over some segments of their keys
// (csrc/cpu/isa/tree_attention.h).
struct AttentionItem {
  const TreeAttentionParams* params;
  int b, kv_head;
  int row_begin, num_rows;  // packed rows: tree row * group + head of the group
  int segment_begin, segment_end;
  bool last;        // segment_end is the last of the sequence
  float* partials;  // [segments, num_rows, 2 + D rounded up to lanes]: results of segments; or
                    // null: all segments are this item's, and it finishes
  float* pieces;    // [B, M, Hq, num_pieces]: parts of chunks that do not divide blocks; or null
  int64_t num_pieces;
  void* scratch;
};
struct AttentionKernels {
  int64_t (*scratch_floats)(const TreeAttentionParams& p, int num_rows);
  void (*run)(const AttentionItem& item);
  void (*combine)(const AttentionItem& item);  // folds the partials of all segments
  int lanes;
};

// Some columns of a product for some rows of x (csrc/cpu/isa/invariant_linear.h).
struct LinearItem {
  const InvariantLinearParams* params;
  int64_t b;
  int64_t row_begin, num_rows;
  int64_t column_begin, num_columns;  // no more than kLinearColumns
  const float* x;                     // the rows as `prepare` made them, one after the other
  float* panel;                       // scratch of panel_floats, if w lies as [K, N]
};
constexpr int kLinearColumns = 32;
struct LinearKernels {
  int64_t (*prepared_floats)(int64_t depth);  // of one row
  int64_t (*panel_floats)(int64_t depth);
  void (*prepare)(const void* x, int64_t depth, float* to);
  void (*run)(const LinearItem& item);
};

// Compute rows [begin, end) of an op on rows (csrc/cpu/isa/rms_norm.h, silu_mul.h).
using RmsNormKernel = void (*)(const RmsNormParams& p, int64_t begin, int64_t end);
using SiluMulKernel = void (*)(const SiluMulParams& p, int64_t begin, int64_t end);

// The heads of one row, which are rotated (csrc/cpu/isa/rotary_append.h): with the first R elements
// x and with h the same whose halves have changed places, the first one negated,
// y = x cos + h sin. x and y do not overlap.
struct RotateRowItem {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;  // bytes from head to head
  const void *cos, *sin;       // [R] each
  int64_t row_bytes;           // of one head
  int num_heads, rotary_dim;   // R
};
using RotateRowKernel = void (*)(const RotateRowItem& item);

// One table per instruction set, filled in csrc/cpu/isa/<name>.cpp. Functions see raw pointers and
// PODs only and work on one item each; threads are handed out by their callers in
// csrc/cpu/<op>.cpp.
struct Isa {
  const char* name;
  VocabKernels vocab[3];          // by DType
  AttentionKernels attention[3];  // by DType
  ChunkMassKernel chunk_mass[2];  // sum, largest
  RotateKernels rotate[3];        // by DType
  LinearKernels linear[3];        // by DType
  RmsNormKernel rms_norm[3];      // by DType
  RotateRowKernel rotate_row[3];  // by DType
  SiluMulKernel silu_mul[2];      // fp16, bf16
};

// Returns the table in use: the best that this machine runs, or the one that SPECEXTEND_CPU_ISA
// names. It is chosen once, at the first call.
const Isa& isa();

}  // namespace specextend::cpu
