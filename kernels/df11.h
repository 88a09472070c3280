// The exponents of one DFloat11 unit (arXiv 2504.11651): a stream of Huffman codes, first bit highest, cut into blocks of
// kWindows windows of 64 bits. `gaps` says where the first code of each window begins, `positions` which weight a block
// begins with. A block is decoded in one go, and what is met at each window is held against its gap.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>

#include "codec.h"
#include "pool.h"

namespace ep {
namespace df11 {
enum : uint64_t { kWindows = 512, kWindowBits = 64, kBlockBits = kWindows * kWindowBits };
enum : int { kDead = 0, kLongest = 32, kPointer = 64 };  // in the low byte of an entry: a length, or what it is instead

struct Unit {
  const uint16_t* table;  // 256 entries a row; high byte: the symbol, or the row that the next eight bits choose from
  const uint8_t* codes;   // followed by EP_TAIL readable bytes
  uint64_t bits;
  const uint8_t* sign_mantissa;
  const uint32_t* positions;
  const uint8_t* gaps;  // five bits each
  uint64_t words;
};

inline uint64_t gap(const Unit& u, uint64_t window) {
  const uint64_t bit = 5 * window;
  const uint8_t* p = u.gaps + (bit >> 3);
  const int spare = 11 - (int)(bit & 7);
  const uint32_t two = (uint32_t)p[0] << 8 | (spare < 8 ? p[1] : 0);  // a gap ends in p[0] or in p[1]
  return two >> spare & 31;
}

inline uint64_t load_be(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// False where the block's codes, gaps and number of weights contradict each other. Positions never decrease.
inline bool decode_block(const Unit& u, uint64_t block, uint16_t* out) {
  const uint64_t first = block * kWindows, end = u.positions[block + 1];
  uint64_t i = u.positions[block], at = block * kBlockBits + gap(u, first);
  for (uint64_t window = first; window < first + kWindows; window++) {
    if (i == u.words) return at <= u.bits;
    const uint64_t start = window * kWindowBits, stop = std::min(start + kWindowBits, u.bits);
    if (at != start + gap(u, window)) return false;
    while (at < stop && i < end) {
      uint64_t bits = load_be(u.codes + (at >> 3)) << (at & 7);  // 57 at least
      const uint64_t refill = std::min(stop, at + 57 - kLongest + 1);
      while (at < refill && i < end) {
        uint16_t entry = u.table[bits >> 56];
        for (int shift = 48; (entry & 255) == kPointer && shift >= 32; shift -= 8)
          entry = u.table[(entry >> 8) * 256 + (bits >> shift & 255)];
        const int length = entry & 255;
        if (length == kDead || length > kLongest) return false;
        bits <<= length, at += length;
        const int other = u.sign_mantissa[i];
        out[i++] = (uint16_t)((other & 0x80) << 8 | (entry >> 8) << 7 | (other & 0x7f));
      }
    }
    if (at < stop && end != u.words) return false;
  }
  const uint64_t next = (block + 1) * kBlockBits;
  return i == end && (end == u.words ? at <= u.bits : next < u.bits && at == next + gap(u, first + kWindows));
}

// 0, or EP_BAD_STREAM with the first bad block in where[1].
inline int64_t decode(const Unit& u, uint16_t* out, int threads, int64_t where[2]) {
  const uint64_t blocks = (u.bits + kBlockBits - 1) / kBlockBits;
  std::atomic<uint64_t> bad{blocks};
  Pool::run(blocks, threads, [&](size_t block) {
    if (decode_block(u, block, out)) return;
    uint64_t seen = bad.load();
    while (block < seen && !bad.compare_exchange_weak(seen, block)) {
    }
  });
  if (bad == blocks) return 0;
  where[1] = (int64_t)bad.load();
  return EP_BAD_STREAM;
}
}  // namespace df11
}  // namespace ep
