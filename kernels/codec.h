// The entropress codec: plain C interface. docs/FORMAT.md is the specification, compress/codec/reference.py its
// executable form; this library gives the same bytes.
//
// Three things that surprise:
//   * The library knows bytes, words and planes; dtypes, shapes and names belong to the caller.
//   * `src` of ep_decode must be followed by EP_TAIL readable bytes: bit readers load eight bytes at a time and may look,
//     never act, past the end of a stream. Every coded tensor ends with such a tail.
//   * Nothing read from `src` is trusted. Every length, table and sum is checked before it is used as an offset.
//
// Functions return a size or 0 on success and a negative Ep error otherwise; on error where[0] is the segment and
// where[1] the block in it, or -1 where there is none. They may be called from any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

enum : int {
  EP_ABI = 2,
  EP_MAX_CODE_BITS = 12,
  EP_STREAMS = 8,
  EP_BLOCK_LOG2 = 16,
  EP_MIN_BLOCK_LOG2 = 3,
  EP_MAX_BLOCK_LOG2 = 18,  // 2^18 / 8 symbols of 12 bits still fit a 16-bit stream length
  EP_GROUP_BLOCKS = 16,
  EP_TAIL = 8,
  EP_SEGMENT_HEAD = 16,
};

enum EpError : int {
  EP_TRUNCATED = -1,    // the segments end before the words do
  EP_BAD_SEGMENT = -2,  // a segment's sizes contradict each other
  EP_BAD_META = -3,     // a segment's own checksum differs
  EP_BAD_TABLE = -4,    // a plane record or Huffman table is not valid
  EP_BAD_STREAM = -5,   // a stream does not end where its length says, or its padding is not zero
  EP_BAD_CRC = -6,      // a block's decoded bytes have another checksum
  EP_TRAILING = -7,     // bytes follow the last segment
  EP_CAPACITY = -8,     // dst is too small
  EP_SELF_CHECK = -9,   // the encoder could not decode its own output: memory or processor fault
  EP_NO_MEMORY = -10,
  EP_BAD_ARGUMENT = -11,
  EP_BAD_TILE = -12,  // the index, lane lengths, streams or escapes of a tile of packed weights contradict each other
};

extern "C" {
int ep_abi();
const char* ep_isa();  // instruction set chosen at run time

uint32_t ep_crc32c(const void* data, size_t n);

// Most bytes that ep_encode can write for `words` words of `width` bytes.
int64_t ep_encode_bound(uint64_t words, int width);

// Codes `words` words at `src` into segments at `dst`, decodes them again and compares; returns their size.
int64_t ep_encode(const void* src, uint64_t words, int width, int rotate, void* dst, uint64_t capacity, int threads,
                  int64_t where[2]);

// The size ep_encode would return, from histograms alone.
int64_t ep_predict(const void* src, uint64_t words, int width, int rotate, int threads, int64_t where[2]);

// Decodes exactly `size` bytes of segments at `src` into words*width bytes at `dst`. Returns 0.
int64_t ep_decode(const void* src, uint64_t size, uint64_t words, int width, int rotate, int block_log2, void* dst,
                  int threads, int64_t where[2]);

// Decodes one unit of a DFloat11 checkpoint into `words` bf16 at `dst` (df11.h). `codes` is followed by EP_TAIL readable
// bytes; the caller has checked `table`, that `positions` never decrease and end at `words`, and the sizes of all.
int64_t ep_df11_decode(const uint16_t* table, const void* codes, uint64_t size, const void* sign_mantissa,
                       const uint32_t* positions, const void* gaps, uint64_t words, void* dst, int threads,
                       int64_t where[2]);

// Packed weights (docs/PACKED.md): a matrix of rows x cols words, in `layout` 1 (fast) or 2 (dense). `code`: fast: the rank
// of each high byte, uint8[256], 15 where it has none; dense: uint32[256], length << 16 | code, its first bit lowest.

// Counts of the byte that is coded.
int64_t ep_packed_histogram(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, int64_t counts[256],
                            int threads);

// The index, int64[tiles + 1], and, if dense, the lane lengths, uint8[32 * tiles].
int64_t ep_packed_measure(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, const void* code,
                          int64_t* index, uint8_t* lengths, int threads);

// Fills low plane, codes and escapes of a blob of zeros in which index and lane lengths already stand.
int64_t ep_packed_write(const uint16_t* words, uint32_t rows, uint32_t cols, int layout, const void* code, void* blob,
                        int threads);

// Decodes `n` rows from `first`, a multiple of 32, on. Of the `size` bytes only what decoding needs is checked; where[0] is
// the damaged tile.
int64_t ep_packed_unpack(const void* blob, uint64_t size, uint32_t rows, uint32_t cols, int layout, uint32_t first,
                         uint32_t n, uint16_t* out, int threads, int64_t where[2]);

// Decodes all lanes and compares all escapes with the ranks; table, padding and checksum are the caller's.
int64_t ep_packed_check(const void* blob, uint64_t size, uint32_t rows, uint32_t cols, int layout, int threads,
                        int64_t where[2]);
}
