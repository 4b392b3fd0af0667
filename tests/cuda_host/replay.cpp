// Runs the kernels on what a file holds and writes what they leave, for a test to compare with the CPU's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/launch.h"

using namespace jackpot;

namespace {

FILE *in, *out;

void require(bool fine, const char* what) {
  if (fine) return;
  fprintf(stderr, "replay: %s\n", what);
  exit(2);
}

int64_t number() {
  int64_t value;
  require(fread(&value, sizeof value, 1, in) == 1, "the file ends too early");
  return value;
}

// Memory of its own, so that a step past either end is noticed; `shift` elements off its alignment.
template <class T>
class Array {
 public:
  Array() : Array(read_bytes()) {}
  explicit Array(const std::vector<char>& bytes, size_t shift = 0)
      : size_(bytes.size() / sizeof(T)), shift_(shift) {
    storage_.resize(size_ + shift);
    if (!bytes.empty()) memcpy(data(), bytes.data(), bytes.size());
  }
  static std::vector<char> read_bytes() {
    std::vector<char> bytes(number());
    const size_t got = bytes.empty() ? 0 : fread(bytes.data(), 1, bytes.size(), in);
    require(got == bytes.size(), "the file ends too early");
    return bytes;
  }
  T* data() { return storage_.data() + shift_; }
  size_t size() const { return size_; }
  void write() {
    if (size_) fwrite(data(), sizeof(T), size_, out);
  }

 private:
  size_t size_, shift_;
  std::vector<T> storage_;
};

Launch read_launch() {
  Launch launch = {};
  launch.multiprocessors = 2;
  launch.blocks = static_cast<uint32_t>(number());
  launch.threads = static_cast<uint32_t>(number());
  launch.layers = static_cast<uint32_t>(number());
  cuda_host::resident_blocks = static_cast<unsigned>(number());
  cuda_host::backwards = number();
  return launch;
}

void pack() {
  const Launch launch = read_launch();
  const size_t shift = number();
  Array<uint8_t> mask(Array<uint8_t>::read_bytes(), shift);
  Array<uint32_t> words(std::vector<char>((mask.size() + 31) / 32 * 4));
  Array<uint8_t> back((std::vector<char>(mask.size())));
  require(pack_mask(launch, mask.data(), words.data(), mask.size()) == cudaSuccess, "pack_mask failed");
  require(unpack_mask(launch, words.data(), back.data(), mask.size()) == cudaSuccess, "unpack_mask failed");
  words.write();
  back.write();
}

void multiply() {
  const Launch launch = read_launch();
  const Dtype grad_dtype = static_cast<Dtype>(number()), weight_dtype = static_cast<Dtype>(number());
  const size_t shift = number();
  Array<uint16_t> grad(Array<uint16_t>::read_bytes(), shift), weight(Array<uint16_t>::read_bytes(), shift);
  Array<int64_t> dims;  // size, stride of grad, stride of weight; the innermost first
  Product product = {grad.data(), weight.data(), nullptr, grad_dtype, weight_dtype};
  size_t numel = 1;
  for (uint32_t i = 0; i < 3; ++i) {
    product.sizes[i] = static_cast<uint32_t>(dims.data()[3 * i]);
    product.grad_strides[i] = dims.data()[3 * i + 1];
    product.weight_strides[i] = dims.data()[3 * i + 2];
    numel *= product.sizes[i];
  }
  Array<float> out(std::vector<char>(numel * sizeof(float)));
  product.out = out.data();
  require(score_grad(launch, product) == cudaSuccess, "score_grad failed");
  out.write();
}

std::vector<int64_t> segment_sizes(const std::vector<int64_t>& numel, bool joint) {
  if (!joint) return numel;
  int64_t sum = 0;
  for (const int64_t n : numel) sum += n;
  return {sum};
}

void select() {
  const Launch launch = read_launch();
  ThresholdTable table = {};
  table.joint = number();
  std::vector<Array<float>> values(number());
  std::vector<ThresholdLayer> layers;
  std::vector<int64_t> numel;
  for (Array<float>& value : values) {
    layers.push_back({value.data(), {static_cast<uint32_t>(value.size()), 0, 0, 0}});
    numel.push_back(value.size());
  }
  Array<int64_t> num_kept;
  Array<float> value(std::vector<char>(num_kept.size() * 4));
  Array<int64_t> index(std::vector<char>(num_kept.size() * 8));
  table.num_kept = num_kept.data();
  table.value = value.data();
  table.index = index.data();
  const std::vector<int64_t> sizes = segment_sizes(numel, table.joint);
  std::vector<int64_t> words(Workspace(nullptr, sizes).size());
  require(threshold(launch, layers, table, Workspace(words.data(), sizes)) == cudaSuccess,
          "threshold failed");
  value.write();
  index.write();
}

struct Layer {
  size_t shift = number();
  Array<float> scores{Array<float>::read_bytes(), shift};
  Array<float> momenta{Array<float>::read_bytes(), shift};
  Array<uint32_t> mask;
  Dtype weight_dtype = static_cast<Dtype>(number()), effective_dtype = static_cast<Dtype>(number());
  Array<char> weight, effective;
  Array<int64_t> dims;  // size, stride of weight, stride of effective

