// The whole search step in one call. Handing over some three hundred tensors takes a tenth of a step's time,
// so what stays from step to step is handed over once, and kept under a number until it is released.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "order.h"

namespace jackpot {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Tensors, never their addresses: each step asks anew where their memory is and whether it still fits.
struct Search {
  Tensors scores, momenta, masks, weights, effective;
  Tensor hyper, num_kept, schedule, control, stats;
  bool joint;
  std::string pairs;
  int64_t seed;
  std::optional<Tensor> workspace;
};

inline Pairs pairs_named(const std::string& name) {
  if (name == "best") return Pairs::kBest;
  if (name == "inverse") return Pairs::kInverse;
  STD_TORCH_CHECK(name == "random", "pairs must be best, inverse or random, got ", name);
  return Pairs::kRandom;
}

// On the device of the library.
void search_step(const Search& search, const Tensors& grads, const std::optional<Tensor>& found_inf);

class Searches {
 public:
  int64_t add(std::shared_ptr<const Search> search) {
    const std::lock_guard<std::mutex> lock(mutex_);
    searches_[++last_] = std::move(search);
    return last_;
  }
  void remove(int64_t number) {
    std::shared_ptr<const Search> removed;  // outlives the lock, for tensors may free much
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = searches_.find(number);
    if (found == searches_.end()) return;
    removed = std::move(found->second);
    searches_.erase(found);
  }
  std::shared_ptr<const Search> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = searches_.find(number);
    STD_TORCH_CHECK(found != searches_.end(), "search must be one that was begun here, got ", number);
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Search>> searches_;
  int64_t last_ = 0;
};

inline Searches& searches() {
  static Searches* const all = new Searches;  // never freed: tensors must not outlive torch
  return *all;
}

inline int64_t search_begin(const Tensors& scores, const Tensors& momenta, const Tensors& masks,
                            const Tensors& weights, const Tensors& effective, const Tensor& hyper,
                            const Tensor& num_kept, const Tensor& schedule, const Tensor& control,
                            const Tensor& stats, bool joint, const std::string& pairs, int64_t seed,
                            const std::optional<Tensor>& workspace) {
  return searches().add(
      std::make_shared<const Search>(Search{scores, momenta, masks, weights, effective, hyper, num_kept,
                                            schedule, control, stats, joint, pairs, seed, workspace}));
}

inline void search_step_(const Tensor&, int64_t number, const Tensors& grads,
                         const std::optional<Tensor>& found_inf) {
  search_step(*searches().at(number), grads, found_inf);
}

inline void search_end(const Tensor&, int64_t number) { searches().remove(number); }

}  // namespace jackpot
