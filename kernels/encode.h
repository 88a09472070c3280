// From words to segments: histograms, a plan for every group, codes, and the proof that they decode.
#pragma once
#include "crc32c.h"
#include "decode.h"
#include "loops.h"
#include "pool.h"

namespace ep {
namespace {
using Counts = uint32_t[256];

// How one segment codes one plane.
struct PlanePlan {
  Mode mode;
  uint8_t first, last;
  Code code;

  size_t record_bytes() const { return mode == kRaw ? 1 : mode == kConstant ? 2 : 3 + (last - first + 2) / 2; }
};

struct SegmentPlan {
  uint64_t first_block, n_blocks, words;
  uint64_t meta_bytes = 0, payload_bytes = 0;
  int huffman = 0, constant = 0;
  PlanePlan plane[kMaxWidth];
};

// n words in n_blocks blocks; FORMAT.md, canonical encoder, rule 4.
PlanePlan plan_plane(const Counts& count, uint64_t n, uint64_t n_blocks) {
  PlanePlan p{};
  int m = 0;
  for (int s = 0; s < 256; s++)
    if (count[s]) {
      if (!m++) p.first = (uint8_t)s;
      p.last = (uint8_t)s;
    }
  p.mode = m == 1 ? kConstant : kRaw;
  if (m < 2) return p;
  code_lengths(count, p.code.length);
  uint64_t bits = 0;
  for (int s = 0; s < 256; s++) bits += (uint64_t)count[s] * p.code.length[s];
  p.mode = kHuffman;
  if (64 * ((bits + 7) / 8 + p.record_bytes() + 2 * EP_STREAMS * n_blocks) > 63 * n) {
    p.mode = kRaw;
    return p;
  }
  canonical(p.code);
  return p;
}

// Expected bits of a plane, by FORMAT.md, canonical encoder, rule 2.
uint64_t estimate_plane(const Counts& count, uint64_t n) {
  const uint64_t whole = log2_fixed(n);
  uint64_t sum = 0;
  for (int s = 0; s < 256; s++)
    if (count[s]) sum += count[s] * (whole - log2_fixed(count[s]));
  return std::min(8 * n, 8 * 24 + (sum >> 8));
}

class Encoder {
 public:
  Encoder(const uint8_t* src, uint64_t words, int width, int rotate, int threads)
      : src_(src), words_(words), width_(width), rotate_(rotate), threads_(threads), f_(loops_of(width)),
        blocks_((words + kBlock - 1) / kBlock), counts_(new Counts[std::max<uint64_t>(1, blocks_ * width)]) {}

  // Histograms of every block, then one plan a group.
  void plan() {
    Pool::run(blocks_, threads_, [&](size_t b) {
      Worker& w = Worker::mine();
      uint8_t* plane[kMaxWidth];
      split(w, b, plane);
      for (int k = 0; k < width_; k++) f_.histogram(plane[k], words_in(b), counts_[b * width_ + k]);
    });
    std::vector<std::vector<SegmentPlan>> groups((blocks_ + EP_GROUP_BLOCKS - 1) / EP_GROUP_BLOCKS);
    Pool::run(groups.size(), threads_, [&](size_t g) { groups[g] = plan_group(g * EP_GROUP_BLOCKS); });
    for (auto& g : groups)
      for (auto& s : g) segments_.push_back(s);
    block_segment_.resize(blocks_);
    for (size_t i = 0; i < segments_.size(); i++)
      for (uint64_t b = 0; b < segments_[i].n_blocks; b++) block_segment_[segments_[i].first_block + b] = i;
  }

  // Exact size, stream by stream, since every stream is padded to a byte of its own.
  int64_t predict() {
    std::vector<uint64_t> bytes(blocks_);
    Pool::run(blocks_, threads_, [&](size_t b) {
      const SegmentPlan& s = segments_[block_segment_[b]];
      Worker& w = Worker::mine();
      uint8_t* plane[kMaxWidth];
      if (s.huffman) split(w, b, plane);
      const size_t n = words_in(b), q = (n + EP_STREAMS - 1) / EP_STREAMS;
      for (int k = 0; k < width_; k++) {
        if (s.plane[k].mode == kRaw) bytes[b] += n;
        if (s.plane[k].mode != kHuffman) continue;
        for (size_t i = 0; i < n; i += q) {
          Counts count;
          uint64_t bits = 0;
          f_.histogram(plane[k] + i, std::min(q, n - i), count);
          for (int x = 0; x < 256; x++) bits += (uint64_t)count[x] * s.plane[k].code.length[x];
          bytes[b] += (bits + 7) / 8;
        }
      }
    });
    uint64_t total = 0;
    for (auto& s : segments_) total += s.meta_bytes;
    for (uint64_t b : bytes) total += b;
    return (int64_t)total;
  }

