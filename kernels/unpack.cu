// Packed weights (docs/PACKED.md) to rows of 16-bit words: whole tiles, or the rows that an embedding asks for.
#include "device.h"

namespace ep {
namespace packed {
constexpr int kWarps = 4;                     // of a block, each with a tile of its own
constexpr int kSpan = 64;                     // columns staged at once: a row of them is a line of 128 bytes
constexpr int kStagedRow = kSpan * 2 / 4 + 4;  // 4-byte words; the 16 bytes more keep lanes off each other's banks

// Decodes rows 32 * first .. and n_rows of them to `out`. One warp a tile: lanes decode rows of their own and hand them
// through shared memory to stores of whole lines.
template <class Lane>
__device__ __forceinline__ void unpack(const Weight& w, u32 first, u32 n_rows, u16* __restrict__ out) {
  __shared__ typename Lane::Shared shared;
  __shared__ alignas(16) u32 staged[kWarps][kRows * kStagedRow];
  Lane::share(w, shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, col_tiles = w.shape.col_tiles();
  const u32 tile = blockIdx.x * kWarps + warp, row_tile = first + tile / col_tiles, col_tile = tile % col_tiles;
  const u32 cols = w.shape.cols, row0 = tile / col_tiles * kRows, col0 = col_tile * kCols, n = w.shape.cols_in(col_tile);
  if (row0 >= n_rows) return;
  const u32 rows_here = n_rows - row0 < kRows ? n_rows - row0 : kRows;
  Lane own(w, shared, row_tile, col_tile, lane, row_tile * kRows + lane < w.shape.rows);
  u32* mine = staged[warp];
  const bool whole = n == kCols && (row_tile + 1) * kRows <= w.shape.rows;
  const auto stage = [&](u32 g, const u32 word[8]) {
    uint4* to = (uint4*)(mine + lane * kStagedRow + g * 8);
    to[0] = {word[0], word[1], word[2], word[3]};
    to[1] = {word[4], word[5], word[6], word[7]};
  };
  for (u32 span = 0; span < n; span += kSpan) {
    u32 word[8];
    if (whole) {
      typename Lane::Raw raw[kSpan / kGroup];
#pragma unroll
      for (u32 g = 0; g < kSpan / kGroup; g++) raw[g] = own.load(span / kGroup + g);
#pragma unroll
      for (u32 g = 0; g < kSpan / kGroup; g++) {
        own.decode(raw[g], word);
        stage(g, word);
      }
    } else {
#pragma unroll 1
      for (u32 g = 0; g < kSpan / kGroup && span + g * kGroup < n; g++) {
        own.decode_edge(own.load(span / kGroup + g), n - span - g * kGroup, word);
        stage(g, word);
      }
    }
    __syncwarp();
    const u32 width = n - span < kSpan ? n - span : kSpan;
    if (cols % 8 == 0) {
      for (u32 i = lane; i < rows_here * (kSpan / 8); i += 32) {
        const u32 r = i / (kSpan / 8), piece = i % (kSpan / 8);
        if (piece * 8 < width)
          *(uint4*)(out + (u64)(row0 + r) * cols + col0 + span + piece * 8) =
              *(const uint4*)(mine + r * kStagedRow + piece * 4);
      }
    } else {
      for (u32 r = 0; r < rows_here; r++)
        for (u32 c = lane; c < width; c += 32)
          out[(u64)(row0 + r) * cols + col0 + span + c] = ((const u16*)(mine + r * kStagedRow))[c];
    }
    __syncwarp();
  }
}

// Escaped weights decode to 0; here they get their words, behind the barrier of the warp that ends `unpack`.
__device__ __forceinline__ void patch(const Weight& w, u32 first, u32 n_rows, u16* __restrict__ out) {
  const u32 col_tiles = w.shape.col_tiles(), tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const u32 row0 = tile / col_tiles * kRows, col0 = tile % col_tiles * kCols;
  if (row0 >= n_rows) return;
  const u32* range = w.index() + first * col_tiles + tile;
  const u32 end = __ldg(range + 1);
  for (u32 i = __ldg(range) + threadIdx.x % 32; i < end; i += 32) {
    const u32 escape = __ldg(w.escapes() + i), row = row0 + escape_row(escape);
    if (row < n_rows) out[(u64)row * w.shape.cols + col0 + escape_col(escape)] = (u16)escape_word(escape);
  }
}

// Row ids[i] to row i of `out`; a thread decodes one tile's part of a row. Ids must be rows.
template <class Lane, class Make>
__device__ __forceinline__ void unpack_rows(const Weight& w, const long long* __restrict__ ids, u32 n,
                                            u16* __restrict__ out, Make make) {
  __shared__ typename Lane::Shared shared;
  Lane::share(w, shared);
  const u32 col_tiles = w.shape.col_tiles(), cols = w.shape.cols;
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)n * col_tiles) return;
  const u32 row = (u32)ids[i / col_tiles], col_tile = (u32)(i % col_tiles), width = w.shape.cols_in(col_tile);
  u16* to = out + i / col_tiles * cols + col_tile * kCols;
  Lane own = make(shared, row / kRows, col_tile, row % kRows);
  for (u32 group = 0; group * kGroup < width; group++) {
    u32 word[8];
    const u32 left = width - group * kGroup;
    own.decode_edge(own.load(group), left, word);
    if (cols % 8 == 0 && left >= kGroup) {
      ((uint4*)(to + group * kGroup))[0] = {word[0], word[1], word[2], word[3]};
      ((uint4*)(to + group * kGroup))[1] = {word[4], word[5], word[6], word[7]};
    } else {
#pragma unroll
      for (u32 c = 0; c < kGroup; c++)
        if (c < left) to[group * kGroup + c] = (u16)half_of(word, c);
    }
  }
}
}  // namespace packed
}  // namespace ep

