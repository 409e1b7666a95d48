#pragma once

// Which row of a KV cache goes where, and how its key is rotated on the way. Host and device code
// share this.

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "params.h"

namespace specextend {

// Returns the first byte of a row of one head.
SPECEXTEND_HOST_DEVICE char* kv_row(const KvRows& t, int64_t b, int64_t row, int64_t head) {
  return static_cast<char*>(t.data) + b * t.stride_b + row * t.stride_s + head * t.stride_h;
}

// Returns the largest power of two, at most 16, that divides all of `bits`.
inline int alignment_of(uint64_t bits) {
  bits |= 16;
  return int(bits & (~bits + 1));
}

// Returns the bits of all numbers that an address of a row is a sum of.
inline uint64_t address_bits(const KvRows& t) {
  return reinterpret_cast<uintptr_t>(t.data) | uint64_t(t.stride_b) | uint64_t(t.stride_s) |
         uint64_t(t.stride_h);
}

// compact_kv: returns how many nodes of the path count, the root among them.
SPECEXTEND_HOST_DEVICE int compact_count(const CompactKvParams& p, int b) {
  const int accepted = p.num_accepted[b];
  return accepted < 0 ? 0 : accepted < p.path_len ? accepted + 1 : p.path_len;
}

// compact_kv: returns the row that goes to row P + i, or -1 where none does: node i is in its place
// already, or is no node of this cache.
SPECEXTEND_HOST_DEVICE int64_t compact_source(const CompactKvParams& p, int b, int i) {
  const int32_t prefix = p.prefix_lens[b], node = p.path[int64_t(b) * p.path_len + i];
  const int64_t row = int64_t(prefix) + node;
  return prefix >= 0 && node > i && row < p.capacity ? row : -1;
}

// compact_kv: returns the largest power of two, at most 16, that divides every address of a row and
// its size.
inline int compact_alignment(const CompactKvParams& p) {
  uint64_t bits =
      uint64_t(p.stride_b) | uint64_t(p.stride_s) | uint64_t(p.stride_h) | uint64_t(p.row_bytes);
  for (int i = 0; i < p.num_caches; ++i) bits |= reinterpret_cast<uintptr_t>(p.caches[i]);
  return alignment_of(bits);
}

// append_kv: returns how many of the new rows have room behind the first lens[b].
SPECEXTEND_HOST_DEVICE int append_count(const AppendKvParams& p, int b) {
  const int64_t room = p.lens[b] < 0 ? 0 : p.capacity - p.lens[b];
  return room < 0 ? 0 : room < p.num_rows ? int(room) : p.num_rows;
}

// append_kv: returns the same as compact_alignment, for old and new rows.
inline int append_alignment(const AppendKvParams& p) {
  uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {
    bits |= address_bits(p.caches[i]) | address_bits(p.rows[i]) | uint64_t(p.row_bytes[i]);
  }
  return alignment_of(bits);
}

// rotary_append: returns the same for all of its arguments, a rotated half of a row among them.
inline int rotary_alignment(const RotaryAppendParams& p, int64_t element_size) {
  return alignment_of(uint64_t(append_alignment(p.append)) | address_bits(p.q) |
                      address_bits(p.out) | address_bits(p.cos) | address_bits(p.sin) |
                      uint64_t(p.rotary_dim / 2 * element_size));
}

// gather_chunks: returns how many slots of the working cache are filled.
SPECEXTEND_HOST_DEVICE int gather_count(const GatherChunksParams& p, int b) {
  const int count = p.counts[b];
  return count < 0 ? 0 : count < p.budget ? count : p.budget;
}

// gather_chunks: returns the tokens of the chunk in this slot; 0 if there is no such chunk.
SPECEXTEND_HOST_DEVICE int64_t gather_chunk_length(const GatherChunksParams& p, int b, int slot) {
  const int32_t id = p.ids[int64_t(b) * p.budget + slot];
  const int64_t len = p.lens[b] < p.capacity ? p.lens[b] : p.capacity;
  const int64_t rest = len - int64_t(id) * p.chunk_size;
  return id < 0 || rest < 0 ? 0 : rest < p.chunk_size ? rest : p.chunk_size;
}

// gather_chunks: returns how many rows of this slot fit the working cache.
SPECEXTEND_HOST_DEVICE int64_t gather_rows(const GatherChunksParams& p, int b, int slot) {
  const int64_t room = p.work_capacity - int64_t(slot) * p.chunk_size;
  const int64_t rows = gather_chunk_length(p, b, slot);
  return room < 0 ? 0 : rows < room ? rows : room;
}

// gather_chunks: returns how many rows of the working cache are in use. Only the last chunk may be
// partial.
SPECEXTEND_HOST_DEVICE int64_t gather_length(const GatherChunksParams& p, int b) {
  const int count = gather_count(p, b);
  if (count == 0) return 0;
  const int64_t rows = int64_t(count - 1) * p.chunk_size + gather_chunk_length(p, b, count - 1);
  return rows < p.work_capacity ? rows : p.work_capacity;
}

// gather_chunks: returns new position minus old position, which is the same for all keys of a slot.
// Positions are compact; they begin at 0, or, right-aligned, end where the last selected chunk
// ends.
SPECEXTEND_HOST_DEVICE int64_t gather_shift(const GatherChunksParams& p, int b, int slot) {
  const int32_t* ids = p.ids + int64_t(b) * p.budget;
  int64_t chunks = int64_t(slot) - ids[slot];
  if (p.right_aligned) {
    const int last = gather_count(p, b) - 1;
    chunks += int64_t(ids[last]) - last;
  }
  return chunks * p.chunk_size;
}

// gather_chunks: returns the same as compact_alignment for all layers, a rotated half of a row
// among them.
inline int gather_alignment(const GatherChunksParams& p, int64_t element_size) {
  uint64_t bits = uint64_t(p.rotary_dim / 2 * element_size);
  for (int i = 0; i < p.num_layers; ++i) {
    for (int which = 0; which < 2; ++which) {
      const GatherLayer& layer = p.layers[i];
      bits |= address_bits(layer.full[which]) | address_bits(layer.work[which]) |
              uint64_t(layer.row_bytes[which]);
    }
  }
  return alignment_of(bits);
}

struct Rotation {
  float cos, sin;
};

// Returns the rotation of one pair of dimensions by `shift` positions (rotary embedding). The angle
// is a double: shift * inv_freq reaches 1e6 radians, where neighbouring fp32 numbers are 0.06
// apart.
SPECEXTEND_HOST_DEVICE Rotation rotation(int64_t shift, float inv_freq) {
  const double angle = double(shift) * double(inv_freq);
  return {float(cos(angle)), float(sin(angle))};
}

// Rotates the pair (a, b). The bits are those of the CPU's kernels, which fuse nothing either.
SPECEXTEND_HOST_DEVICE void rotate_pair(Rotation r, float& a, float& b) {
  const float x = rounded_product(a, r.cos) - rounded_product(b, r.sin);
  b = rounded_product(b, r.cos) + rounded_product(a, r.sin);
  a = x;
}

}  // namespace specextend
