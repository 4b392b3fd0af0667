// From torch's tensors to what the launchers take.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "launch.h"

// A torch without CUDA has no such function, which is why this library is loaded only where torch has CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace jackpot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// The device of a tensor, made current, and torch's stream on it.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(index_of(tensor)), guard_(index_) {
    // The runtime linked into this library keeps a current device of its own.
    check(cudaSetDevice(index_));
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                    "torch has no stream on cuda:", index_);
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index_));
    launch_.stream = static_cast<cudaStream_t>(stream);
    launch_.multiprocessors = static_cast<uint32_t>(multiprocessors);
  }

  const Launch& launch() const { return launch_; }

  void require_here(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index_, name,
                    " must be on one device with the others, cuda:", index_);
  }

  template <class T>
  T* require(const Tensor& tensor, ScalarType dtype, const char* name) const {
    require_here(tensor, name);
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == dtype, name,
                    " must be contiguous and of the expected dtype");
    return static_cast<T*>(tensor.data_ptr());
  }

  int64_t* control_of(const Tensor& control) const {
    STD_TORCH_CHECK(control.numel() == 3, "control must have 3 elements, got ", control.numel());
    return require<int64_t>(control, ScalarType::Long, "control");
  }

 private:
  static int32_t index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "tensors must be on a CUDA device, like the others");
    return tensor.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Launch launch_ = {};
};

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline int32_t stride_of(const Tensor& tensor, int64_t dim) {
  const int64_t stride = tensor.stride(dim);
  STD_TORCH_CHECK(std::llabs(stride) < 1ll << 31, "strides of weights must be below 2^31, got ", stride);
  return static_cast<int32_t>(stride);
}

// The dimensions of a weight and of another tensor of its shape, the outermost first. Those that follow each
// other in both memories count as one, as a step of an index costs a division; those of one element as none.
inline std::vector<Dim> merged_dims(const Tensor& weight, const Tensor& other, const char* name) {
  std::vector<Dim> dims;
  STD_TORCH_CHECK(weight.dim() == other.dim(), name, " must have the weight's shape and device");
  for (int64_t i = 0; i < weight.dim(); ++i) {
    const int64_t size = weight.size(i);
    STD_TORCH_CHECK(size == other.size(i), name, " must have the weight's shape and device");
    const Dim dim = {static_cast<uint32_t>(size), stride_of(weight, i), stride_of(other, i)};
    if (size == 1) continue;
    if (!dims.empty() && dims.back().weight_stride == dim.weight_stride * size &&
        dims.back().effective_stride == dim.effective_stride * size) {
      dims.back() = {dims.back().size * dim.size, dim.weight_stride, dim.effective_stride};
    } else {
      dims.push_back(dim);
    }
  }
  return dims;
}

// Elements of each segment. Positions and tiles are counted in 32 bits.
inline std::vector<int64_t> segment_sizes(const Tensors& scores, bool joint) {
  STD_TORCH_CHECK(!scores.empty(), "scores must name at least one layer, got none");
  STD_TORCH_CHECK(!joint || scores.size() <= kMaxLayers, "scores must have at most ", kMaxLayers,
                  " layers in one segment, got ", scores.size());
  std::vector<int64_t> sizes(joint ? 1 : 0, 0);
  for (const Tensor& score : scores) {
    if (!joint) sizes.push_back(0);
    sizes.back() += score.numel();
    STD_TORCH_CHECK(sizes.back() <= 0xffff0000ll, "a segment must have at most 2^32 - 2^16 weights, got ",
                    sizes.back());
  }
  return sizes;
}

inline Place place_of(const Tensor& scores) { return {static_cast<uint32_t>(scores.numel()), 0, 0, 0}; }

inline uint32_t* mask_of(const Device& device, const Tensor& mask, const Tensor& scores) {
  STD_TORCH_CHECK(mask.numel() == (scores.numel() + 31) / 32,
                  "masks must have one int32 word for 32 weights");
  return device.require<uint32_t>(mask, ScalarType::Int, "masks");
}

inline Workspace workspace_in(const Device& device, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  const Workspace workspace(device.require<int64_t>(tensor, ScalarType::Long, "workspace"), sizes);
  STD_TORCH_CHECK(tensor.numel() == workspace.size(), "workspace must be made for these layers");
  return workspace;
}

// Zeros for one call, where the caller has no workspace.
inline Tensor new_workspace(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_zeros(like, {Workspace(nullptr, sizes).size()}, ScalarType::Long);
}

}  // namespace jackpot
