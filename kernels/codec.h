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
  EP_ABI = 1,
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
}
