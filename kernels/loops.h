// The inner loops of block.inc for every instruction set, and the choice among them; a worker's memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "codec.h"
#include "huffman.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read in place, so the processor must be little-endian"
#endif

namespace ep {
namespace {

constexpr size_t kSlack = 32;  // bytes after each decoded stream that wide stores may spoil
constexpr int kMaxWidth = 8;
enum Mode : uint8_t { kRaw = 0, kConstant = 1, kHuffman = 2 };

inline uint64_t load_big(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return __builtin_bswap64(x);
}
inline void store_big(uint8_t* p, uint64_t x) {
  x = __builtin_bswap64(x);
  std::memcpy(p, &x, 8);
}
inline void store_raw(uint8_t* p, uint64_t x) { std::memcpy(p, &x, 8); }
template <class T>
inline T load(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline uint16_t load16(const uint8_t* p) { return load<uint16_t>(p); }
template <class T>
inline void put(uint8_t*& p, T x) {
  std::memcpy(p, &x, sizeof x);
  p += sizeof x;
}

// The loops of block.inc for one word width and one instruction set.
struct Loops {
  void (*split)(const uint8_t*, size_t, uint8_t* const*);
  void (*split_rotated)(const uint8_t*, size_t, uint8_t* const*);
  void (*merge)(uint8_t*, size_t, const uint8_t* const*);
  void (*merge_rotated)(uint8_t*, size_t, const uint8_t* const*);
  void (*histogram)(const uint8_t*, size_t, uint32_t*);
  uint8_t* (*encode_stream)(const EncodeTable&, const uint8_t*, size_t, uint8_t*);
  bool (*decode_streams)(const uint64_t*, const uint8_t*, const uint8_t*, const uint8_t*, size_t, uint8_t*,
                         const uint8_t*, int);
};

namespace portable {
#include "block.inc"
}

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt,movbe")
#endif
namespace avx2 {
#include "block.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,bmi,bmi2,lzcnt,movbe,prefer-vector-width=512")
#endif
namespace avx512 {
#include "block.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Isa {
  const char* name;
  const Loops* loops;
};

// The best set the processor has, or a lesser one named by ENTROPRESS_ISA, so that every path can be tested anywhere.
const Isa& isa() {
  static const Isa chosen = [] {
    const char* limit = std::getenv("ENTROPRESS_ISA");
    const auto allowed = [&](const char* name) { return !limit || !*limit || !std::strcmp(limit, name); };
#if defined(__x86_64__)
    if (allowed("avx512") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
      return Isa{"avx512", avx512::kLoops};
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
      return Isa{"avx2", avx2::kLoops};
    return Isa{"portable", portable::kLoops};
#elif defined(__aarch64__)
    (void)allowed;
    return Isa{"neon", portable::kLoops};  // the compiler's baseline has NEON
#else
    (void)allowed;
    return Isa{"portable", portable::kLoops};
#endif
  }();
  return chosen;
}

const Loops& loops_of(int width) { return isa().loops[__builtin_ctz(width)]; }

// What a thread needs besides its input and output; kept between calls.
struct Worker {
  LutScratch lut_scratch;
  Lut lut[kMaxWidth];
  Code code[kMaxWidth];
  EncodeTable encode[kMaxWidth];
  uint8_t mode[kMaxWidth];
  std::vector<uint8_t> plane[kMaxWidth], check;

  static Worker& mine() {
    thread_local std::unique_ptr<Worker> worker(new Worker);
    return *worker;
  }
};

// The first failure in stream order, whichever thread meets it.
class Failure {
 public:
  void report(int64_t error, int64_t segment, int64_t block) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_ && std::make_pair(segment, block) >= std::make_pair(segment_, block_)) return;
    error_ = error, segment_ = segment, block_ = block;
  }
  int64_t result(int64_t where[2]) const {
    where[0] = segment_, where[1] = block_;
    return error_;
  }
  explicit operator bool() {
    std::lock_guard<std::mutex> lock(mutex_);
    return error_ != 0;
  }

 private:
  std::mutex mutex_;
  int64_t error_ = 0, segment_ = -1, block_ = -1;
};
}  // namespace
}  // namespace ep