  int64_t encode(uint8_t* dst, uint64_t capacity, int64_t where[2]) {
    // Slots of sufficient size, so that blocks can be coded in any order; closed up afterwards.
    std::vector<uint64_t> slot(blocks_), used(blocks_);
    uint64_t at = 0;
    for (auto& s : segments_) at += s.meta_bytes;
    for (uint64_t b = 0; b < blocks_; b++) slot[b] = at, at += most_bytes(b);
    if (at + EP_TAIL > capacity) return EP_CAPACITY;
    std::vector<uint8_t> directory(blocks_ * kEntry);

    const size_t lanes = std::max<size_t>(1, std::min<size_t>(threads_, blocks_));
    std::atomic<size_t> next{0};
    Pool::run(lanes, threads_, [&](size_t) {
      Worker& w = Worker::mine();
      size_t current = ~(size_t)0;
      for (size_t b; (b = next.fetch_add(1)) < blocks_;) {
        const SegmentPlan& s = segments_[block_segment_[b]];
        if (block_segment_[b] != current) {
          current = block_segment_[b];
          for (int k = 0; k < width_; k++)
            if (s.plane[k].mode == kHuffman) build_encode_table(s.plane[k].code, w.encode[k]);
        }
        used[b] = encode_block(s, w, b, dst + slot[b], directory.data() + b * kEntry);
      }
    });

    // Walking from the front is safe: slots begin after the room of all tables, so nothing is written ahead of what is
    // still to be moved.
    uint8_t* to = dst;
    for (auto& s : segments_) {
      s.payload_bytes = 0;
      for (uint64_t b = 0; b < s.n_blocks; b++) s.payload_bytes += used[s.first_block + b];
      write_meta(s, directory.data(), to);
      to += s.meta_bytes;
      for (uint64_t b = s.first_block; b < s.first_block + s.n_blocks; b++) {
        std::memmove(to, dst + slot[b], used[b]);
        to += used[b];
      }
    }
    // The proof is about the bytes that leave: they are parsed and decoded as any reader would.
    if (decode(dst, to - dst, words_, width_, rotate_, EP_BLOCK_LOG2, nullptr, src_, threads_, where))
      return EP_SELF_CHECK;
    return to - dst;
  }

 private:
  static constexpr uint64_t kBlock = 1ull << EP_BLOCK_LOG2;
  static constexpr size_t kEntry = 4 + 2 * EP_STREAMS * kMaxWidth;

  size_t words_in(uint64_t b) const { return std::min(kBlock, words_ - b * kBlock); }
  const uint8_t* block(uint64_t b) const { return src_ + b * kBlock * width_; }

  void split(Worker& w, uint64_t b, uint8_t** plane) {
    for (int k = 0; k < width_; k++) {
      if (w.plane[k].size() < kBlock + EP_STREAMS * (kSlack + 1)) w.plane[k].resize(kBlock + EP_STREAMS * (kSlack + 1));
      plane[k] = w.plane[k].data();
    }
    (rotate_ ? f_.split_rotated : f_.split)(block(b), words_in(b), plane);
  }

  std::vector<SegmentPlan> plan_group(uint64_t first) {
    const uint64_t n = std::min<uint64_t>(EP_GROUP_BLOCKS, blocks_ - first);
    uint64_t best_size = EP_GROUP_BLOCKS, best = 0;
    for (uint64_t size : {16, 4, 1}) {
      if (size < EP_GROUP_BLOCKS && n <= size) continue;
      uint64_t bits = 0;
      for (uint64_t b = 0; b < n; b += size) {
        const uint64_t m = std::min(size, n - b);
        bits += 8 * 48;
        for (int k = 0; k < width_; k++) {
          Counts sum = {};
          bits += estimate_plane(add(first + b, m, k, sum), words_in_run(first + b, m));
        }
      }
      if (size == EP_GROUP_BLOCKS || 128 * bits < 127 * best) best_size = size, best = bits;
    }
    std::vector<SegmentPlan> plans;
    for (uint64_t b = 0; b < n; b += best_size) plans.push_back(plan_segment(first + b, std::min(best_size, n - b)));
    return plans;
  }

