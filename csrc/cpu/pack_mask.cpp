// Masks as bits: 32 weights in an int32 word, least significant bit first, padding bits 0.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "segments.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWordsPerItem = 4096;

template <class Body>  // body(word, first element, elements)
void each_word(int64_t numel, const Body& body) {
  const int64_t words = (numel + 31) / 32;
  parallel_runs((words + kWordsPerItem - 1) / kWordsPerItem, [&](int64_t item) {
    const int64_t end = std::min(words, (item + 1) * kWordsPerItem);
    for (int64_t word = item * kWordsPerItem; word < end; ++word) {
      body(word, word * 32, std::min<int64_t>(32, numel - word * 32));
    }
  });
}

constexpr uint64_t kEachByte = 0x0101010101010101;

// Eight bools as bits: a multiplication brings the lowest bit of byte i to bit 56 + i.
uint32_t bits_of(const uint8_t* bools) {
  uint64_t bytes;
  memcpy(&bytes, bools, sizeof bytes);
  // Any other value than 0 is true.
  bytes = ((bytes | ((bytes & 0x7f * kEachByte) + 0x7f * kEachByte)) >> 7) & kEachByte;
  return static_cast<uint32_t>(bytes * 0x0102040810204080 >> 56);
}

// Eight bits as bools: byte i keeps bit i of its copy, and adding 0x7f carries it into the highest.
void put_bools(uint64_t bits, uint8_t* bools) {
  const uint64_t bytes = (((bits * kEachByte & 0x8040201008040201) + 0x7f * kEachByte) >> 7) & kEachByte;
  memcpy(bools, &bytes, sizeof bytes);
}

Tensor pack_mask(const Tensor& mask) {
  require_cpu(mask, ScalarType::Bool, "mask");
  Tensor words = torch::stable::new_empty(mask, {(mask.numel() + 31) / 32}, ScalarType::Int);
  const uint8_t* const bools = static_cast<const uint8_t*>(mask.data_ptr());
  uint32_t* const out = static_cast<uint32_t*>(words.data_ptr());
  each_word(mask.numel(), [&](int64_t word, int64_t first, int64_t count) {
    uint8_t padded[32] = {};
    if (count < 32) memcpy(padded, bools + first, count);
    const uint8_t* const from = count < 32 ? padded : bools + first;
    out[word] = bits_of(from) | bits_of(from + 8) << 8 | bits_of(from + 16) << 16 | bits_of(from + 24) << 24;
  });
  return words;
}

Tensor unpack_mask(const Tensor& words, const std::vector<int64_t>& shape) {
  require_cpu(words, ScalarType::Int, "words");
  Tensor mask = torch::stable::new_empty(words, shape, ScalarType::Bool);
  STD_TORCH_CHECK(words.numel() == (mask.numel() + 31) / 32,
                  "words must have one int32 for 32 weights of shape");
  const uint32_t* const in = static_cast<const uint32_t*>(words.data_ptr());
  uint8_t* const bools = static_cast<uint8_t*>(mask.data_ptr());
  each_word(mask.numel(), [&](int64_t word, int64_t first, int64_t count) {
    uint8_t whole[32];
    for (int64_t i = 0; i < 4; ++i) put_bools(in[word] >> 8 * i & 0xff, whole + 8 * i);
    memcpy(bools + first, whole, count);
  });
  return mask;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&jackpot::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&jackpot::unpack_mask));
}
