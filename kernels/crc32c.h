// CRC-32C of a buffer: hardware instructions where present, eight-table slicing elsewhere.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace ep {

struct CrcTables {
  uint32_t t[8][256];
  constexpr CrcTables() : t() {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
      t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
      for (int j = 1; j < 8; j++) t[j][i] = (t[j - 1][i] >> 8) ^ t[0][t[j - 1][i] & 255];
  }
};
inline constexpr CrcTables kCrc;

inline uint32_t crc_portable(uint32_t c, const uint8_t* p, size_t n) {
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t x;
    std::memcpy(&x, p, 8);
    x ^= c;
    c = kCrc.t[7][x & 255] ^ kCrc.t[6][x >> 8 & 255] ^ kCrc.t[5][x >> 16 & 255] ^ kCrc.t[4][x >> 24 & 255] ^
        kCrc.t[3][x >> 32 & 255] ^ kCrc.t[2][x >> 40 & 255] ^ kCrc.t[1][x >> 48 & 255] ^ kCrc.t[0][x >> 56];
  }
  for (; n; n--) c = (c >> 8) ^ kCrc.t[0][(c ^ *p++) & 255];
  return c;
}

#if defined(__x86_64__)

// x^bits mod P with x^i at bit 31 - i, the order in which the crc32 instruction keeps its register.
constexpr uint32_t crc_power(uint64_t bits) {
  uint32_t c = 1u << 31;
  for (uint64_t i = 0; i < bits; i++) c = c & 1 ? c >> 1 ^ 0x82F63B78u : c >> 1;
  return c;
}

// One chain of the instruction runs at a third of its throughput, so three runs of 1 KiB go side by side. A carry-less
// product followed by the instruction multiplies by x^33 too many, hence the exponents.
__attribute__((target("sse4.2,pclmul"))) inline uint32_t crc_sse42(uint32_t crc, const uint8_t* p, size_t n) {
  constexpr size_t kRun = 1024;
  constexpr uint32_t one = crc_power(8 * kRun - 33), two = crc_power(16 * kRun - 33);
  uint64_t a = crc, x;
  auto moved = [](uint64_t c, uint32_t by) __attribute__((target("sse4.2,pclmul"))) {
    return (uint64_t)_mm_cvtsi128_si64(
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)c), _mm_cvtsi64_si128((int64_t)by), 0));
  };
  for (; n >= 3 * kRun; p += 3 * kRun, n -= 3 * kRun) {
    uint64_t b = 0, c = 0;
    for (size_t i = 0; i < kRun; i += 8) {
      std::memcpy(&x, p + i, 8), a = _mm_crc32_u64(a, x);
      std::memcpy(&x, p + kRun + i, 8), b = _mm_crc32_u64(b, x);
      std::memcpy(&x, p + 2 * kRun + i, 8), c = _mm_crc32_u64(c, x);
    }
    a = c ^ _mm_crc32_u64(0, moved(a, two) ^ moved(b, one));
  }
  for (; n >= 8; n -= 8, p += 8) std::memcpy(&x, p, 8), a = _mm_crc32_u64(a, x);
  for (; n; n--) a = _mm_crc32_u8((uint32_t)a, *p++);
  return (uint32_t)a;
}

// Folds 256 bytes at a time: each 128-bit lane V becomes V * x^2048 mod P, as (low half) * x^(2048+63) plus
// (high half) * x^(2048-1), the odd x being the one that the reflected product adds.
__attribute__((target("avx512f,avx512vl,vpclmulqdq,sse4.2,pclmul"))) inline uint32_t crc_avx512(uint32_t crc,
                                                                                               const uint8_t* p,
                                                                                               size_t n) {
  if (n < 512) return crc_sse42(crc, p, n);
  constexpr auto high = [](uint64_t bits) constexpr { return (long long)((uint64_t)crc_power(bits) << 32); };
  const __m512i by4 = _mm512_set_epi64(high(2047), high(2111), high(2047), high(2111), high(2047), high(2111),
                                       high(2047), high(2111));
  const __m512i by1 = _mm512_set_epi64(high(511), high(575), high(511), high(575), high(511), high(575), high(511),
                                       high(575));
#define EP_FOLD(v, k, next)                                                                         \
  _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(v, k, 0x00), _mm512_clmulepi64_epi128(v, k, 0x11), next, 0x96)
  __m512i v[4];
  for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(p + 64 * i);
  v[0] = _mm512_xor_si512(v[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
  for (p += 256, n -= 256; n >= 256; p += 256, n -= 256)
    for (int i = 0; i < 4; i++) v[i] = EP_FOLD(v[i], by4, _mm512_loadu_si512(p + 64 * i));
  for (int i = 1; i < 4; i++) v[i] = EP_FOLD(v[i - 1], by1, v[i]);
#undef EP_FOLD
  uint64_t rest[8], a = 0;
  _mm512_storeu_si512(rest, v[3]);
  for (uint64_t x : rest) a = _mm_crc32_u64(a, x);
  return crc_sse42((uint32_t)a, p, n);
}

#endif

#if defined(__ARM_FEATURE_CRC32)
inline uint32_t crc_arm(uint32_t c, const uint8_t* p, size_t n) {
  uint64_t x;
  for (; n >= 8; n -= 8, p += 8) std::memcpy(&x, p, 8), c = __crc32cd(c, x);
  for (; n; n--) c = __crc32cb(c, *p++);
  return c;
}
#endif

using CrcUpdate = uint32_t (*)(uint32_t, const uint8_t*, size_t);

// Heeds ENTROPRESS_ISA as loops.h does, so that every path can be tested anywhere.
inline CrcUpdate crc_choose() {
  const char* limit = std::getenv("ENTROPRESS_ISA");
  const bool narrow = limit && !std::strcmp(limit, "avx2");
  if (limit && !std::strcmp(limit, "portable")) return crc_portable;
#if defined(__x86_64__)
  if (!narrow && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("vpclmulqdq")) return crc_avx512;
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) return crc_sse42;
#elif defined(__ARM_FEATURE_CRC32)
  if (!narrow) return crc_arm;
#endif
  return crc_portable;
}

inline uint32_t crc32c(const void* data, size_t n) {
  static const CrcUpdate update = crc_choose();
  return ~update(~0u, static_cast<const uint8_t*>(data), n);
}
}  // namespace ep
