// Feeds damaged segments and packed weights to the decoders under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
// Inputs and outputs have exactly the promised size, so that one byte too far is seen. Half of the damaged segments get a
// right checksum again, since otherwise nothing would reach the tables and streams behind it.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../kernels/codec.cpp"

using Bytes = std::vector<uint8_t>;

static std::mt19937_64 rng(1);
static uint64_t below(uint64_t n) { return rng() % n; }

static Bytes make_words(uint64_t words, int width) {
  Bytes data(words * width);
  const int kind = (int)below(5), spread = 1 + (int)below(30);
  std::geometric_distribution<int> exponent(0.3);
  for (size_t i = 0; i < data.size(); i++)
    data[i] = kind == 0   ? (uint8_t)rng()
              : kind == 1 ? 7
              : kind == 2 ? (uint8_t)(i % width + 1 == (size_t)width ? 120 - exponent(rng) % 100 : rng())
              : kind == 3 ? (uint8_t)below(1 + spread)
                          : (uint8_t)(exponent(rng) * 37);
  return data;
}

static void check(bool good, const char* what, uint64_t round) {
  if (good) return;
  std::fprintf(stderr, "round %llu: %s\n", (unsigned long long)round, what);
  std::exit(1);
}

static void reseal(uint8_t* p, uint64_t left) {
  const uint32_t meta = ep::load<uint32_t>(p + 4);
  if (meta < 24 || meta > left) return;
  const uint32_t crc = ep_crc32c(p, meta - 4);
  std::memcpy(p + meta - 4, &crc, 4);
}

// The table of a packed weight at `table` and what codes it, as compress/codec/packed/tables.py makes them.
static std::vector<uint32_t> make_code(const int64_t counts[256], bool dense, uint8_t* table) {
  std::vector<uint32_t> code(256);
  if (!dense) {
    std::vector<int> order(256);
    for (int s = 0; s < 256; s++) order[s] = s;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
    auto* rank = reinterpret_cast<uint8_t*>(code.data());
    std::memset(rank, ep::packed::kEscape, 256);
    for (int i = 0; i < ep::packed::kEscape; i++)
      if (counts[order[i]]) rank[order[i]] = (uint8_t)i, table[i] = (uint8_t)order[i];
    return code;
  }
  uint32_t narrow[256];
  for (int s = 0; s < 256; s++) narrow[s] = (uint32_t)counts[s];
  ep::Code canonical{};
  ep::code_lengths(narrow, canonical.length);
  const bool coded = ep::canonical(canonical);
  for (uint32_t s = 0; s < 256; s++) {
    const uint32_t length = coded ? canonical.length[s] : 0;
    if (!counts[s]) continue;
    uint32_t reversed = 0;
    for (uint32_t bit = 0; bit < length; bit++) reversed |= (canonical.bits[s] >> bit & 1) << (length - 1 - bit);
    code[s] = length << 16 | reversed;
    for (uint32_t i = reversed; i < ep::kTable; i += 1 << length) {
      const uint16_t entry = (uint16_t)(s << 8 | length);
      std::memcpy(table + 2 * i, &entry, 2);
    }
  }
  return code;
}

