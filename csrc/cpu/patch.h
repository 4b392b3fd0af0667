// Mask bits and effective weights of single elements, at their logical row-major index.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "segments.h"

namespace jackpot {

class Patch {
 public:
  // An empty `effective` leaves only the bits to change.
  Patch(const Tensor& mask, const Tensor* weight, const Tensor* effective, int64_t numel)
      : words_(static_cast<uint32_t*>(mask.data_ptr())) {
    if (!effective || effective->numel() == 0) return;
    STD_TORCH_CHECK(weight->numel() == numel, "weights must have the scores' shapes");
    STD_TORCH_CHECK(weight->numel() == effective->numel() && weight->is_cpu() && effective->is_cpu(),
                    "effective must have the weight's shape and device");
    weight_ = weight->data_ptr();
    effective_ = effective->data_ptr();
    weight_dtype_ = weight->scalar_type();
    dtype_ = effective->scalar_type();
    // Asking for sizes and strides costs more than most patches: where both are contiguous, none are needed.
    if (weight->is_contiguous() && effective->is_contiguous()) return;
    for (int64_t dim = 0; dim < effective->dim(); ++dim) {
      dims_.push_back({effective->size(dim), weight->stride(dim), effective->stride(dim)});
    }
  }

  void keep(int64_t index) const {
    words_[index / 32] |= 1u << index % 32;
    if (!effective_) return;
    const auto [from, to] = offsets(index);
    store(to, load(from));
  }

  void prune(int64_t index) const {
    words_[index / 32] &= ~(1u << index % 32);
    if (effective_) store(offsets(index).second, 0.0);
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;
  struct Dim {
    int64_t size, weight_stride, effective_stride;
  };

  std::pair<int64_t, int64_t> offsets(int64_t index) const {
    if (dims_.empty()) return {index, index};
    int64_t from = 0, to = 0;
    for (auto dim = dims_.rbegin(); dim != dims_.rend(); ++dim) {
      const int64_t i = index % dim->size;
      from += i * dim->weight_stride;
      to += i * dim->effective_stride;
      index /= dim->size;
    }
    return {from, to};
  }

  // Through float64, which every dtype here converts to exactly; narrowing goes through float32 as torch's
  // copy does.
  double load(int64_t i) const {
    switch (weight_dtype_) {
      case ScalarType::Float:
        return static_cast<const float*>(weight_)[i];
      case ScalarType::Double:
        return static_cast<const double*>(weight_)[i];
      case ScalarType::BFloat16:
        return static_cast<const c10::BFloat16*>(weight_)[i];
      case ScalarType::Half:
        return static_cast<const c10::Half*>(weight_)[i];
      default:
        STD_TORCH_CHECK(false, "weight must be float32, float64, bfloat16 or float16");
    }
  }

  void store(int64_t i, double value) const {
    switch (dtype_) {
      case ScalarType::Float:
        static_cast<float*>(effective_)[i] = static_cast<float>(value);
        break;
      case ScalarType::Double:
        static_cast<double*>(effective_)[i] = value;
        break;
      case ScalarType::BFloat16:
        static_cast<c10::BFloat16*>(effective_)[i] = static_cast<float>(value);
        break;
      case ScalarType::Half:
        static_cast<c10::Half*>(effective_)[i] = static_cast<float>(value);
        break;
      default:
        STD_TORCH_CHECK(false, "effective must be float32, float64, bfloat16 or float16");
    }
  }

  uint32_t* words_;
  const void* weight_ = nullptr;
  void* effective_ = nullptr;
  ScalarType weight_dtype_{}, dtype_{};
  std::vector<Dim> dims_;  // none: both are contiguous
};

}  // namespace jackpot
