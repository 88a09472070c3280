// Rows of 16-bit words to packed weights (docs/PACKED.md), the same bytes as the CPU's. The host puts the steps together:
// pack_histogram; tables from the counts; pack_measure_*; sums of what it says (the index); a blob of zeros with header,
// table, index and lane lengths in it; pack_write_*; checksums.
#include "device.h"

namespace ep {
namespace packed {
constexpr u32 kTiles = 4;              // of a block, one a warp
constexpr u32 kTileRow = kCols / 2 + 1;  // 4-byte words; the odd one keeps lanes off each other's banks

// One tile in shared memory, a lane a row of it.
struct Tile {
  u32 number, row_tile, col_tile;
  u32 width;         // columns
  bool any, active;  // whether there is such a tile; whether it has this lane's row
  const u16* words;  // of this lane's row

  // All lanes of a warp, which read row after row.
  __device__ __forceinline__ Tile(const Shape& shape, const u16* __restrict__ from, u32 staged[kRows * kTileRow]) {
    const u32 lane = threadIdx.x % 32;
    number = blockIdx.x * kTiles + threadIdx.x / 32;
    row_tile = number / shape.col_tiles(), col_tile = number % shape.col_tiles();
    any = row_tile < shape.row_tiles();
    active = any && row_tile * kRows + lane < shape.rows;
    width = any ? shape.cols_in(col_tile) : 0;
    for (u32 r = 0; any && r < kRows && row_tile * kRows + r < shape.rows; r++) {
      const u16* row = from + (u64)(row_tile * kRows + r) * shape.cols + col_tile * kCols;
      for (u32 c = lane; c < width; c += 32) ((u16*)(staged + r * kTileRow))[c] = row[c];
    }
    __syncwarp();
    words = (const u16*)(staged + lane * kTileRow);
  }
};

// The sum over all lanes of a warp.
__device__ __forceinline__ u32 sum_all(u32 own) { return __shfl_sync(kAll, sum_before(own) + own, kRows - 1); }

// The low bytes of 16 columns of a lane's row; `byte(c)` gives that of column c of the tile.
template <class Byte>
__device__ __forceinline__ uint4 low_bytes(const Tile& tile, u32 group, Byte byte) {
  u32 part[4] = {};
#pragma unroll
  for (u32 i = 0; i < kGroup; i++) {
    const u32 c = group * kGroup + i;
    if (tile.active && c < tile.width) part[i / 4] |= byte(c) << 8 * (i % 4);
  }
  return {part[0], part[1], part[2], part[3]};
}
}  // namespace packed
}  // namespace ep

using namespace ep::packed;

// As EP_BLOB, to be written.
#define EP_BLOB_OUT                                                                                                  \
  unsigned char *__restrict__ blob, unsigned low, unsigned codes, unsigned index, unsigned table, unsigned extra,     \
      unsigned rows, unsigned cols

// Adds to 256 counts how often each byte is to be coded: of a word rotated left by one if `dense`, else of the word itself.
// Grid: any. Block: at most 256.
extern "C" __global__ void __launch_bounds__(256) pack_histogram(const unsigned short* __restrict__ words, unsigned rows,
                                                                 unsigned cols, unsigned dense,
                                                                 unsigned long long* __restrict__ counts) {
  __shared__ u32 part[8][256];  // one a warp: most words have few high bytes
  for (u32 i = threadIdx.x; i < 8 * 256; i += blockDim.x) part[i / 256][i % 256] = 0;
  __syncthreads();
  const u64 n = (u64)rows * cols, step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    const u32 word = words[i];
    atomicAdd(&part[threadIdx.x / 32][(dense ? rotate_left(word) : word) >> 8], 1u);
  }
  __syncthreads();
  for (u32 symbol = threadIdx.x; symbol < 256; symbol += blockDim.x) {
    u64 sum = 0;
    for (u32 warp = 0; warp < 8; warp++) sum += part[warp][symbol];
    if (sum) atomicAdd(counts + symbol, sum);
  }
}

// Escapes of every tile. `rank`: of each of 256 high bytes, 15 where it has none.
// Grid: tiles / 4. Block: 128.
extern "C" __global__ void __launch_bounds__(128) pack_measure_fast(const unsigned short* __restrict__ words,
                                                                    unsigned rows, unsigned cols,
                                                                    const unsigned char* __restrict__ rank,
                                                                    unsigned* __restrict__ escapes) {
  __shared__ u32 staged[kTiles][kRows * kTileRow];
  const Tile tile({rows, cols}, words, staged[threadIdx.x / 32]);
  u32 own = 0;
  for (u32 c = 0; tile.active && c < tile.width; c++) own += __ldg(rank + (tile.words[c] >> 8)) == kEscape;
  const u32 all = sum_all(own);
  if (tile.any && threadIdx.x % 32 == 0) escapes[tile.number] = all;
}

