// Packed weights (docs/PACKED.md): where everything lies, and what one lane does with it. The same functions are compiled
// for the CPU, where tests hold them bit for bit against the Python oracle, and for the GPU. No includes: NVRTC has none.
#pragma once

#ifdef __CUDACC__
#define EP_BOTH __host__ __device__ __forceinline__
#else
#define EP_BOTH inline
#endif

namespace ep {
namespace packed {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

enum : int {
  kRows = 32,    // of a tile: one a lane
  kCols = 128,   // of a tile
  kGroup = 16,   // columns whose low bytes a lane loads at once
  kWindow = 12,  // bits of the longest code
  kEscape = 15,  // the rank that names no high byte
};

// A matrix of 16-bit words, row by row, cut into tiles of kRows x kCols; tiles are numbered row by row too.
struct Shape {
  u32 rows, cols;

  EP_BOTH u32 groups() const { return (cols + kGroup - 1) / kGroup; }
  EP_BOTH u32 row_tiles() const { return (rows + kRows - 1) / kRows; }
  EP_BOTH u32 col_tiles() const { return (cols + kCols - 1) / kCols; }
  EP_BOTH u32 cols_in(u32 col_tile) const {
    const u32 left = cols - col_tile * kCols;
    return left < (u32)kCols ? left : (u32)kCols;
  }
  // Of the 16 low bytes of a lane, in 16-byte units; its 8 bytes of ranks have the same number in 8-byte units.
  EP_BOTH u64 group_at(u32 row_tile, u32 group, u32 lane) const {
    return ((u64)row_tile * groups() + group) * kRows + lane;
  }
};

// Bytes of a and b, numbered 0 to 7, named by the four low nibbles of `select`, each at most 7.
EP_BOTH u32 permute(u32 a, u32 b, u32 select) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, select);
#else
  const u64 both = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return out;
#endif
}

// The words of four weights, two in each half of `word`, from four low and four high bytes.
EP_BOTH void interleave(u32 low, u32 high, u32 word[2]) {
  word[0] = permute(low, high, 0x5140);
  word[1] = permute(low, high, 0x7362);
}

// ---- fast: a rank of 4 bits for the high byte ----

// Four words from the low four ranks of `ranks`. Three permutations look up four of 16 bytes at once: one in each half of
// the table, one that chooses between them by the rank's top bit. An escaped weight has low byte 0 and comes out as 0.
EP_BOTH void fast_words(u32 ranks, u32 low, const u32 table[4], u32 word[2]) {
  const u32 select = ranks & 0x7777;
  const u32 lower = permute(table[0], table[1], select), upper = permute(table[2], table[3], select);
  interleave(low, permute(lower, upper, 0x3210 | (ranks >> 1 & 0x4444)), word);
}

// An escape: row and column within the tile and the whole word.
EP_BOTH u32 escape_of(u32 row, u32 col, u32 word) { return row << 23 | col << 16 | word; }
EP_BOTH u32 escape_row(u32 escape) { return escape >> 23; }
EP_BOTH u32 escape_col(u32 escape) { return escape >> 16 & 127; }
EP_BOTH u32 escape_word(u32 escape) { return escape & 0xFFFF; }

// ---- dense: a Huffman code for the high byte of the word rotated left by one ----

EP_BOTH u32 rotate_left(u32 word) { return (word << 1 | word >> 15) & 0xFFFF; }
// Both halves of `words` rotated right by one.
EP_BOTH u32 rotate_right2(u32 words) { return (words >> 1 & 0x7FFF7FFFu) | (words << 15 & 0x80008000u); }

// Bits of one lane, the first of them lowest. A word is loaded before it is needed, so up to twelve bytes past the
// lane's own are touched, and ignored.
struct Bits {
  const u32* next;
  u64 have;
  u32 ahead;
  int count;

  // From byte `at` of `words`, which are aligned to four bytes.
  EP_BOTH Bits(const u32* words, u32 at) {
    const int skip = 8 * (at & 3);
    next = words + at / 4;
    have = *next++ >> skip;
    count = 32 - skip;
    ahead = *next++;
  }
  // Afterwards there are at least 32 bits.
  EP_BOTH void refill() {
    if (count <= 32) {
      have |= (u64)ahead << count;
      count += 32;
      ahead = *next++;
    }
  }
  // An entry of the table of 2^12: symbol << 8 | bits of its code.
  EP_BOTH u32 take(const u16* table) {
    const u32 entry = table[have & ((1 << kWindow) - 1)];
    have >>= entry & 15;
    count -= entry & 15;
    return entry;
  }
};

// The next four words. `low`: their low bytes.
EP_BOTH void dense_words(Bits& bits, const u16* table, u32 low, u32 word[2]) {
  bits.refill();
  const u32 a = bits.take(table), b = bits.take(table);
  bits.refill();
  const u32 c = bits.take(table), d = bits.take(table);
  interleave(low, permute(permute(a, b, 0x0051), permute(c, d, 0x0051), 0x5410), word);
  word[0] = rotate_right2(word[0]);
  word[1] = rotate_right2(word[1]);
}

// The next `n` < 4 words, as above; the rest of `word` is without meaning.
EP_BOTH void dense_words(Bits& bits, const u16* table, u32 low, u32 word[2], u32 n) {
  u32 high = 0;
  for (u32 i = 0; i < n; i++) {
    bits.refill();
    high |= (bits.take(table) >> 8) << 8 * i;
  }
  interleave(low, high, word);
  word[0] = rotate_right2(word[0]);
  word[1] = rotate_right2(word[1]);
}

// Bits that the lane's `n` words take. `code[symbol]`: length << 16 | code, its first bit lowest.
EP_BOTH u32 dense_bits(const u16* words, u32 n, const u32* code) {
  u32 bits = 0;
  for (u32 i = 0; i < n; i++) bits += code[rotate_left(words[i]) >> 8] >> 16;
  return bits;
}

// Writes them at `out` in bytes, since the next lane's begin right behind.
EP_BOTH void dense_write(const u16* words, u32 n, const u32* code, u8* out) {
  u32 have = 0, count = 0;
  for (u32 i = 0; i < n; i++) {
    const u32 entry = code[rotate_left(words[i]) >> 8];
    have |= (entry & 0xFFFF) << count;
    count += entry >> 16;
    for (; count >= 8; count -= 8, have >>= 8) *out++ = (u8)have;
  }
  if (count) *out = (u8)have;
}
}  // namespace packed
}  // namespace ep
