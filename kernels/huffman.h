// Code lengths, canonical codes and the multi-symbol decoding table.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>

#include "codec.h"

namespace ep {

constexpr int kBits = EP_MAX_CODE_BITS, kTable = 1 << kBits;
constexpr int kMaxSymbols = 6;  // of one decoding step: what fits in an entry beside its two counters

// 256 * log2(x), floored: FORMAT.md, canonical encoder, rule 3. The eight squarings depend only on the 16 bits after the
// leading one, so they are done once for each.
inline uint32_t log2_fixed(uint64_t x) {
  static const auto* const fraction = [] {
    auto* table = new std::array<uint8_t, 65536>;
    for (uint64_t i = 0; i < 65536; i++) {
      uint64_t y = 65536 + i;
      uint32_t r = 0;
      for (int step = 0; step < 8; step++) {
        y = (y * y) >> 16, r *= 2;
        if (y >= 131072) y >>= 1, r++;
      }
      (*table)[i] = (uint8_t)r;
    }
    return table;
  }();
  const int k = 63 - __builtin_clzll(x);
  return (uint32_t)k << 8 | (*fraction)[((x << 16) >> k) & 65535];
}

// Optimal lengths of at most kBits by package-merge (Larmore and Hirschberg, 1990). Because leaves are taken in sorted
// order at every level, it suffices to remember, level by level, which of the merged items are leaves.
inline void code_lengths(const uint32_t count[256], uint8_t length[256]) {
  uint64_t leaf[256];
  int m = 0;
  std::memset(length, 0, 256);
  for (int s = 0; s < 256; s++)
    if (count[s]) leaf[m++] = (uint64_t)count[s] << 8 | s;
  if (m < 2) return;
  std::sort(leaf, leaf + m);

  uint64_t item[2][512];
  bool is_leaf[kBits][512];
  int size = 0;
  for (int level = 0; level < kBits; level++) {
    const uint64_t* below = item[level & 1];
    uint64_t* here = item[~level & 1];
    int pairs = size / 2, a = 0, b = 0, n = 0;
    while (a < m || b < pairs) {
      uint64_t pair = b < pairs ? below[2 * b] + below[2 * b + 1] : ~0ull;
      bool take_leaf = a < m && leaf[a] >> 8 <= pair;
      is_leaf[level][n] = take_leaf;
      here[n++] = take_leaf ? leaf[a] >> 8 : pair;
      a += take_leaf, b += !take_leaf;
    }
    size = n;
  }
  for (int level = kBits - 1, take = 2 * m - 2; level >= 0; level--) {
    int leaves = 0;
    for (int i = 0; i < take; i++) leaves += is_leaf[level][i];
    for (int i = 0; i < leaves; i++) length[leaf[i] & 255]++;
    take = 2 * (take - leaves);
  }
}

// A complete code in canonical order. `symbol` lists the m used symbols by (length, symbol).
struct Code {
  uint8_t length[256];
  uint16_t bits[256];
  uint8_t symbol[256];
  int m;
};

// False unless the lengths form a complete code of at least two symbols.
inline bool canonical(Code& c) {
  int used[kBits + 1] = {}, next[kBits + 1], sum = 0;
  for (int s = 0; s < 256; s++) {
    if (c.length[s] > kBits) return false;
    used[c.length[s]]++;
  }
  used[0] = c.m = 0;
  for (int l = 1, code = 0; l <= kBits; l++) {
    next[l] = code;
    code = (code + used[l]) << 1;
    sum += used[l] << (kBits - l);
    c.m += used[l];
  }
  if (sum != kTable || c.m < 2) return false;
  int at[kBits + 2] = {};
  for (int l = 1; l <= kBits; l++) at[l + 1] = at[l] + used[l];
  for (int s = 0; s < 256; s++)
    if (int l = c.length[s]) c.bits[s] = (uint16_t)next[l]++, c.symbol[at[l]++] = (uint8_t)s;
  return true;
}

// Codes ready to be written: length << 24 | bits, of single symbols and of pairs indexed by the low six bits of each.
struct EncodeTable {
  uint32_t one[256], pair[64 * 64];
  bool paired;  // no two used symbols agree in their low six bits
};

inline void build_encode_table(const Code& c, EncodeTable& t) {
  bool seen[64] = {};
  t.paired = true;
  for (int s = 0; s < 256; s++) t.one[s] = (uint32_t)c.length[s] << 24 | c.bits[s];
  for (int i = 0; i < c.m; i++) {
    bool& taken = seen[c.symbol[i] & 63];
    t.paired &= !taken;
    taken = true;
  }
  if (!t.paired) return;
  for (int j = 0; j < c.m; j++)
    for (int i = 0; i < c.m; i++) {
      const uint32_t a = t.one[c.symbol[i]], b = t.one[c.symbol[j]];
      t.pair[(c.symbol[j] & 63) << 6 | (c.symbol[i] & 63)] =
          (a & ~0xFFFFFFu) + (b & ~0xFFFFFFu) + ((a & 0xFFFF) << (b >> 24) | (b & 0xFFFF));
    }
}

// One entry a 12-bit window: as many whole codes as it holds, six at most. Bits 0-7: their total length; 8-15: how many;
// 16-63: the symbols, first one lowest. Length sits lowest so that an entry is its own shift count, and four entries can
// be added without the two small fields overflowing.
struct Lut {
  alignas(64) uint64_t entry[kTable];
};

// Tables of at most k + 1 symbols over windows of w < 12 bits, at [k][1 << w].
using LutScratch = uint64_t[kMaxSymbols - 1][kTable];

// Table over w bits with at most k symbols: every range owned by a first symbol of length l is the table over w - l bits
// with at most k - 1 symbols, with that symbol put in front. Narrow tables first; all copies are contiguous.
inline void build_lut(const Code& c, Lut& lut, LutScratch& scratch) {
  const int shortest = c.length[c.symbol[0]];
  for (int k = 1; k <= kMaxSymbols; k++) {
    const int widest = kBits - (kMaxSymbols - k) * shortest;
    for (int w = k == kMaxSymbols ? kBits : 0; w <= widest; w++) {
      uint64_t* to = k == kMaxSymbols ? lut.entry : scratch[k - 1] + (1 << w);
      uint64_t* const end = to + (1 << w);
      for (int i = 0; i < c.m && c.length[c.symbol[i]] <= w; i++) {
        const uint64_t s = c.symbol[i], l = c.length[s];
        const int n = 1 << (w - l);
        const uint64_t front = s << 16 | 1 << 8 | l;
        if (k == 1) {
          for (int j = 0; j < n; j++) to[j] = front;
        } else {
          const uint64_t* from = scratch[k - 2] + n;
          for (int j = 0; j < n; j++) to[j] = (from[j] >> 16 << 24) + (from[j] & 0xFFFF) + front;
        }
        to += n;
      }
      for (; to < end; to++) *to = 0;
    }
  }
}
}  // namespace ep
