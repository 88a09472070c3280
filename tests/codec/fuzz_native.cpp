// Feeds damaged segments to the decoder under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
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

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2000;
  uint64_t refused = 0;
  for (uint64_t round = 0; round < rounds; round++) {
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
  std::printf("%llu rounds, %llu damaged inputs refused, no crash\n", (unsigned long long)rounds, (unsigned long long)refused);
}
