// The C interface. Built as one translation unit: c++ -O3 -std=c++17 -shared -fPIC -pthread codec.cpp
//
//   codec.h     the contract          docs/FORMAT.md the bytes
//   loops.h     block.inc, the inner loops, compiled for each instruction set
//   huffman.h   code lengths, canonical codes, tables
//   decode.h    segments to words     encode.h       words to segments
//   crc32c.h    checksums             pool.h         threads
//   packing.h   packed weights    lanes.h        one lane of them, as a GPU runs it too
//   df11.h      units of DFloat11 checkpoints
#include "codec.h"

#include <new>

#include "decode.h"
#include "df11.h"
#include "encode.h"
#include "packing.h"

namespace {
bool valid(int width, int rotate) {
  return (width == 1 || width == 2 || width == 4 || width == 8) && (rotate == 0 || rotate == 1);
}

using ep::packed::Plan;

bool packable(uint32_t rows, uint32_t cols, int layout) {
  return rows && cols && std::max(rows, cols) < 1u << 31 && (layout == 1 || layout == 2);
}

// Runs `work(plan, blob)`, which returns a damaged tile or -1, on a blob that has room for all its sections.
template <class F>
int64_t read_packed(const void* blob, uint64_t size, uint32_t rows, uint32_t cols, int layout, int64_t where[2], F work) {
  where[0] = where[1] = -1;
  if (!packable(rows, cols, layout)) return EP_BAD_ARGUMENT;
  const Plan plan(layout == 2, rows, cols);
  if (size < plan.least()) return EP_TRUNCATED;
  try {
    where[0] = work(plan, static_cast<const uint8_t*>(blob));
    return where[0] < 0 ? 0 : EP_BAD_TILE;
  } catch (const std::bad_alloc&) {
    return EP_NO_MEMORY;
  }
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

int64_t ep_df11_decode(const uint16_t* table, const void* codes, uint64_t size, const void* sign_mantissa,
                       const uint32_t* positions, const void* gaps, uint64_t words, void* dst, int threads,
                       int64_t where[2]) {
  where[0] = where[1] = -1;
  const auto bytes = [](const void* p) { return static_cast<const uint8_t*>(p); };
  const ep::df11::Unit unit{table, bytes(codes), 8 * size, bytes(sign_mantissa), positions, bytes(gaps), words};
  return ep::df11::decode(unit, static_cast<uint16_t*>(dst), std::max(1, threads), where);
}

int64_t ep_packed_histogram(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, int64_t counts[256],
                            int threads) {
  if (!packable(rows, cols, layout)) return EP_BAD_ARGUMENT;
  ep::packed::histogram(words, (uint64_t)rows * cols, layout == 2, counts, threads);
  return 0;
}

int64_t ep_packed_measure(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, const void* code,
                          int64_t* index, uint8_t* lengths, int threads) {
  if (!packable(rows, cols, layout)) return EP_BAD_ARGUMENT;
  ep::packed::measure(words, Plan(layout == 2, rows, cols), code, index, lengths, threads);
  return 0;
}

int64_t ep_packed_write(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, const void* code, void* blob,
                        int threads) {
  if (!packable(rows, cols, layout)) return EP_BAD_ARGUMENT;
  ep::packed::write(words, Plan(layout == 2, rows, cols), code, static_cast<uint8_t*>(blob), threads);
  return 0;
}

int64_t ep_packed_unpack(const void* blob, uint64_t size, uint32_t rows, uint32_t cols, int layout, uint32_t first,
                         uint32_t n, uint16_t* out, int threads, int64_t where[2]) {
  if (first % 32 || first > rows || n > rows - first) return where[0] = where[1] = -1, EP_BAD_ARGUMENT;
  return read_packed(blob, size, rows, cols, layout, where, [&](const Plan& plan, const uint8_t* bytes) {
    return ep::packed::unpack(bytes, size, plan, first, n, out, threads);
  });
}

int64_t ep_packed_check(const void* blob, uint64_t size, uint32_t rows, uint32_t cols, int layout, int threads,
                        int64_t where[2]) {
  return read_packed(blob, size, rows, cols, layout, where, [&](const Plan& plan, const uint8_t* bytes) {
    return ep::packed::check(bytes, size, plan, threads);
  });
}
}