using namespace ep::packed;

// Grid: tiles of the asked rows / 4. Block: 128.
extern "C" __global__ void __launch_bounds__(128) unpack_fast(EP_BLOB, unsigned first, unsigned n_rows,
                                                              unsigned short* __restrict__ out) {
  const Weight w = EP_BLOB_GIVEN;
  unpack<FastLane>(w, first, n_rows, out);
  patch(w, first, n_rows, out);
}

extern "C" __global__ void __launch_bounds__(128) unpack_dense(EP_BLOB, unsigned first, unsigned n_rows,
                                                               unsigned short* __restrict__ out) {
  const Weight w = EP_BLOB_GIVEN;
  unpack<DenseLane>(w, first, n_rows, out);
}

// Grid: n * column tiles / 128. Block: 128.
extern "C" __global__ void __launch_bounds__(128) rows_fast(EP_BLOB, const long long* __restrict__ ids, unsigned n,
                                                            unsigned short* __restrict__ out) {
  const Weight w = EP_BLOB_GIVEN;
  unpack_rows<FastLane>(w, ids, n, out, [&](const FastLane::Shared& shared, u32 row_tile, u32 col_tile, u32 lane) {
    return FastLane(w, shared, row_tile, col_tile, lane, true);
  });
  const u32 col_tiles = w.shape.col_tiles();
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)n * col_tiles) return;
  const u32 row = (u32)ids[i / col_tiles], col_tile = (u32)(i % col_tiles), tile = row / kRows * col_tiles + col_tile;
  for (u32 e = w.index()[tile]; e < w.index()[tile + 1]; e++) {
    const u32 escape = w.escapes()[e];
    if (escape_row(escape) == row % kRows)
      out[i / col_tiles * w.shape.cols + col_tile * kCols + escape_col(escape)] = (u16)escape_word(escape);
  }
}

extern "C" __global__ void __launch_bounds__(128) rows_dense(EP_BLOB, const long long* __restrict__ ids, unsigned n,
                                                             unsigned short* __restrict__ out) {
  const Weight w = EP_BLOB_GIVEN;
  unpack_rows<DenseLane>(w, ids, n, out, [&](const DenseLane::Shared& shared, u32 row_tile, u32 col_tile, u32 lane) {
    return DenseLane(w, shared, row_tile, col_tile, lane, true, [&](const u8* length) {
      u32 sum = 0;
      for (u32 before = 0; before < lane; before++) sum += __ldg(length + before);
      return sum;
    });
  });
}
