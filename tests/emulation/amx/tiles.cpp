// The tiles of a processor that has none: see tiles.h.

#include <string.h>

#include <stdexcept>
#include <string>

// Products of tiles are most of the time of a test, and this file is compiled with the kernels,
// whose own code is not optimised.
#pragma GCC optimize("O2")

#include "tiles.h"

namespace specextend::emulation::amx {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as ldtilecfg reads it");

struct Tile {
  alignas(64) float words[kRows][kRowBytes / 4];
};

thread_local Config config;  // palette 0: none
thread_local Tile tiles[kTiles];

void require(bool what, const std::string& message) {
  if (!what) throw std::runtime_error("AMX emulation: " + message);
}

void require_tile(int tile) {
  require(config.palette == 1, "tiles are not configured");
  require(tile >= 0 && tile < kTiles && config.rows[tile] && config.row_bytes[tile],
          "tile " + std::to_string(tile) + " is not configured");
}

__m256 flush(__m256 x) {  // denormal numbers become 0
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f800000));
  const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  const __m256i magnitude = _mm256_and_si256(small, _mm256_set1_epi32(0x7fffffff));
  return _mm256_andnot_ps(_mm256_castsi256_ps(magnitude), x);
}

__m256 first_of_pairs(__m256 x) {
  return flush(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)));
}
__m256 second_of_pairs(__m256 x) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  return flush(_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), upper)));
}

}  // namespace

void load_config(const void* from) {
  Config next;
  memcpy(&next, from, sizeof(next));
  require(next.palette == 1 && next.start_row == 0, "this palette is not there");
  for (int i = 0; i < 16; ++i) {
    const bool none = next.rows[i] == 0 && next.row_bytes[i] == 0;
    require(i < kTiles ? next.rows[i] <= kRows && next.row_bytes[i] <= kRowBytes : none,
            "tiles are larger, or more, than there are");
    require(next.reserved[i % 14] == 0, "reserved bytes are not 0");
  }
  require(config.palette == 0, "tiles are configured that nobody has released");
  config = next;
  memset(tiles, 0, sizeof(tiles));
}

void release() {
  require(config.palette == 1, "tiles are released that are not configured");
  config = {};
}

void zero(int tile) {
  require_tile(tile);
  memset(&tiles[tile], 0, sizeof(Tile));
}

void load(int tile, const void* base, long stride) {
  zero(tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    memcpy(tiles[tile].words[r], static_cast<const char*>(base) + r * stride,
           config.row_bytes[tile]);
}

void store(int tile, void* base, long stride) {
  require_tile(tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    memcpy(static_cast<char*>(base) + r * stride, tiles[tile].words[r], config.row_bytes[tile]);
}

void multiply_bf16(int c, int a, int b) {
  for (int tile : {a, b, c}) require_tile(tile);
  require(a != b && a != c && b != c, "two operands are the same tile");
  const int pairs = config.row_bytes[a] / 4;
  require(config.row_bytes[a] % 4 == 0 && config.row_bytes[b] % 4 == 0 && config.rows[b] == pairs &&
              config.rows[a] == config.rows[c] && config.row_bytes[b] == config.row_bytes[c],
          "the operands' sizes do not fit together");
  for (int m = 0; m < config.rows[c]; ++m)
    for (int n = 0; n < kRows; n += 8) {
      __m256 first = _mm256_setzero_ps(), second = first;
      for (int k = 0; k < pairs; ++k) {
        const __m256 y = _mm256_load_ps(tiles[b].words[k] + n);
        int word;
        memcpy(&word, &tiles[a].words[m][k], 4);
        const __m256 w = _mm256_castsi256_ps(_mm256_set1_epi32(word));
        first = flush(_mm256_fmadd_ps(first_of_pairs(w), first_of_pairs(y), first));
        second = flush(_mm256_fmadd_ps(second_of_pairs(w), second_of_pairs(y), second));
      }
      float* const sum = tiles[c].words[m] + n;
      const __m256 both = flush(_mm256_add_ps(first, second));
      _mm256_store_ps(sum, flush(_mm256_add_ps(flush(_mm256_load_ps(sum)), both)));
    }
}

}  // namespace specextend::emulation::amx
