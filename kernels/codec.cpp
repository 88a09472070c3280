// Segments: how a run of words becomes tables, a directory and streams, and back. See codec.h for the contract and
// docs/FORMAT.md for the bytes. Built as one translation unit: c++ -O3 -std=c++17 -shared -fPIC -pthread codec.cpp
#include "codec.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "crc32c.h"
#include "huffman.h"
#include "pool.h"

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

// ---- decoding -----------------------------------------------------------------------------------------------------

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

bool valid(int width, int rotate) {
  return (width == 1 || width == 2 || width == 4 || width == 8) && (rotate == 0 || rotate == 1);
}

int64_t decode(const uint8_t* src, uint64_t size, uint64_t words, int width, int rotate, int block_log2, uint8_t* dst,
               int threads, int64_t where[2]) {
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
  const uint64_t unit = std::clamp<uint64_t>(blocks / (2 * threads), 1, std::max<uint64_t>(EP_GROUP_BLOCKS, blocks >> 12));
  std::vector<Unit> units;
  for (size_t i = 0; i < heads.size(); i++)
    for (uint64_t b = 0; b < heads[i].n_blocks; b += unit) units.push_back({i, b, std::min(b + unit, heads[i].n_blocks)});

  const Loops& f = loops_of(width);
  Failure failure;
  const size_t lanes = std::max<size_t>(1, std::min<size_t>(threads, units.size()));
  std::atomic<size_t> next{0};
  Pool::run(lanes, threads, [&](size_t) {
    Segment s;
    size_t current = ~(size_t)0;
    try {
      Worker& w = Worker::mine();
      for (size_t u; (u = next.fetch_add(1)) < units.size();) {
        if (failure) return;
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
          uint8_t* out = dst + (head.first_word + b * block_words) * width;
          const size_t n = s.words_in(b);
          const bool constant = s.constant == width;
          if (constant) {
            decode_block(f, width, rotate, w, nullptr, nullptr, n, out);
            continue;
          }
          const uint8_t* entry = s.directory + b * s.entry_bytes();
          if (!decode_block(f, width, rotate, w, s.payload + s.offset[b], entry + 4, n, out))
            return failure.report(EP_BAD_STREAM, current, b);
          if (crc32c(out, n * width) != load<uint32_t>(entry)) return failure.report(EP_BAD_CRC, current, b);
        }
      }
    } catch (const std::bad_alloc&) {
      failure.report(EP_NO_MEMORY, -1, -1);
    }
  });
  return failure.result(where);
}

// ---- encoding -----------------------------------------------------------------------------------------------------

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
    std::vector<uint64_t> slot(blocks_ + 1), used(blocks_);
    uint64_t at = 0;
    for (auto& s : segments_) at += s.meta_bytes;
    for (uint64_t b = 0; b < blocks_; b++) slot[b] = at, at += most_bytes(b);
    slot[blocks_] = at;
    if (at + EP_TAIL > capacity) return EP_CAPACITY;
    std::vector<uint8_t> directory(blocks_ * kEntry);

    Failure failure;
    const size_t lanes = std::max<size_t>(1, std::min<size_t>(threads_, blocks_));
    std::atomic<size_t> next{0};
    Pool::run(lanes, threads_, [&](size_t) {
      size_t current = ~(size_t)0;
      try {
        Worker& w = Worker::mine();
        for (size_t b; (b = next.fetch_add(1)) < blocks_ && !failure;) {
          const SegmentPlan& s = segments_[block_segment_[b]];
          if (block_segment_[b] != current) prepare(s, w), current = block_segment_[b];
          used[b] = encode_block(s, w, b, dst + slot[b], directory.data() + b * kEntry);
          if (!decodes_back(s, w, b, dst + slot[b], directory.data() + b * kEntry))
            failure.report(EP_SELF_CHECK, b / EP_GROUP_BLOCKS, b % EP_GROUP_BLOCKS);
        }
      } catch (const std::bad_alloc&) {
        failure.report(EP_NO_MEMORY, -1, -1);
      }
    });
    if (int64_t error = failure.result(where)) return error;

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

  // Tables for coding a segment's blocks and for checking them.
  void prepare(const SegmentPlan& s, Worker& w) {
    for (int k = 0; k < width_; k++) {
      w.mode[k] = s.plane[k].mode;
      if (w.mode[k] != kHuffman) continue;
      w.code[k] = s.plane[k].code;
      build_encode_table(w.code[k], w.encode[k]);
      build_lut(w.code[k], w.lut[k], w.lut_scratch);
    }
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

  bool decodes_back(const SegmentPlan& s, Worker& w, uint64_t b, const uint8_t* in, const uint8_t* entry) {
    const size_t n = words_in(b);
    for (int k = 0; k < width_; k++)
      if (s.plane[k].mode == kConstant) std::memset(w.plane[k].data(), s.plane[k].first, n);
    if (w.check.size() < kBlock * width_) w.check.resize(kBlock * width_);
    return decode_block(f_, width_, rotate_, w, in, entry + 4, n, w.check.data()) &&
           !std::memcmp(w.check.data(), block(b), n * width_);
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
  if (!ep::valid(width, rotate)) return EP_BAD_ARGUMENT;
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
  if (!ep::valid(width, rotate)) return EP_BAD_ARGUMENT;
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
  if (!ep::valid(width, rotate) || block_log2 < EP_MIN_BLOCK_LOG2 || block_log2 > EP_MAX_BLOCK_LOG2)
    return EP_BAD_ARGUMENT;
  try {
    return ep::decode(static_cast<const uint8_t*>(src), size, words, width, rotate, block_log2,
                      static_cast<uint8_t*>(dst), std::max(1, threads), where);
  } catch (const std::bad_alloc&) {
    return EP_NO_MEMORY;
  }
}
}
