// y = x Wᵀ + bias for one to eight rows of x, W packed (docs/PACKED.md): only the compressed bytes are read.
#include "device.h"

namespace ep {
namespace packed {
// Most warps of a block: more rows of x need more registers.
template <int kBatch>
constexpr int kMaxWarps = kBatch > 1 ? 16 : 32;
constexpr int kStaged = 256;  // floats of a warp in shared memory

// Adds to each of the sums 16 products. `x`: 16 floats for each, `stride` apart.
template <class Float, int kBatch>
__device__ __forceinline__ void add(const u32 word[8], const float* x, u32 stride, float sum[kBatch]) {
#pragma unroll
  for (u32 i = 0; i < 8; i += 2) {
    const float weight[4] = {Float::first(word[i]), Float::second(word[i]), Float::first(word[i + 1]),
                             Float::second(word[i + 1])};
#pragma unroll
    for (u32 b = 0; b < kBatch; b++) {
      const float4 v = *(const float4*)(x + b * stride + 2 * i);
      sum[b] = fmaf(weight[0], v.x, sum[b]);
      sum[b] = fmaf(weight[1], v.y, sum[b]);
      sum[b] = fmaf(weight[2], v.z, sum[b]);
      sum[b] = fmaf(weight[3], v.w, sum[b]);
    }
  }
}

// One block has 32 rows of W, its warps share out the column tiles, a lane sums along its row. So no sum crosses lanes but
// the last, over warps, in their order: the result depends on the number of warps alone. Sums are fp32, rounded once.
template <class Lane, class Float, int kBatch>
__device__ __forceinline__ void linear(const Weight& w, u32 first, u32 n_rows, const u16* __restrict__ x,
                                       const u16* __restrict__ bias, u16* __restrict__ y, u32 batch) {
  constexpr u32 kSpan = kBatch == 8 ? 32 : Lane::kSpan;  // columns of x staged at once, as floats
  constexpr u32 kGroups = kSpan / kGroup;
  static_assert(kSpan * kBatch <= kStaged && 32 * kBatch <= kStaged, "x and the sums share the space");
  __shared__ typename Lane::Shared shared;
  __shared__ alignas(16) float staged[kMaxWarps<kBatch>][kStaged];
  Lane::share(w, shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const u32 row_tile = first + blockIdx.x, col_tiles = w.shape.col_tiles(), cols = w.shape.cols;
  const bool active = row_tile * kRows + lane < w.shape.rows;
  float* mine = staged[warp];
  float sum[kBatch] = {};
  for (u32 col_tile = warp; col_tile < col_tiles; col_tile += warps) {
    Lane own(w, shared, row_tile, col_tile, lane, active);
    const u32 n = w.shape.cols_in(col_tile), col0 = col_tile * kCols;
    const bool whole = n == kCols && (row_tile + 1) * kRows <= w.shape.rows;
    for (u32 span = 0; span < n; span += kSpan) {
      // The weights' loads are under way while x is staged.
      typename Lane::Raw raw[kGroups];
      if (whole) {
#pragma unroll
        for (u32 g = 0; g < kGroups; g++) raw[g] = own.load(span / kGroup + g);
      }
      __syncwarp();
#pragma unroll
      for (u32 i = 0; i < kSpan * kBatch / 32; i++) {
        const u32 at = i * 32 + lane, b = at / kSpan, col = col0 + span + at % kSpan;
        mine[at] = b < batch && col < cols ? Float::first(x[(u64)b * cols + col]) : 0.f;
      }
      __syncwarp();
      u32 word[8];
      if (whole) {
#pragma unroll
        for (u32 g = 0; g < kGroups; g++) {
          own.decode(raw[g], word);
          add<Float, kBatch>(word, mine + g * kGroup, kSpan, sum);
        }
      } else {
#pragma unroll 1
        for (u32 g = 0; g < kGroups && span + g * kGroup < n; g++) {
          own.decode_edge(own.load(span / kGroup + g), n - span - g * kGroup, word);
          add<Float, kBatch>(word, mine + g * kGroup, kSpan, sum);
        }
      }
    }
    // What the fast layout lists apart was 0 above.
    if (Lane::kEscapes) {
      const u32* range = w.index() + row_tile * col_tiles + col_tile;
      const u32 end = __ldg(range + 1);
      for (u32 e = __ldg(range); e < end; e++) {
        const u32 escape = __ldg(w.escapes() + e);
        if (escape_row(escape) != lane) continue;
        const float weight = Float::first(escape_word(escape));
#pragma unroll
        for (u32 b = 0; b < kBatch; b++)
          if (b < batch) sum[b] = fmaf(weight, Float::first(x[(u64)b * cols + col0 + escape_col(escape)]), sum[b]);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (u32 b = 0; b < kBatch; b++) mine[b * 32 + lane] = sum[b];
  __syncthreads();
  for (u32 i = threadIdx.x; i < 32 * kBatch; i += blockDim.x) {
    const u32 b = i / 32, row = blockIdx.x * kRows + i % 32;
    if (b >= batch || row >= n_rows) continue;
    float total = 0;
    for (u32 other = 0; other < warps; other++) total += staged[other][i];
    if (bias) total += Float::first(bias[row]);
    y[(u64)b * n_rows + row] = Float::round(total);
  }
}
}  // namespace packed
}  // namespace ep

using namespace ep::packed;

// Rows 32 * first .. and n_rows of them. x: (batch, cols), y: (batch, n_rows), bias: (n_rows) or null.
// Grid: n_rows / 32. Block: whole warps, at most 1024 threads, 512 where more than one row of x is allowed.
#define EP_LINEAR(layout, dtype, most)                                                                               \
  extern "C" __global__ void __launch_bounds__(32 * kMaxWarps<most>, 1) linear_##layout##_##dtype##_##most(          \
      EP_BLOB, unsigned first, unsigned n_rows, const unsigned short* __restrict__ x,                                \
      const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, unsigned batch) {                     \
    const Weight w = EP_BLOB_GIVEN;                                                                                  \
    linear<lane_##layout, float_##dtype, most>(w, first, n_rows, x, bias, y, batch);                                 \
  }
#define EP_LINEARS(layout, dtype) \
  EP_LINEAR(layout, dtype, 1)     \
  EP_LINEAR(layout, dtype, 2)     \
  EP_LINEAR(layout, dtype, 4)     \
  EP_LINEAR(layout, dtype, 8)

using lane_fast = FastLane;
using lane_dense = DenseLane;
using float_bf16 = Bf16;
using float_fp16 = Fp16;

// All take long to compile, so who loads kernels names the layout and dtype that he wants.
#ifdef EP_LAYOUT
EP_LINEARS(EP_LAYOUT, EP_DTYPE)
#else
EP_LINEARS(fast, bf16)
EP_LINEARS(fast, fp16)
EP_LINEARS(dense, bf16)
EP_LINEARS(dense, fp16)
#endif
