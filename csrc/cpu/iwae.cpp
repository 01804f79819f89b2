// iwae_bound and its surrogates on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/iwae.h.
#include "../kernels/iwae.h"

#include "rows.h"

namespace hk {
namespace {

using namespace iwae_columns;

// Log-weights (K, N) in parts, runs of samples of blocks of so many columns at most, as sizes alone decide.
template <class T>
class Parts {
 public:
  Parts(const Tensor& log_weights, int64_t columns)
      : data_(hk::data<T>(log_weights)), samples_(log_weights.size(0)), n_(log_weights.numel() / samples_),
        columns_(columns) {
    blocks_ = (n_ + columns_ - 1) / columns_;
    run_ = std::min(samples_, kPart / std::clamp<int64_t>(n_, 1, columns_));
    runs_ = (samples_ + run_ - 1) / run_;
  }

  int64_t samples() const { return samples_; }
  int64_t columns() const { return n_; }

  // f(columns of a part, offset of its first element, run, first column) for all parts, in parallel.
  template <class F>
  void each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, run_ * std::min(n_, columns_)));
    torch::stable::parallel_for(0, blocks_ * runs_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t run = part % runs_, column = part / runs_ * columns_, sample = run * run_;
        const int64_t at = sample * n_ + column, length = std::min(run_, samples_ - sample);
        f(Columns<T>{data_ + at, length, n_, std::min(columns_, n_ - column)}, at, run, column);
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
        for (int64_t column = begin * columns_; column < std::min(n_, end * columns_); column += columns_) {
          hk::run(Join<T>{first.from(column), runs_, n_, std::min(columns_, n_ - column), power});
        }
      });
    }
    return first;
  }

 private:
  static constexpr int64_t kPart = 65536;  // elements: they stay in a core's cache
  const T* data_;
  int64_t samples_, n_, columns_, blocks_, run_, runs_;
  std::vector<T> tops_;
  std::vector<double> totals_;
};

template <class T>
void forward(const Tensor& log_weights, int64_t power, const Tensor& result, const Tensor& kept) {
  Parts<T> parts(log_weights, kColumns);
  const Sums<T> sums = parts.sums(power);
  const int64_t n = parts.columns();
  T *to = written<T>(result), *top = written<T>(kept);
  torch::stable::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    results(sums.from(begin), parts.samples(), end - begin, power, to + begin);
    if (top) keep(sums.from(begin), end - begin, top + begin, top + n + begin);
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& log_weights, const Tensor& kept, int64_t power,
              const Tensor& d_log_weights) {
  const Parts<T> parts(log_weights, kWide);
  const T *gs = data<T>(grad), *top = data<T>(kept), *inverse = top + parts.columns();
  T* to = written<T>(d_log_weights);
  parts.each([&](const Columns<T>& x, int64_t at, int64_t, int64_t column) {
    run(Gradient<T>{x, power, top + column, inverse + column, gs + column, to + at});
  });
}

// api.py says more, and says it first.
void check(const Tensor& log_weights) {
  STD_TORCH_CHECK(log_weights.dim() > 0 && log_weights.size(0) > 0, "iwae: log_weights must be (K, ...)");
}

// Two numbers a column of log-weights (K, ...).
Tensor pairs_like(const Tensor& log_weights) {
  int64_t sizes[kMostDims] = {2};
  STD_TORCH_CHECK(log_weights.dim() <= kMostDims, "iwae: more than 64 dimensions");
  for (int64_t i = 1; i < log_weights.dim(); ++i) sizes[i] = log_weights.size(i);
  return empty_of(sizes, log_weights.dim(), log_weights);
}

// ---- The operators ----

// The result, and if it keeps them the largest log-weights and inverse sums (2, ...).
std::tuple<Tensor, Tensor> iwae(Tensor log_weights, int64_t power, bool keeps) {
  check(log_weights);
  const Tensor result = empty_of(log_weights.sizes().data() + 1, log_weights.dim() - 1, log_weights);
  const Tensor kept = keeps ? pairs_like(log_weights) : empty_of({0}, log_weights);
  HK_DISPATCH("iwae", log_weights, forward, packed(log_weights), power, result, kept);
  return {result, kept};
}

Tensor iwae_backward(Tensor grad, Tensor log_weights, Tensor kept, int64_t power) {
  check(log_weights);
  STD_TORCH_CHECK(kept.numel() * log_weights.size(0) == 2 * log_weights.numel() &&
                      kept.scalar_type() == log_weights.scalar_type(),
                  "iwae: what was kept does not fit");
  const Tensor d_log_weights = empty_for(log_weights, true);
  HK_DISPATCH("iwae", log_weights, backward, packed(grad), packed(log_weights), packed(kept), power, d_log_weights);
  return d_log_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("iwae.cpp", TORCH_BOX(&iwae));
  m.impl("iwae_backward.cpp", TORCH_BOX(&iwae_backward));
}

}  // namespace hk