// Packs, unpacks, and feeds damaged blobs to the reader; returns how many of them it refused.
static uint64_t fuzz_packed(uint64_t round) {
  const uint32_t rows = 1 + (uint32_t)below(100), cols = 1 + (uint32_t)below(below(4) ? 200 : 2000);
  const int layout = 1 + (int)below(2), threads = 1 + (int)below(3);
  const bool dense = layout == 2;
  const Bytes data = make_words((uint64_t)rows * cols, 2);
  const auto* words = reinterpret_cast<const uint16_t*>(data.data());
  const ep::packed::Plan plan(dense, rows, cols);

  Bytes table(dense ? 2 << 12 : 16);
  int64_t counts[256], where[2];
  std::vector<int64_t> index(plan.tiles() + 1);
  Bytes lengths(dense ? 32 * plan.tiles() : 0);
  check(ep_packed_histogram(words, rows, cols, layout, counts, threads) == 0, "histogram refused", round);
  const std::vector<uint32_t> code = make_code(counts, dense, table.data());
  check(ep_packed_measure(words, rows, cols, layout, code.data(), index.data(), lengths.data(), threads) == 0,
        "measure refused", round);
  const uint64_t last = (uint64_t)index.back();
  Bytes blob(dense ? plan.codes + 16 * last + 16 : ep::packed::aligned(plan.escapes + 4 * last) + 16);
  std::copy(table.begin(), table.end(), blob.begin() + (long)plan.table);
  std::copy(lengths.begin(), lengths.end(), blob.begin() + (long)plan.lengths);
  for (size_t i = 0; i < index.size(); i++) std::memcpy(&blob[plan.index + 4 * i], &index[i], 4);
  check(ep_packed_write(words, rows, cols, layout, code.data(), blob.data(), threads) == 0, "write refused", round);

  std::vector<uint16_t> out((size_t)rows * cols);
  auto read = [&](const Bytes& from, uint32_t first, uint32_t n) {
    out.assign((size_t)n * cols, 0);
    return ep_packed_unpack(from.data(), from.size(), rows, cols, layout, first, n, out.data(), threads, where);
  };
  auto refused = [&](const Bytes& from) {
    return ep_packed_check(from.data(), from.size(), rows, cols, layout, threads, where) < 0;
  };
  const uint32_t first = 32 * (uint32_t)below((rows + 31) / 32), n = 1 + (uint32_t)below(rows - first);
  check(!refused(blob), "a sound blob is refused", round);
  check(read(blob, first, n) == 0 && !std::memcmp(out.data(), words + (size_t)first * cols, 2ull * n * cols),
        "rows differ", round);
  check(read(blob, 0, rows) == 0 && !std::memcmp(out.data(), words, data.size()), "packed round trip differs", round);

  uint64_t found = 0;
  for (int damage = 0; damage < 8; damage++) {
    Bytes bad = blob;
    const uint64_t from = damage < 3 ? plan.table : damage < 6 ? plan.index : plan.low;
    const uint64_t reach = damage < 6 ? plan.low : bad.size();
    for (uint64_t k = 0, flips = 1 + below(3); k < flips; k++) bad[from + below(reach - from)] ^= 1 << below(8);
    if (damage == 7) bad.resize(below(bad.size()));
    found += refused(bad);
    read(bad, first, n);
    read(bad, 0, rows);
  }
  return found;
}

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2000;
  uint64_t refused = 0, packed = 0;
  for (uint64_t round = 0; round < rounds; round++) {
    packed += fuzz_packed(round);
    const int width = 1 << below(4), rotate = (int)below(2), threads = 1 + (int)below(3);
    const uint64_t words = below(10) ? below(3000) : below(300000);
    const Bytes data = make_words(words, width);
    int64_t where[2];
    Bytes room((size_t)ep_encode_bound(words, width));
    const int64_t size = ep_encode(data.data(), words, width, rotate, room.data(), room.size(), threads, where);
    check(size >= 0, "encode refused", round);
    check(ep_predict(data.data(), words, width, rotate, threads, where) == size, "prediction differs", round);
    Bytes coded(room.begin(), room.begin() + size), out(words * width);
    coded.resize(size + EP_TAIL);
    auto decode = [&](const Bytes& from, uint64_t n, int log2) {
      return ep_decode(from.data(), n, words, width, rotate, log2, out.data(), threads, where);
    };
    check(decode(coded, size, EP_BLOCK_LOG2) == 0 && out == data, "round trip differs", round);
    if (!size) continue;
    for (int damage = 0; damage < 8; damage++) {
      Bytes bad = coded;
      uint64_t n = size;
      if (damage == 0) {
        n = below(size);
        bad.assign(coded.begin(), coded.begin() + n);
        bad.resize(n + EP_TAIL);
      } else {
        const uint64_t meta = ep::load<uint32_t>(bad.data() + 4), reach = damage < 6 ? std::min<uint64_t>(meta, size) : size;
        for (uint64_t k = 0, flips = 1 + below(3); k < flips; k++) bad[below(reach)] ^= 1 << below(8);
        if (damage & 1) reseal(bad.data(), size);
      }
      refused += decode(bad, n, damage == 5 ? 3 + (int)below(16) : EP_BLOCK_LOG2) < 0;
    }
  }
  std::printf("%llu rounds, %llu damaged tensors and %llu damaged packed weights refused, no crash\n",
              (unsigned long long)rounds, (unsigned long long)refused, (unsigned long long)packed);
}
