// iwae_bound and its surrogates on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/iwae.h.
#include "../kernels/iwae.h"

#include "rows.h"

namespace hk {
namespace {

using namespace iwae_columns;

// Log-weights (K, N) in parts, runs of samples of blocks of columns, as sizes alone decide.
template <class T>
class Parts {
 public:
  explicit Parts(const Tensor& log_weights)
      : data_(hk::data<T>(log_weights)), samples_(log_weights.size(0)), n_(log_weights.numel() / samples_) {
    blocks_ = (n_ + kColumns - 1) / kColumns;
    run_ = std::min(samples_, kPart / std::clamp<int64_t>(n_, 1, kColumns));
    runs_ = (samples_ + run_ - 1) / run_;
  }

  int64_t samples() const { return samples_; }

  // f(columns of a part, offset of its first element, run, first column) for all parts, in parallel.
  template <class F>
  void each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, run_ * std::min(n_, kColumns)));
    torch::stable::parallel_for(0, blocks_ * runs_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t run = part % runs_, column = part / runs_ * kColumns, sample = run * run_;
        const int64_t at = sample * n_ + column, length = std::min(run_, samples_ - sample);
        f(Columns<T>{data_ + at, length, n_, std::min(kColumns, n_ - column)}, at, run, column);
      }
    });
  }

  // The sums of all columns, in the order of the samples; they last as long as this.
  Sums<T> sums(int64_t power) {
    tops_.resize(runs_ * n_);
    totals_.resize(runs_ * n_ * (power ? 2 : 1));
    const Sums<T> first{tops_.data(), totals_.data(), totals_.data() + (power ? runs_ * n_ : 0)};
    each([&](const Columns<T>& x, int64_t, int64_t run, int64_t column) {
      hk::run(ColumnSums<T>{x, power, first.from(run * n_ + column)});
    });
    if (runs_ > 1) {
      torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * kColumns; column < std::min(n_, end * kColumns); column += kColumns) {
          hk::run(Join<T>{first.from(column), runs_, n_, std::min(kColumns, n_ - column), power});
        }
      });
    }
    return first;
  }

 private:
  static constexpr int64_t kPart = 65536;  // elements: they stay in a core's cache
  const T* data_;
  int64_t samples_, n_, blocks_, run_, runs_;
  std::vector<T> tops_;
  std::vector<double> totals_;
};

template <class T>
void forward(const Tensor& log_weights, int64_t power, const Tensor& result) {
  Parts<T> parts(log_weights);
  const Sums<T> sums = parts.sums(power);
  T* to = written<T>(result);
  torch::stable::parallel_for(0, result.numel(), 4096, [&](int64_t begin, int64_t end) {
    results(sums.from(begin), parts.samples(), end - begin, power, to + begin);
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& log_weights, int64_t power, const Tensor& d_log_weights) {
  Parts<T> parts(log_weights);
  const T* gs = data<T>(grad);
  T* to = written<T>(d_log_weights);
  const Sums<T> sums = parts.sums(0);
  parts.each([&](const Columns<T>& x, int64_t at, int64_t, int64_t column) {
    run(Gradient<T>{x, power, sums.from(column), gs + column, to + at});
  });
}

// api.py says more, and says it first.
void check(const Tensor& log_weights) {
  STD_TORCH_CHECK(log_weights.dim() > 0 && log_weights.size(0) > 0, "iwae: log_weights must be (K, ...)");
}

// ---- The operators ----

Tensor iwae(Tensor log_weights, int64_t power) {
  check(log_weights);
  const Tensor result = empty_of(log_weights.sizes().data() + 1, log_weights.dim() - 1, log_weights);
  HK_DISPATCH("iwae", log_weights, forward, packed(log_weights), power, result);
  return result;
}

Tensor iwae_backward(Tensor grad, Tensor log_weights, int64_t power) {
  check(log_weights);
  const Tensor d_log_weights = empty_for(log_weights, true);
  HK_DISPATCH("iwae", log_weights, backward, packed(grad), packed(log_weights), power, d_log_weights);
  return d_log_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("iwae.cpp", TORCH_BOX(&iwae));
  m.impl("iwae_backward.cpp", TORCH_BOX(&iwae_backward));
}

}  // namespace hk