  uint64_t words_in_run(uint64_t first, uint64_t n) const {
    return std::min(words_, (first + n) * kBlock) - first * kBlock;
  }

  const Counts& add(uint64_t first, uint64_t n, int k, Counts& sum) const {
    for (uint64_t b = first; b < first + n; b++)
      for (int s = 0; s < 256; s++) sum[s] += counts_[b * width_ + k][s];
    return sum;
  }

  SegmentPlan plan_segment(uint64_t first, uint64_t n) {
    SegmentPlan s{};
    s.first_block = first, s.n_blocks = n, s.words = words_in_run(first, n);
    s.meta_bytes = EP_SEGMENT_HEAD + 4;
    for (int k = 0; k < width_; k++) {
      Counts sum = {};
      s.plane[k] = plan_plane(add(first, n, k, sum), s.words, n);
      s.meta_bytes += s.plane[k].record_bytes();
      s.huffman += s.plane[k].mode == kHuffman, s.constant += s.plane[k].mode == kConstant;
    }
    if (s.constant < width_) s.meta_bytes += n * (4 + 2 * EP_STREAMS * s.huffman);
    return s;
  }

  uint64_t most_bytes(uint64_t b) const {
    const SegmentPlan& s = segments_[block_segment_[b]];
    uint64_t bytes = EP_TAIL;
    for (int k = 0; k < width_; k++) {
      if (s.plane[k].mode == kRaw) bytes += words_in(b);
      if (s.plane[k].mode != kHuffman) continue;
      uint64_t bits = 0;
      for (int x = 0; x < 256; x++) bits += (uint64_t)counts_[b * width_ + k][x] * s.plane[k].code.length[x];
      bytes += bits / 8 + EP_STREAMS;
    }
    return bytes;
  }

  uint64_t encode_block(const SegmentPlan& s, Worker& w, uint64_t b, uint8_t* out, uint8_t* entry) {
    uint8_t *plane[kMaxWidth], *const start = out;
    const size_t n = words_in(b), q = (n + EP_STREAMS - 1) / EP_STREAMS;
    split(w, b, plane);
    put<uint32_t>(entry, crc32c(block(b), n * width_));
    for (int k = 0; k < width_; k++) {
      if (s.plane[k].mode == kRaw) std::memcpy(out, plane[k], n), out += n;
      if (s.plane[k].mode != kHuffman) continue;
      for (size_t i = 0; i < EP_STREAMS; i++) {
        const size_t from = std::min(n, i * q);
        uint8_t* end = f_.encode_stream(w.encode[k], plane[k] + from, std::min(n, (i + 1) * q) - from, out);
        put<uint16_t>(entry, (uint16_t)(end - out));
        out = end;
      }
    }
    return (uint64_t)(out - start);
  }

  void write_meta(const SegmentPlan& s, const uint8_t* directory, uint8_t* p) const {
    uint8_t* const start = p;
    put<uint32_t>(p, (uint32_t)s.n_blocks);
    put<uint32_t>(p, (uint32_t)s.meta_bytes);
    put<uint64_t>(p, s.payload_bytes);
    for (int k = 0; k < width_; k++) {
      const PlanePlan& plane = s.plane[k];
      *p++ = plane.mode;
      if (plane.mode == kConstant) *p++ = plane.first;
      if (plane.mode != kHuffman) continue;
      *p++ = plane.first, *p++ = plane.last;
      const int n = plane.last - plane.first + 1;
      for (int i = 0; i < n; i += 2)
        *p++ = (uint8_t)(plane.code.length[plane.first + i] | (i + 1 < n ? plane.code.length[plane.first + i + 1] << 4 : 0));
    }
    if (s.constant < width_)
      for (uint64_t b = s.first_block; b < s.first_block + s.n_blocks; b++) {
        std::memcpy(p, directory + b * kEntry, 4 + 2 * EP_STREAMS * s.huffman);
        p += 4 + 2 * EP_STREAMS * s.huffman;
      }
    put<uint32_t>(p, crc32c(start, (size_t)(p - start)));
  }

  const uint8_t* const src_;
  const uint64_t words_;
  const int width_, rotate_, threads_;
  const Loops& f_;
  const uint64_t blocks_;
  const std::unique_ptr<Counts[]> counts_;  // [block][plane][symbol]
  std::vector<SegmentPlan> segments_;
  std::vector<size_t> block_segment_;
};
}  // namespace
}  // namespace ep
