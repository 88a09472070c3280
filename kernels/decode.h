// From segments to words. Nothing read is trusted before it is checked.
#pragma once
#include "crc32c.h"
#include "loops.h"
#include "pool.h"

namespace ep {
namespace {
// A parsed segment. The tables themselves are built in the worker that decodes its blocks.
struct Segment {
  int width, rotate, huffman = 0, constant = 0;
  size_t block_words, words;
  uint64_t n_blocks;
  const uint8_t *directory, *payload;
  uint8_t mode[kMaxWidth], value[kMaxWidth];
  std::vector<uint64_t> offset;  // of each block in the payload, and the end

  size_t entry_bytes() const { return 4 + 2 * EP_STREAMS * huffman; }
  size_t words_in(uint64_t block) const {
    return block + 1 < n_blocks ? block_words : words - (n_blocks - 1) * block_words;
  }
};

// Reads everything before the payload of the segment at p into `s` and, for Huffman planes, w.code. The caller has
// checked that meta + payload bytes are there and that the blocks make sense.
int64_t parse_segment(const uint8_t* p, Segment& s, Worker& w) {
  const uint64_t meta = load<uint32_t>(p + 4), payload = load<uint64_t>(p + 8);
  const uint8_t *end = p + meta - 4, *at = p + EP_SEGMENT_HEAD;
  if (crc32c(p, meta - 4) != load<uint32_t>(end)) return EP_BAD_META;
  for (int k = 0; k < s.width; k++) {
    if (at == end) return EP_BAD_SEGMENT;
    s.mode[k] = *at++;
    if (s.mode[k] == kConstant) {
      if (at == end) return EP_BAD_SEGMENT;
      s.value[k] = *at++, s.constant++;
    } else if (s.mode[k] == kHuffman) {
      if (end - at < 2) return EP_BAD_SEGMENT;
      const int first = *at++, last = *at++, n = last - first + 1;
      if (n < 2) return EP_BAD_TABLE;
      if (end - at < (n + 1) / 2) return EP_BAD_SEGMENT;
      uint8_t* length = w.code[k].length;
      std::memset(length, 0, 256);
      for (int i = 0; i < n; i++) length[first + i] = at[i / 2] >> 4 * (i & 1) & 15;
      if ((n & 1 && at[n / 2] >> 4) || !length[first] || !length[last] || !canonical(w.code[k])) return EP_BAD_TABLE;
      at += (n + 1) / 2, s.huffman++;
    } else if (s.mode[k] != kRaw) {
      return EP_BAD_TABLE;
    }
  }
  s.directory = at, s.payload = end + 4;
  if (s.constant == s.width) return at == end && !payload ? 0 : EP_BAD_SEGMENT;
  if ((uint64_t)(end - at) != s.n_blocks * s.entry_bytes()) return EP_BAD_SEGMENT;
  s.offset.resize(s.n_blocks + 1);
  uint64_t sum = 0;
  const uint64_t raw = s.width - s.constant - s.huffman;
  for (uint64_t b = 0; b < s.n_blocks; b++, at += s.entry_bytes()) {
    s.offset[b] = sum;
    sum += raw * s.words_in(b);
    for (int i = 0; i < EP_STREAMS * s.huffman; i++) sum += load16(at + 4 + 2 * i);
  }
  s.offset[s.n_blocks] = sum;
  return sum == payload ? 0 : EP_BAD_SEGMENT;
}

void prepare_tables(const Segment& s, Worker& w) {
  const size_t plane_bytes = s.block_words + EP_STREAMS * (kSlack + 1);
  for (int k = 0; k < s.width; k++) {
    w.mode[k] = s.mode[k];
    if (s.mode[k] == kRaw) continue;
    if (w.plane[k].size() < plane_bytes) w.plane[k].resize(plane_bytes);
    if (s.mode[k] == kHuffman) build_lut(w.code[k], w.lut[k], w.lut_scratch);
    else std::memset(w.plane[k].data(), s.value[k], std::min(s.block_words, s.words));
  }
}

// Decodes one block of n words from `in`; sizes are the stream lengths of its directory entry.
bool decode_block(const Loops& f, int width, int rotate, Worker& w, const uint8_t* in, const uint8_t* sizes, size_t n,
                  uint8_t* out) {
  const uint8_t* plane[kMaxWidth];
  size_t stride[kMaxWidth];
  const size_t q = (n + EP_STREAMS - 1) / EP_STREAMS;
  size_t run = n;  // words that every plane holds side by side
  for (int k = 0; k < width; k++) {
    stride[k] = w.mode[k] == kRaw ? q : w.mode[k] == kHuffman ? q + kSlack : 0;
    plane[k] = w.mode[k] == kRaw ? in : w.plane[k].data();
    if (w.mode[k] == kRaw) in += n;
    if (w.mode[k] != kHuffman) continue;
    run = q;
    if (!f.decode_streams(w.lut[k].entry, w.code[k].length, in, sizes, n, w.plane[k].data(), out, width))
      return false;
    for (int i = 0; i < EP_STREAMS; i++) in += load16(sizes + 2 * i);
    sizes += 2 * EP_STREAMS;
  }
  for (size_t at = 0; at < n; at += run) {
    (rotate ? f.merge_rotated : f.merge)(out + at * width, std::min(run, n - at), plane);
    for (int k = 0; k < width; k++) plane[k] += stride[k];
  }
  return true;
}

// Decodes a segment's block and compares its checksum; 0 or an error.
int64_t decode_checked(const Loops& f, const Segment& s, Worker& w, uint64_t block, uint8_t* out) {
  const size_t n = s.words_in(block);
  if (s.constant == s.width) {
    decode_block(f, s.width, s.rotate, w, nullptr, nullptr, n, out);
    return 0;
  }
  const uint8_t* entry = s.directory + block * s.entry_bytes();
  if (!decode_block(f, s.width, s.rotate, w, s.payload + s.offset[block], entry + 4, n, out)) return EP_BAD_STREAM;
  return crc32c(out, n * s.width) == load<uint32_t>(entry) ? 0 : EP_BAD_CRC;
}

// Decodes all segments to `dst`; or, where that is null, decodes block by block and compares with `expected`.
int64_t decode(const uint8_t* src, uint64_t size, uint64_t words, int width, int rotate, int block_log2, uint8_t* dst,
               const uint8_t* expected, int threads, int64_t where[2]) {
  struct Head {
    uint64_t offset, first_word, words, n_blocks;
  };
  struct Unit {
    size_t segment;
    uint64_t first, last;
  };
  const uint64_t block_words = 1ull << block_log2;
  std::vector<Head> heads;
  uint64_t at = 0, done = 0;
  while (done < words) {
    where[0] = (int64_t)heads.size(), where[1] = -1;
    if (size - at < EP_SEGMENT_HEAD) return EP_TRUNCATED;
    const uint64_t n_blocks = load<uint32_t>(src + at), meta = load<uint32_t>(src + at + 4),
                   payload = load<uint64_t>(src + at + 8), left = (words - done + block_words - 1) / block_words;
    if (!n_blocks || n_blocks > EP_GROUP_BLOCKS || n_blocks > left || meta < EP_SEGMENT_HEAD + 4) return EP_BAD_SEGMENT;
    if (meta > size - at || payload > size - at - meta) return EP_TRUNCATED;
    const uint64_t n = std::min(words - done, n_blocks * block_words);
    heads.push_back({at, done, n, n_blocks});
    at += meta + payload, done += n;
  }
  where[0] = (int64_t)heads.size(), where[1] = -1;
  if (at != size) return EP_TRAILING;

  // A thread that goes on within a segment keeps its tables, so units may be small; few blocks are shared out evenly.
  const uint64_t blocks = (words + block_words - 1) / block_words;
  const uint64_t unit = std::clamp<uint64_t>(blocks / (2 * (uint64_t)threads), 1, EP_GROUP_BLOCKS);
  std::vector<Unit> units;
  for (size_t i = 0; i < heads.size(); i++)
    for (uint64_t b = 0; b < heads[i].n_blocks; b += unit) units.push_back({i, b, std::min(b + unit, heads[i].n_blocks)});

  const Loops& f = loops_of(width);
  Failure failure;
  const size_t lanes = std::max<size_t>(1, std::min<size_t>(threads, units.size()));
  std::atomic<size_t> next{0};
  Pool::run(lanes, threads, [&](size_t) {
    Worker& w = Worker::mine();
    Segment s;
    size_t current = ~(size_t)0;
    if (expected && w.check.size() < block_words * width) w.check.resize(block_words * width);
    for (size_t u; (u = next.fetch_add(1)) < units.size() && !failure;) {
      const Head& head = heads[units[u].segment];
      if (units[u].segment != current) {
        current = units[u].segment;
        s = Segment();
        s.width = width, s.rotate = rotate, s.block_words = block_words, s.words = head.words,
        s.n_blocks = head.n_blocks;
        if (int64_t error = parse_segment(src + head.offset, s, w)) return failure.report(error, current, -1);
        prepare_tables(s, w);
      }
      for (uint64_t b = units[u].first; b < units[u].last; b++) {
        const uint64_t at = (head.first_word + b * block_words) * width;
        uint8_t* out = expected ? w.check.data() : dst + at;
        if (int64_t error = decode_checked(f, s, w, b, out)) return failure.report(error, current, b);
        if (expected && std::memcmp(out, expected + at, s.words_in(b) * width))
          return failure.report(EP_SELF_CHECK, current, b);
      }
    }
  });
  return failure.result(where);
}
}  // namespace
}  // namespace ep
