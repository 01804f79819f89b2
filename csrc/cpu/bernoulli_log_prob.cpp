// bernoulli_log_prob on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/bernoulli_log_prob.h.
#include "../kernels/bernoulli_log_prob.h"

#include <atomic>

#include "rows.h"

namespace hk {
namespace {

using namespace bernoulli;

// ---- Logits (A, O, N, E) and a value (A, N, E), bits or of the logits' dtype ----

class Batch {
 public:
  explicit Batch(const Tensor& logits)
      : blocks(logits.size(0) * logits.size(1), logits.size(2), logits.size(3)), samples_(logits.size(1)) {}

  // Where in the value the element at offset `at` of the logits has its partner.
  int64_t partner(int64_t at) const {
    const int64_t plane = blocks.rows * blocks.features, replica = at / plane;
    return at - (replica - replica / samples_) * plane;
  }

  // Whether it is the first of those that have this partner.
  bool comes_first(int64_t at) const { return at / (blocks.rows * blocks.features) % samples_ == 0; }

  RowBlocks blocks;

 private:
  int64_t samples_;
};

// The public function makes these tensors itself, so a refusal needs no more words.
void check(const Tensor& logits, const Tensor& value) {
  bool fits = logits.dim() == 4 && value.dim() == 3 && value.size(0) == logits.size(0);
  for (int64_t i = 1; fits && i < 3; ++i) fits = value.size(i) == logits.size(i + 1);
  STD_TORCH_CHECK(fits, "bernoulli_log_prob: shapes do not fit");
}

// Runs f(value's data) with the type that the value has.
template <class T, class F>
void with_value(const Tensor& value, const F& f) {
  const void* data = value.const_data_ptr();
  if (value.scalar_type() == ScalarType::Bool || value.scalar_type() == ScalarType::Byte) {
    f(static_cast<const uint8_t*>(data));
  } else {
    constexpr ScalarType kOwn = sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
    STD_TORCH_CHECK(value.scalar_type() == kOwn, "bernoulli_log_prob: dtypes do not fit");
    f(static_cast<const T*>(data));
  }
}

// Whether numbers are further from [0, 1] than rounding takes a probability; what is not finite shows in its own row.
template <class V>
bool stray(int64_t n, const V* value) {
  constexpr double kRounding = 1e-3;
  if (run(AreProbabilities<V>{.n = n, .value = value})) return false;
  return std::any_of(value, value + n,
                     [](double x) { return std::isfinite(x) && (x < -kRounding || x > 1 + kRounding); });
}

// ---- In one dtype ----

template <class T>
void forward(const Tensor& logits, const Tensor& value, const Tensor& log_prob) {
  const Batch batch(logits);
  const T* ls = data<T>(logits);
  T* to = written<T>(log_prob);
  std::atomic<bool> sound{true};
  with_value<T>(value, [&]<class V>(const V* xs) {
    batch.blocks.run(
        [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
          if (batch.comes_first(at) && stray(n * width, xs + batch.partner(at))) sound = false;
          alignas(64) T linear[kRowBlock], e[kRowBlock];
          run(Forward<T, V>{.rows = n, .width = width, .logits = ls + at, .value = xs + batch.partner(at),
                            .linear = linear, .e = e, .sums = sums});
        },
        [&](int64_t first, int64_t n, const double* sums) { store_rows(to, first, n, sums); });
  });
  STD_TORCH_CHECK(sound, "bernoulli_log_prob: value must be in [0, 1]");
}

template <class T>
void backward(const Tensor& grad, const Tensor& logits, const Tensor& value, const Tensor& d_logits) {
  const Batch batch(logits);
  const T *gs = data<T>(grad), *ls = data<T>(logits);
  T* to = written<T>(d_logits);
  with_value<T>(value, [&]<class V>(const V* xs) {
    batch.blocks.run(
        [&](int64_t at, int64_t first, int64_t n, int64_t width, double*) {
          alignas(64) T spread_grad[kRowBlock];
          run(Backward<T, V>{.rows = n, .width = width, .grad = gs + first, .spread_grad = spread_grad,
                             .logits = ls + at, .value = xs + batch.partner(at), .d_logits = to + at});
        },
        [](int64_t, int64_t, const double*) {});
  });
}

template <class T>
void double_backward(const Tensor& h, const Tensor& grad, const Tensor& logits, const Tensor& value,
                     const Tensor& d_grad, const Tensor& d_logits) {
  const Batch batch(logits);
  const T *hs = data<T>(h), *gs = data<T>(grad), *ls = data<T>(logits);
  T *rows_to = written<T>(d_grad), *to = written<T>(d_logits);
  with_value<T>(value, [&]<class V>(const V* xs) {
    batch.blocks.run(
        [&](int64_t at, int64_t first, int64_t n, int64_t width, double* sums) {
          alignas(64) T spread_grad[kRowBlock], terms[kRowBlock];
          run(DoubleBackward<T, V>{.rows = n, .width = width, .h = hs + at, .grad = gs + first,
                                   .spread_grad = spread_grad, .logits = ls + at, .value = xs + batch.partner(at),
                                   .terms = terms, .sums = sums, .d_logits = to + at});
        },
        [&](int64_t first, int64_t n, const double* sums) { store_rows(rows_to, first, n, sums); });
  });
}

// ---- The operators ----

Tensor bernoulli_log_prob(Tensor logits, Tensor value) {
  check(logits, value);
  const Tensor log_prob = empty_for(logits, true, 1);
  HK_DISPATCH("bernoulli_log_prob", logits, forward, packed(logits), packed(value), log_prob);
  return log_prob;
}

Tensor bernoulli_log_prob_backward(Tensor grad, Tensor logits, Tensor value) {
  check(logits, value);
  const Tensor d_logits = empty_for(logits, true);
  HK_DISPATCH("bernoulli_log_prob", logits, backward, packed(grad), packed(logits), packed(value), d_logits);
  return d_logits;
}

std::tuple<Tensor, Tensor> bernoulli_log_prob_double_backward(Tensor h, Tensor grad, Tensor logits, Tensor value) {
  check(logits, value);
  STD_TORCH_CHECK(same_shape(h, logits), "bernoulli_log_prob: shapes do not fit");
  const Tensor d_grad = empty_for(logits, true, 1), d_logits = empty_for(logits, true);
  HK_DISPATCH("bernoulli_log_prob", logits, double_backward, packed(h), packed(grad), packed(logits), packed(value),
              d_grad, d_logits);
  return {d_grad, d_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("bernoulli_log_prob.cpp", TORCH_BOX(&bernoulli_log_prob));
  m.impl("bernoulli_log_prob_backward.cpp", TORCH_BOX(&bernoulli_log_prob_backward));
  m.impl("bernoulli_log_prob_double_backward.cpp", TORCH_BOX(&bernoulli_log_prob_double_backward));
}

}  // namespace hk
