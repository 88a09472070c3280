// The C interface. Built as one translation unit: c++ -O3 -std=c++17 -shared -fPIC -pthread codec.cpp
//
//   codec.h     the contract          docs/FORMAT.md the bytes
//   loops.h     block.inc, the inner loops, compiled for each instruction set
//   huffman.h   code lengths, canonical codes, tables
//   decode.h    segments to words     encode.h       words to segments
//   crc32c.h    checksums             pool.h         threads
#include "codec.h"

#include <new>

#include "decode.h"
#include "encode.h"

namespace {
bool valid(int width, int rotate) {
  return (width == 1 || width == 2 || width == 4 || width == 8) && (rotate == 0 || rotate == 1);
}
}  // namespace

extern "C" {

int ep_abi() { return EP_ABI; }

const char* ep_isa() { return ep::isa().name; }

uint32_t ep_crc32c(const void* data, size_t n) { return ep::crc32c(data, n); }

int64_t ep_encode_bound(uint64_t words, int width) {
  const uint64_t blocks = (words >> EP_BLOCK_LOG2) + 1;
  const uint64_t bytes = words * width;
  return (int64_t)(bytes + blocks * (64 + width * (160 + 4 * EP_STREAMS)) + 64);
}

int64_t ep_encode(const void* src, uint64_t words, int width, int rotate, void* dst, uint64_t capacity, int threads,
                  int64_t where[2]) {
  where[0] = where[1] = -1;
  if (!valid(width, rotate)) return EP_BAD_ARGUMENT;
  if (!words) return 0;
  try {
    ep::Encoder encoder(static_cast<const uint8_t*>(src), words, width, rotate, std::max(1, threads));
    encoder.plan();
    return encoder.encode(static_cast<uint8_t*>(dst), capacity, where);
  } catch (const std::bad_alloc&) {
    return EP_NO_MEMORY;
  }
}

int64_t ep_predict(const void* src, uint64_t words, int width, int rotate, int threads, int64_t where[2]) {
  where[0] = where[1] = -1;
  if (!valid(width, rotate)) return EP_BAD_ARGUMENT;
  if (!words) return 0;
  try {
    ep::Encoder encoder(static_cast<const uint8_t*>(src), words, width, rotate, std::max(1, threads));
    encoder.plan();
    return encoder.predict();
  } catch (const std::bad_alloc&) {
    return EP_NO_MEMORY;
  }
}

int64_t ep_decode(const void* src, uint64_t size, uint64_t words, int width, int rotate, int block_log2, void* dst,
                  int threads, int64_t where[2]) {
  where[0] = where[1] = -1;
  if (!valid(width, rotate) || block_log2 < EP_MIN_BLOCK_LOG2 || block_log2 > EP_MAX_BLOCK_LOG2)
    return EP_BAD_ARGUMENT;
  try {
    return ep::decode(static_cast<const uint8_t*>(src), size, words, width, rotate, block_log2,
                      static_cast<uint8_t*>(dst), nullptr, std::max(1, threads), where);
  } catch (const std::bad_alloc&) {
    return EP_NO_MEMORY;
  }
}
}
