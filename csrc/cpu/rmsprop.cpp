// rmsprop_step_ on the CPU: checks and parallel loops. The arithmetic is in kernels/rmsprop.h.
#include "../kernels/rmsprop.h"

#include <limits>

#include "rows.h"

namespace hk {
namespace {

using namespace rmsprop;

// Runs f(row, first, n, item) over chunks of the rows. Their borders depend on sizes alone.
struct Chunks {
  static constexpr int64_t kChunk = 16384;
  int64_t rows, columns, a_row = (columns + kChunk - 1) / kChunk;

  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, rows * a_row, 2, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % a_row * kChunk;
        f(item / a_row, first, std::min(kChunk, columns - first), item);
      }
    });
  }
};

// False, and nothing changed, where a gradient is not finite.
template <class T>
void step(const Tensor& parameter, const Tensor& gradient, const Tensor& square_average, double learning_rate,
          double alpha, double eps, double max_norm, bool* finite) {
  const Chunks chunks{gradient.size(0), gradient.size(1)};
  const T* g = static_cast<const T*>(gradient.const_data_ptr());
  T *p = written<T>(parameter), *v = written<T>(square_average);
  Buffer<double> squares(chunks.rows * chunks.a_row);
  chunks.run([&](int64_t row, int64_t first, int64_t n, int64_t item) {
    squares[item] = run(SumOfSquares<T>{n, g + row * chunks.columns + first});
  });
  Buffer<double> norms(chunks.rows);
  for (int64_t item = 0; item < squares.size(); ++item) norms[item / chunks.a_row] += squares[item];
  for (double& norm : norms) *finite = *finite && std::isfinite(norm = std::sqrt(norm));
  if (!*finite) return;
  chunks.run([&](int64_t row, int64_t first, int64_t n, int64_t) {
    const double scale = std::min(1.0, max_norm / (norms[row] + 1e-6));
    const int64_t at = row * chunks.columns + first;
    run(Update<T>{.n = n, .learning_rate = static_cast<T>(learning_rate), .alpha = static_cast<T>(alpha),
                  .eps = static_cast<T>(eps), .scale = static_cast<T>(scale), .gradient = g + at,
                  .square_average = v + at, .parameter = p + at});
  });
}

// ---- The operators ----

bool rmsprop_step_(Tensor parameter, Tensor gradient, Tensor square_average, double learning_rate, double alpha,
                   double eps, double max_norm) {
  bool fits = gradient.dim() == 2, finite = true;
  for (const Tensor* t : {&parameter, &square_average, &gradient})
    fits = fits && same_shape(*t, gradient) && t->scalar_type() == gradient.scalar_type() && t->is_contiguous();
  STD_TORCH_CHECK(fits, "rmsprop_step_: shapes, dtypes or layouts do not fit");
  HK_DISPATCH("rmsprop_step_", gradient, step, parameter, gradient, square_average, learning_rate, alpha, eps,
              max_norm, &finite);
  return finite;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("rmsprop_step_.cpp", TORCH_BOX(&rmsprop_step_));
}

}  // namespace hk
