// Packed weights (docs/PACKED.md) on the CPU: what lanes.h does for one lane, done for all, by threads. Where a lane's own
// instructions are slow here (a byte permutation is one of the GPU's), loops for the CPU take their place; the tests hold
// them against lanes.h, bit for bit.
#pragma once
#include <mutex>
#include <vector>

#include "lanes.h"
#include "loops.h"
#include "pool.h"

namespace ep {
namespace packed {

constexpr u32 kLongest = kCols * kWindow / 8;  // bytes of a stream
constexpr u32 kSide = 8;  // lanes decoded side by side: more rows would fall into the same set of a cache
constexpr u64 kAlign = 16, kHeader = 128;

inline u64 aligned(u64 size) { return (size + kAlign - 1) / kAlign * kAlign; }

// Where the sections lie; `lengths` only where dense, `escapes` only where fast.
struct Plan : Shape {
  bool dense;
  u64 table, index, lengths, low, codes, escapes;

  Plan(bool is_dense, u32 n_rows, u32 n_cols) : Shape{n_rows, n_cols}, dense(is_dense) {
    const u64 lanes = (u64)row_tiles() * groups() * kRows;
    table = kHeader;
    index = table + (dense ? 2 << kWindow : 16);
    lengths = aligned(index + 4 * (tiles() + 1));
    low = lengths + (dense ? tiles() * kRows : 0);
    codes = low + lanes * 16;
    escapes = codes + lanes * 8;
  }
  u64 tiles() const { return (u64)row_tiles() * col_tiles(); }
  // Bytes of a blob that has neither streams nor escapes.
  u64 least() const { return (dense ? codes : escapes) + kAlign; }
  u32 rows_in(u32 row_tile) const { return std::min<u32>(kRows, rows - row_tile * kRows); }
};

// Counts of the byte that is coded.
inline void histogram(const u16* words, u64 n, bool dense, int64_t counts[256], int threads) {
  constexpr u64 run = 1 << 20;
  std::fill(counts, counts + 256, 0);
  std::mutex mutex;
  Pool::run((n + run - 1) / run, threads, [&](size_t i) {
    u32 part[2][256] = {};  // two, since equal neighbours would wait for each other
    const u64 end = std::min(n, (i + 1) * run);
    for (u64 j = i * run; j < end; j++) part[j & 1][(dense ? rotate_left(words[j]) : words[j]) >> 8]++;
    std::lock_guard<std::mutex> lock(mutex);
    for (int s = 0; s < 256; s++) counts[s] += part[0][s] + part[1][s];
  });
}

// `index[1 + tile]`: units of 16 bytes, or escapes, up to and with this tile; `lengths` of all lanes, if dense.
inline void measure(const u16* words, const Plan& plan, const void* code, int64_t* index, u8* lengths, int threads) {
  const u32 tiles_across = plan.col_tiles();
  Pool::run(plan.row_tiles(), threads, [&](size_t t) {
    for (u32 k = 0; k < tiles_across; k++) {
      const u64 tile = t * tiles_across + k;
      const u32 n = plan.cols_in(k);
      u64 sum = 0;
      for (u32 lane = 0; lane < kRows; lane++) {
        const u64 row = t * kRows + lane;
        const u16* from = words + row * plan.cols + k * kCols;
        if (plan.dense) {
          const u32 bits = row < plan.rows ? dense_bits(from, n, static_cast<const u32*>(code)) : 0;
          sum += lengths[tile * kRows + lane] = (u8)((bits + 7) / 8);
        } else if (row < plan.rows) {
          for (u32 c = 0; c < n; c++) sum += static_cast<const u8*>(code)[from[c] >> 8] == kEscape;
        }
      }
      index[tile + 1] = (int64_t)(plan.dense ? aligned(sum) / kAlign : sum);
    }
  });
  index[0] = 0;
  for (u64 tile = 0; tile < plan.tiles(); tile++) index[tile + 1] += index[tile];
}

// The ranks of up to 16 words, their low bytes, and, behind `escapes`, those that have no rank.
inline void write_ranks(const u16* words, u32 n, const u8* rank, u32 row, u32 col, u8* low, u8* codes, u8*& escapes) {
  u64 ranks = 0;
  for (u32 i = 0; i < n; i++) ranks |= (u64)rank[words[i] >> 8] << 4 * i;
  std::memcpy(codes, &ranks, 8);
  for (u32 i = 0; i < n; i++) low[i] = (u8)words[i];
  // A nibble of ones is the only one that 1 is carried out of.
  if (!(((ranks & 0x7777777777777777) + 0x1111111111111111) & ranks & 0x8888888888888888)) return;
  for (u32 i = 0; i < n; i++)
    if ((ranks >> 4 * i & 15) == kEscape) low[i] = 0, put(escapes, escape_of(row, col + i, words[i]));
}

// dense_write, with stores of eight bytes that run past the end, which is returned.
inline u8* write_codes(const u16* words, u32 n, const u32* code, u8* out) {
  u64 have = 0;
  u32 count = 0;
  const auto append = [&](const u16* from, u32 some) {
    for (u32 i = 0; i < some; i++) {
      const u32 entry = code[rotate_left(from[i]) >> 8];
      have |= (u64)(entry & 0xFFFF) << count;
      count += entry >> 16;
    }
    std::memcpy(out, &have, 8);
    out += count / 8, have >>= count & ~7u, count %= 8;
  };
  for (; n >= 4; n -= 4, words += 4) append(words, 4);
  append(words, n);
  return out + (count > 0);
}

// Fills low plane, codes and escapes of a blob of zeros in which index and lane lengths already stand.
inline void write(const u16* words, const Plan& plan, const void* code, u8* blob, int threads) {
  Pool::run(plan.row_tiles(), threads, [&](size_t t) {
    for (u32 k = 0; k < plan.col_tiles(); k++) {
      const u64 tile = t * plan.col_tiles() + k, begin = load<u32>(blob + plan.index + 4 * tile);
      const u32 n = plan.cols_in(k), rows = plan.rows_in((u32)t);
      u8 streams[kRows * kLongest + 8], *end = streams;
      u8* escapes = blob + plan.escapes + begin * 4;
      for (u32 lane = 0; lane < rows; lane++) {
        const u16* from = words + (t * kRows + lane) * plan.cols + k * kCols;
        for (u32 c = 0; c < n; c += kGroup) {
          const u64 at = plan.group_at((u32)t, (k * kCols + c) / kGroup, lane);
          u8* low = blob + plan.low + at * kGroup;
          const auto group = [&](u32 some) {
            if (plan.dense)
              for (u32 i = 0; i < some; i++) low[i] = (u8)rotate_left(from[c + i]);
            else
              write_ranks(from + c, some, static_cast<const u8*>(code), lane, c, low, blob + plan.codes + at * 8, escapes);
          };
          n - c < kGroup ? group(n - c) : group(kGroup);  // the compiler unrolls what has a constant length
        }
        if (plan.dense) end = write_codes(from, n, static_cast<const u32*>(code), end);
      }
      std::memcpy(blob + plan.codes + begin * kAlign, streams, plan.dense ? end - streams : 0);
    }
  });
}

// Four bytes, each in 16 bits.
inline u64 spread(u32 bytes) {
  const u64 two = (bytes | (u64)bytes << 16) & 0x0000FFFF0000FFFF;
  return (two | two << 8) & 0x00FF00FF00FF00FF;
}

// Decodes tiles of a blob that nobody has checked: nothing outside of it is read, nothing but the tile written.
class Reader {
 public:
  Reader(const u8* blob, u64 nbytes, const Plan& plan) : blob_(blob), plan_(plan) {
    room_ = nbytes - plan.least();
    if (plan.dense)
      std::memcpy(entries_, blob + plan.table, sizeof entries_);
    else
      for (u32 two = 0; two < 256; two++)
        pairs_[two] = (u16)(blob[plan.table + two % 16] | blob[plan.table + two / 16] << 8);
    for (const u16 entry : entries_) sound_ &= (entry & 255) <= kWindow;
  }