// Bytes of every lane (32 a tile) and units of 16 bytes of every tile. `code`: of each byte, length << 16 | code.
// Grid: tiles / 4. Block: 128.
extern "C" __global__ void __launch_bounds__(128) pack_measure_dense(const unsigned short* __restrict__ words,
                                                                     unsigned rows, unsigned cols,
                                                                     const unsigned* __restrict__ code,
                                                                     unsigned char* __restrict__ lengths,
                                                                     unsigned* __restrict__ units) {
  __shared__ u32 staged[kTiles][kRows * kTileRow];
  const Tile tile({rows, cols}, words, staged[threadIdx.x / 32]);
  const u32 bytes = tile.active ? (dense_bits(tile.words, tile.width, code) + 7) / 8 : 0;
  const u32 all = sum_all(bytes);
  if (!tile.any) return;
  lengths[(u64)tile.number * kRows + threadIdx.x % 32] = (u8)bytes;
  if (threadIdx.x % 32 == 0) units[tile.number] = (all + 15) / 16;
}

// Low plane, ranks and escapes. Grid: tiles / 4. Block: 128.
extern "C" __global__ void __launch_bounds__(128) pack_write_fast(EP_BLOB_OUT, const unsigned short* __restrict__ words,
                                                                  const unsigned char* __restrict__ rank) {
  __shared__ u32 staged[kTiles][kRows * kTileRow];
  const Shape shape{rows, cols};
  const Tile tile(shape, words, staged[threadIdx.x / 32]);
  const u32 lane = threadIdx.x % 32;
  u32 own = 0;
  for (u32 group = 0; group * kGroup < tile.width; group++) {
    u32 ranks[2] = {};
#pragma unroll
    for (u32 i = 0; i < kGroup; i++) {
      const u32 c = group * kGroup + i;
      if (!tile.active || c >= tile.width) continue;
      const u32 r = __ldg(rank + (tile.words[c] >> 8));
      ranks[i / 8] |= r << 4 * (i % 8);
      own += r == kEscape;
    }
    const u64 at = shape.group_at(tile.row_tile, tile.col_tile * (kCols / kGroup) + group, lane);
    ((uint2*)(blob + (u64)codes * 16))[at] = {ranks[0], ranks[1]};
    ((uint4*)(blob + (u64)low * 16))[at] = low_bytes(tile, group, [&](u32 c) {
      return __ldg(rank + (tile.words[c] >> 8)) == kEscape ? 0u : tile.words[c] & 255u;
    });
  }
  const u32 before = sum_before(own);
  if (!own) return;
  u32* to = (u32*)(blob + (u64)extra * 16) + ((const u32*)(blob + (u64)index * 16))[tile.number] + before;
  for (u32 c = 0; c < tile.width; c++)
    if (__ldg(rank + (tile.words[c] >> 8)) == kEscape) *to++ = escape_of(lane, c, tile.words[c]);
}

// Low plane and streams. Grid: tiles / 4. Block: 128.
extern "C" __global__ void __launch_bounds__(128) pack_write_dense(EP_BLOB_OUT,
                                                                   const unsigned short* __restrict__ words,
                                                                   const unsigned* __restrict__ code) {
  __shared__ u32 staged[kTiles][kRows * kTileRow];
  const Shape shape{rows, cols};
  const Tile tile(shape, words, staged[threadIdx.x / 32]);
  const u32 lane = threadIdx.x % 32;
  const u32 before = sum_before(tile.any ? (blob + (u64)extra * 16)[(u64)tile.number * kRows + lane] : 0);
  for (u32 group = 0; group * kGroup < tile.width; group++)
    ((uint4*)(blob + (u64)low * 16))[shape.group_at(tile.row_tile, tile.col_tile * (kCols / kGroup) + group, lane)] =
        low_bytes(tile, group, [&](u32 c) { return rotate_left(tile.words[c]) & 255; });
  if (!tile.active) return;
  const u64 at = (u64)((const u32*)(blob + (u64)index * 16))[tile.number] * 16 + before;
  dense_write(tile.words, tile.width, code, blob + (u64)codes * 16 + at);
}
