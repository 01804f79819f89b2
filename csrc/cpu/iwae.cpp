// iwae_bound and its surrogates on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/iwae.h.
#include "../kernels/iwae.h"

#include "rows.h"

namespace hk {
namespace {

using namespace iwae_columns;

// ---- Instruction-set clones of the kernels: thin, not templates ----

#define HK_IWAE_CLONES(T)                                                                                 \
  HK_CLONES void forward_clone(const Columns<T>& x, int64_t power, T* to) { forward_block(x, power, to); } \
  HK_CLONES void backward_clone(const Columns<T>& x, int64_t power, const T* grad, T* to) {                \
    backward_block(x, power, grad, to);                                                                   \
  }

HK_IWAE_CLONES(float)
HK_IWAE_CLONES(double)

// Runs f(columns, first column) over the blocks, in parallel.
template <class T, class F>
void over_blocks(const Tensor& log_weights, const F& f) {
  const int64_t samples = log_weights.size(0), n = log_weights.numel() / samples;
  const int64_t blocks = (n + kColumns - 1) / kColumns;
  const T* from = data<T>(log_weights);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, samples * kColumns));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns;
      f(Columns<T>{from + first, samples, n, std::min(kColumns, n - first)}, first);
    }
  });
}

template <class T>
void forward(const Tensor& log_weights, int64_t power, const Tensor& result) {
  T* to = written<T>(result);
  over_blocks<T>(log_weights, [&](const Columns<T>& x, int64_t first) { forward_clone(x, power, to + first); });
}

template <class T>
void backward(const Tensor& grad, const Tensor& log_weights, int64_t power, const Tensor& d_log_weights) {
  const T* gs = data<T>(grad);
  T* to = written<T>(d_log_weights);
  over_blocks<T>(log_weights, [&](const Columns<T>& x, int64_t first) {
    backward_clone(x, power, gs + first, to + first);
  });
}

// api.py says more, and says it first.
void check(const Tensor& log_weights) {
  STD_TORCH_CHECK(log_weights.dim() > 0 && log_weights.size(0) > 0, "iwae: log_weights must be (K, ...)");
}

}  // namespace

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

}  // namespace hk
