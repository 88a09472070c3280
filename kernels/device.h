// What the CUDA kernels share: the sections of a packed weight, a lane's way through a tile, floats as bits.
#pragma once
#include "lanes.h"

namespace ep {
namespace packed {
constexpr u32 kAll = 0xFFFFFFFFu;  // lanes of a warp

// How every kernel takes a packed weight: the blob and where its sections begin, in units of 16 bytes.
#define EP_BLOB                                                                                                       \
  const unsigned char *__restrict__ blob, unsigned low, unsigned codes, unsigned index, unsigned table, unsigned extra, \
      unsigned rows, unsigned cols
#define EP_BLOB_GIVEN {blob, low, codes, index, table, extra, {rows, cols}}

struct Weight {
  const u8* blob;
  u32 low_at, codes_at, index_at, table_at, extra_at;
  Shape shape;

  template <class T>
  __device__ __forceinline__ const T* at(u32 offset) const {
    return (const T*)(blob + (u64)offset * 16);
  }
  __device__ __forceinline__ const u32* index() const { return at<u32>(index_at); }
  __device__ __forceinline__ const uint4* low() const { return at<uint4>(low_at); }
  // Only of the fast layout.
  __device__ __forceinline__ const uint2* ranks() const { return at<uint2>(codes_at); }
  __device__ __forceinline__ const u32* escapes() const { return at<u32>(extra_at); }
};

// The sum over the lanes of a warp that stand before this one.
__device__ __forceinline__ u32 sum_before(u32 own) {
  const u32 lane = threadIdx.x % 32;
  u32 sum = own;
  for (u32 step = 1; step < kRows; step *= 2) {
    const u32 below = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += below;
  }
  return sum - own;
}

// One lane's row of one tile. `Raw` is what a group of 16 weights loads, so that loads can run ahead of decoding.
struct FastLane {
  static constexpr bool kEscapes = true;
  static constexpr u32 kSpan = 64;  // columns whose loads run ahead, in a product
  struct Raw {
    uint4 low;
    uint2 ranks;
  };
  struct Shared {};
  u32 table[4];
  const uint4* low;
  const uint2* ranks;
  u64 at;

  static __device__ __forceinline__ void share(const Weight&, Shared&) {}
  // `active`: whether the row is one of the matrix.
  __device__ __forceinline__ FastLane(const Weight& w, const Shared&, u32 row_tile, u32 col_tile, u32 lane, bool) {
    const uint4 t = __ldg(w.at<uint4>(w.table_at));
    table[0] = t.x, table[1] = t.y, table[2] = t.z, table[3] = t.w;
    low = w.low(), ranks = w.ranks();
    at = w.shape.group_at(row_tile, col_tile * (kCols / kGroup), lane);
  }
  __device__ __forceinline__ Raw load(u32 group) const {
    const u64 i = at + group * kRows;
    return {__ldg(low + i), __ldg(ranks + i)};
  }
  // The group's 16 words, two in each number.
  __device__ __forceinline__ void decode(const Raw& raw, u32 word[8]) {
    fast_words(raw.ranks.x, raw.low.x, table, word);
    fast_words(raw.ranks.x >> 16, raw.low.y, table, word + 2);
    fast_words(raw.ranks.y, raw.low.z, table, word + 4);
    fast_words(raw.ranks.y >> 16, raw.low.w, table, word + 6);
  }
  // The same of a group that may end with the matrix: after `left` columns, or at once where the row is beyond it. What is
  // beyond is 0, since a product with 0 must be 0.
  __device__ __forceinline__ void decode_edge(const Raw& raw, u32 left, u32 word[8]) {
    decode(raw, word);
#pragma unroll
    for (u32 i = 0; i < 8; i++) word[i] &= left > 2 * i + 1 ? 0xFFFFFFFFu : left > 2 * i ? 0xFFFFu : 0;
  }
};

struct DenseLane {
  static constexpr bool kEscapes = false;
  static constexpr u32 kSpan = 32;  // decoding takes the registers that more would need
  struct Raw {
    uint4 low;
  };
  struct Shared {
    alignas(16) u16 table[1 << kWindow];
  };
  const u16* table;
  const uint4* low;
  u64 at;
  Bits bits;
  bool active;