  // The first `rows` rows of a tile to `out`, `stride` words apart. False if the tile is damaged.
  bool unpack(u32 t, u32 k, u32 rows, u16* out, u64 stride) const {
    u64 begin, end;
    if (!span(t, k, begin, end)) return false;
    return plan_.dense ? dense(t, k, begin, end, rows, out, stride) : fast(t, k, begin, end, rows, out, stride);
  }

  // Whether the escapes listed for a tile are those that its ranks ask for, in order.
  bool escapes_match(u32 t, u32 k) const {
    u64 next, end;
    if (!span(t, k, next, end)) return false;
    for (u32 lane = 0; lane < plan_.rows_in(t); lane++)
      for (u32 c = 0; c < plan_.cols_in(k); c++) {
        const u64 at = plan_.group_at(t, (k * kCols + c) / kGroup, lane);
        const u8 ranks = blob_[plan_.codes + at * 8 + c % kGroup / 2];
        if ((ranks >> 4 * (c & 1) & 15) != kEscape) continue;
        if (next == end || blob_[plan_.low + at * 16 + c % kGroup]) return false;
        const u32 listed = escape(next++);
        if (listed != escape_of(lane, c, escape_word(listed))) return false;
      }
    return next == end;
  }

 private:
  // What the index says of a tile. False if it exceeds what the blob has room for.
  bool span(u32 t, u32 k, u64& begin, u64& end) const {
    const u8* at = blob_ + plan_.index + 4 * ((u64)t * plan_.col_tiles() + k);
    begin = load<u32>(at), end = load<u32>(at + 4);
    return sound_ && begin <= end && end <= room_ / (plan_.dense ? kAlign : 4);
  }

