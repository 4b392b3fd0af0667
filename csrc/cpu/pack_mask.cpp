// Masks as bits: 32 weights in an int32 word, least significant bit first, padding bits 0.
#include <torch/csrc/stable/library.h>

#include <algorithm>

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

Tensor pack_mask(const Tensor& mask) {
  require_cpu(mask, ScalarType::Bool, "mask");
  Tensor words = torch::stable::new_empty(mask, {(mask.numel() + 31) / 32}, ScalarType::Int);
  const uint8_t* const bools = static_cast<const uint8_t*>(mask.data_ptr());
  uint32_t* const out = static_cast<uint32_t*>(words.data_ptr());
  each_word(mask.numel(), [&](int64_t word, int64_t first, int64_t count) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(bools[first + i] != 0) << i;
    out[word] = bits;
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
    for (int64_t i = 0; i < count; ++i) bools[first + i] = in[word] >> i & 1;
  });
  return mask;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&jackpot::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&jackpot::unpack_mask));
}