  // All threads of the block, with a barrier at the end.
  static __device__ __forceinline__ void share(const Weight& w, Shared& shared) {
    for (u32 i = threadIdx.x; i < sizeof(shared.table) / 16; i += blockDim.x)
      ((uint4*)shared.table)[i] = __ldg(w.at<uint4>(w.table_at) + i);
    __syncthreads();
  }
  // All lanes of a warp, for the same tile.
  __device__ __forceinline__ DenseLane(const Weight& w, const Shared& shared, u32 row_tile, u32 col_tile, u32 lane,
                                       bool active)
      : DenseLane(w, shared, row_tile, col_tile, lane, active,
                  [&](const u8* length) { return sum_before(__ldg(length + lane)); }) {}
  // A thread by itself: `start` gives, from the lengths of the tile's lanes, the sum of those before this one.
  template <class Start>
  __device__ __forceinline__ DenseLane(const Weight& w, const Shared& shared, u32 row_tile, u32 col_tile, u32 lane,
                                       bool active, Start start)
      : table(shared.table),
        low(w.low()),
        at(w.shape.group_at(row_tile, col_tile * (kCols / kGroup), lane)),
        bits(w.at<u32>(w.codes_at) + (u64)__ldg(w.index() + tile(w, row_tile, col_tile)) * 4,
             start(w.at<u8>(w.extra_at) + (u64)tile(w, row_tile, col_tile) * kRows)),
        active(active) {}
  static __device__ __forceinline__ u32 tile(const Weight& w, u32 row_tile, u32 col_tile) {
    return row_tile * w.shape.col_tiles() + col_tile;
  }
  __device__ __forceinline__ Raw load(u32 group) const { return {__ldg(low + at + group * kRows)}; }
  __device__ __forceinline__ void decode(const Raw& raw, u32 word[8]) {
    dense_words(bits, table, raw.low.x, word);
    dense_words(bits, table, raw.low.y, word + 2);
    dense_words(bits, table, raw.low.z, word + 4);
    dense_words(bits, table, raw.low.w, word + 6);
  }
  __device__ __forceinline__ void decode_edge(const Raw& raw, u32 left, u32 word[8]) {
    if (active && left >= kGroup) return decode(raw, word);
    // A row beyond the matrix has no stream, and none may be read for it: it could lie beyond the blob.
    const u32 low[4] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 n = !active || left <= 4 * i ? 0 : left - 4 * i < 4 ? left - 4 * i : 4;
      dense_words(bits, table, low[i], word + 2 * i, n);
    }
  }
};

__device__ __forceinline__ u32 half_of(const u32 word[8], u32 i) { return word[i / 2] >> 16 * (i & 1) & 0xFFFF; }

// Floats as their 16 bits. `two` holds a pair, as a lane decodes it.
struct Bf16 {
  static __device__ __forceinline__ float first(u32 two) { return __uint_as_float(two << 16); }
  static __device__ __forceinline__ float second(u32 two) { return __uint_as_float(two & 0xFFFF0000u); }
  static __device__ __forceinline__ u16 round(float x) {  // to nearest, ties to even
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;  // a NaN, which rounding up could turn into an infinity
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

struct Fp16 {
  static __device__ __forceinline__ float first(u32 two) { return widen((u16)two); }
  static __device__ __forceinline__ float second(u32 two) { return widen((u16)(two >> 16)); }
#ifdef __CUDA_ARCH__
  static __device__ __forceinline__ float widen(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
  static __device__ __forceinline__ u16 round(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
  }
#else
  // The same in integers, for the compiler of the CPU.
  static inline float widen(u16 bits) {
    const u32 sign = (u32)(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
    if (magnitude >= 0x400) return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
    const float x = (float)magnitude * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -x : x;
  }
  static inline u16 round(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return (u16)(sign | 0x7C00);  // from 65520 on
    if (magnitude < 0x38800000u) {                              // below 2^-14: the addition rounds at 2^-24
      return (u16)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u));
    }
    return (u16)(sign | ((magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13));
  }
#endif
};
}  // namespace packed
}  // namespace ep