  u32 escape(u64 i) const { return load<u32>(blob_ + plan_.escapes + 4 * i); }

  bool fast(u32 t, u32 k, u64 begin, u64 end, u32 rows, u16* out, u64 stride) const {
    const u32 n = plan_.cols_in(k);
    for (u32 lane = 0; lane < rows; lane++)
      for (u32 c = 0; c < n; c += kGroup) {
        const u64 at = plan_.group_at(t, (k * kCols + c) / kGroup, lane);
        const u8 *low = blob_ + plan_.low + at * kGroup, *codes = blob_ + plan_.codes + at * 8;
        u16 word[kGroup];
        for (u32 i = 0; i < kGroup; i += 4) {
          const u32 high = pairs_[codes[i / 2]] | (u32)pairs_[codes[i / 2 + 1]] << 16;
          const u64 four = spread(load<u32>(low + i)) | spread(high) << 8;
          std::memcpy(word + i, &four, 8);
        }
        std::memcpy(out + lane * stride + c, word, 2 * std::min<u32>(kGroup, n - c));
      }
    for (u64 i = begin; i < end; i++) {
      const u32 e = escape(i), row = escape_row(e), col = escape_col(e);
      if (row >= plan_.rows_in(t) || col >= n) return false;
      if (row < rows) out[row * stride + col] = (u16)escape_word(e);
    }
    return true;
  }

  bool dense(u32 t, u32 k, u64 begin, u64 end, u32 rows, u16* out, u64 stride) const {
    const u64 tile = (u64)t * plan_.col_tiles() + k, size = (end - begin) * kAlign;
    const u8* length = blob_ + plan_.lengths + tile * kRows;
    u64 filled = 0;
    for (u32 lane = 0; lane < kRows; lane++) {
      if (length[lane] > (lane < plan_.rows_in(t) ? kLongest : 0)) return false;
      filled += length[lane];
    }
    if (size != aligned(filled)) return false;
    u8 streams[kRows * kLongest + 512];  // a lane's words cannot lead further than 200 bytes past its start
    std::memcpy(streams, blob_ + plan_.codes + begin * kAlign, size);
    std::memset(streams + size, 0, 512);
    for (u64 i = filled; i < size; i++)
      if (streams[i]) return false;
    u32 bit[kRows + 1] = {};
    for (u32 lane = 0; lane < kRows; lane++) bit[lane + 1] = bit[lane] + 8 * length[lane];
    for (u32 lane = 0; lane < rows; lane += kSide)
      if (!side(streams, bit + lane, std::min<u32>(kSide, rows - lane), plan_.cols_in(k),
                plan_.group_at(t, k * (kCols / kGroup), lane), out + lane * stride, stride))
        return false;
    return true;
  }

