// Scores are compared as numbers and, as ranks, by their bits. The two agree only where subnormal numbers
// count, which torch.set_flush_denormal ends for a thread and for those that it starts.
#pragma once

#include <cfenv>

namespace jackpot {

// Lets this thread count them until the end of a scope.
class WithSubnormals {
 public:
  WithSubnormals() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~WithSubnormals() { std::fesetenv(&before_); }
  WithSubnormals(const WithSubnormals&) = delete;
  WithSubnormals& operator=(const WithSubnormals&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace jackpot