  SwapLayer to_swap() {
    SwapLayer layer = {};
    layer.scores = scores.data();
    layer.mask = mask.data();
    layer.weight = weight.data();
    layer.effective = effective.size() ? effective.data() : nullptr;
    layer.place.numel = static_cast<uint32_t>(scores.size());
    layer.num_dims = static_cast<uint8_t>(dims.size() / 3);
    for (uint32_t i = 0; i < layer.num_dims; ++i) {
      const int64_t* const dim = dims.data() + 3 * i;
      layer.dims[i] = {static_cast<uint32_t>(dim[0]), static_cast<int32_t>(dim[1]),
                       static_cast<int32_t>(dim[2])};
    }
    layer.weight_dtype = weight_dtype;
    layer.effective_dtype = effective_dtype;
    return layer;
  }
};

void search() {
  const Launch launch = read_launch();
  const bool joint = number(), with_workspace = number();
  const Pairs pairs = static_cast<Pairs>(number());
  const int64_t seed = number();
  std::vector<Layer> layers(number());
  Array<int64_t> num_kept, control;
  Array<double> schedule;
  Array<int64_t> stats(std::vector<char>(num_kept.size() / 2 * 5 * 8));
  std::vector<int64_t> numel;
  for (Layer& layer : layers) numel.push_back(layer.scores.size());
  const std::vector<int64_t> sizes = segment_sizes(numel, joint);
  std::vector<int64_t> words(Workspace(nullptr, sizes).size());

  for (int64_t steps = number(); steps > 0; --steps) {
    Array<float> hyper, found_inf;
    std::vector<Array<float>> grads(layers.size());
    UpdateTable update = {};
    update.joint = joint;
    update.hyper = hyper.data();
    update.found_inf = found_inf.size() ? found_inf.data() : nullptr;
    update.control = control.data();
    std::vector<UpdateLayer> updates;
    std::vector<SwapLayer> swaps;
    for (size_t i = 0; i < layers.size(); ++i) {
      Layer& layer = layers[i];
      swaps.push_back(layer.to_swap());
      updates.push_back({layer.scores.data(), layer.momenta.data(),
                         grads[i].size() ? grads[i].data() : nullptr, layer.mask.data(), swaps[i].place});
    }
    const std::vector<int64_t> no_segments;
    if (!with_workspace) words.assign(words.size(), 0);
    const Workspace all(words.data(), sizes), counters(words.data(), no_segments);
    require(score_update(launch, updates, update, with_workspace ? all : counters) == cudaSuccess,
            "score_update failed");

    SwapTable table = {};
    table.joint = joint;
    table.pairs = pairs;
    table.seed = seed;
    table.num_kept = num_kept.data();
    table.schedule = schedule.data();
    table.steps = schedule.size() / 2;
    table.control = control.data();
    table.stats = stats.data();
    require(swap(launch, swaps, table, all) == cudaSuccess, "swap failed");

    const Counters& left = all.header()->counters;
    require(!left.ticket && !left.left && !left.cold && !left.blocks_done && !left.not_finite,
            "a counter was not reset");
    control.write();
    stats.write();
    for (Layer& layer : layers) {
      layer.scores.write();
      layer.momenta.write();
      layer.mask.write();
      layer.effective.write();
    }
  }
}

}  // namespace

int main(int count, char** names) {
  require(count == 3, "usage: replay INPUT OUTPUT");
  in = fopen(names[1], "rb");
  out = fopen(names[2], "wb");
  require(in && out, "cannot open the files");
  while (true) {
    int64_t command;
    if (fread(&command, sizeof command, 1, in) != 1) break;
    command == 0 ? pack() : command == 1 ? select() : command == 2 ? search() : multiply();
  }
  return fclose(out);
}