  // Some lanes side by side, so that they hide each other's latency; `bit`: where they and the one behind them begin.
  // False unless each stream ends within the last byte before the next, whose unused bits are zero.
  bool side(const u8* streams, const u32* begin, u32 lanes, u32 n, u64 group, u16* out, u64 stride) const {
    u32 bit[kSide];
    std::copy(begin, begin + lanes, bit);
    const auto decode = [&](u32 i, u32 c, u32 count) {
      const u8* low = blob_ + plan_.low + (group + c / kGroup * kRows + i) * kGroup + c % kGroup;
      u64 have = load<u64>(streams + bit[i] / 8) >> bit[i] % 8, words = spread(load<u32>(low));
      u32 used = 0;
      for (u32 j = 0; j < count; j++) {
        const u64 entry = entries_[have & ((1 << kWindow) - 1)];
        words |= (entry & 0xFF00) << 16 * j;
        have >>= entry & 15, used += entry & 15;
      }
      bit[i] += used;
      words = (words >> 1 & 0x7FFF7FFF7FFF7FFF) | (words << 15 & 0x8000800080008000);
      std::memcpy(out + i * stride + c, &words, 2 * count);
    };
    for (u32 c = 0; c + 4 <= n; c += 4)
      for (u32 i = 0; i < lanes; i++) decode(i, c, 4);
    for (u32 i = 0; i < lanes && n % 4; i++) decode(i, n - n % 4, n % 4);
    for (u32 i = 0; i < lanes; i++) {
      const u32 spare = begin[i + 1] - bit[i];
      if (spare > 7 || streams[bit[i] / 8] >> bit[i] % 8 & ((1u << spare) - 1)) return false;
    }
    return true;
  }

  const u8* blob_;
  const Plan plan_;
  u64 room_;  // bytes that streams or escapes may take
  bool sound_ = true;
  u16 entries_[1 << kWindow] = {}, pairs_[256] = {};
};

// Runs `good` for every tile of rows [first, first + n); returns a tile for which it is false, or -1.
template <class F>
int64_t each_tile(const Plan& plan, u32 first, u32 n, int threads, F good) {
  std::vector<int64_t> bad((n + kRows - 1) / kRows, -1);
  Pool::run(bad.size(), threads, [&](size_t i) {
    const u32 t = first / kRows + (u32)i, rows = std::min<u32>(kRows, n - (u32)i * kRows);
    for (u32 k = 0; k < plan.col_tiles() && bad[i] < 0; k++)
      if (!good(t, k, rows)) bad[i] = (int64_t)t * plan.col_tiles() + k;
  });
  for (const int64_t tile : bad)
    if (tile >= 0) return tile;
  return -1;
}

inline int64_t unpack(const u8* blob, u64 nbytes, const Plan& plan, u32 first, u32 n, u16* out, int threads) {
  const Reader reader(blob, nbytes, plan);
  return each_tile(plan, first, n, threads, [&](u32 t, u32 k, u32 rows) {
    return reader.unpack(t, k, rows, out + ((u64)t * kRows - first) * plan.cols + k * kCols, plan.cols);
  });
}

inline int64_t check(const u8* blob, u64 nbytes, const Plan& plan, int threads) {
  const Reader reader(blob, nbytes, plan);
  return each_tile(plan, 0, plan.rows, threads, [&](u32 t, u32 k, u32 rows) {
    u16 scratch[kRows * kCols];
    return plan.dense ? reader.unpack(t, k, rows, scratch, kCols) : reader.escapes_match(t, k);
  });
}
}  // namespace packed
}  // namespace ep
