// What CUDA has built in, for kernels that the emulator runs: words, vectors, meetings of threads, small functions.
#pragma once
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static thread_local
#define __launch_bounds__(...)  // simt.py reads them
#define alignas(n) __attribute__((aligned(n)))  // which, unlike the keyword, may stand behind `static`

#define SIMT_VECTOR(T, name, n)         \
  struct alignas(2 * n) name##2 {       \
    T x, y;                             \
  };                                    \
  struct alignas(4 * n) name##4 {       \
    T x, y, z, w;                       \
  };                                    \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(unsigned char, uchar, 1)
SIMT_VECTOR(unsigned short, ushort, 2)
SIMT_VECTOR(unsigned, uint, 4)
SIMT_VECTOR(int, int, 4)
SIMT_VECTOR(float, float, 4)
#undef SIMT_VECTOR

inline void __syncthreads(int line = __builtin_LINE()) { simt::meet(simt::kAtBlock, line, simt::kBarrier, 0, 0, 0); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  simt::meet(simt::kAtWarp, line, simt::kBarrier, mask, 0, simt::current % simt::kWarp);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return (unsigned)simt::meet(simt::kAtWarp, line, simt::kBallot, mask, predicate != 0, 0);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

namespace simt {
template <class T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move four or eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet(kAtWarp, line, kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace simt

// `width` divides the warp into parts that shuffle among themselves; who would read beyond his part reads himself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current % simt::kWarp;
  return simt::shuffle(mask, value, (lane & -width) + (source & (width - 1)), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current % simt::kWarp, from = lane - (int)by;
  return simt::shuffle(mask, value, from < (lane & -width) ? lane : from, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current % simt::kWarp, from = lane + (int)by;
  return simt::shuffle(mask, value, from >= (lane & -width) + width ? lane : from, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current % simt::kWarp, from = lane ^ with;
  return simt::shuffle(mask, value, from >= (lane & -width) + width ? lane : from, line);
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T, class U>
T atomicAdd(T* at, U value) {
  const T old = *at;
  *at = (T)(old + (T)value);
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
