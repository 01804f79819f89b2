// radial_flow on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/radial_flow.h.
#include "../kernels/radial_flow.h"

#include "rows.h"

namespace hk {
namespace {

using namespace radial;

// ---- Instruction-set clones of the kernels: thin, not templates ----

#define HK_RADIAL_CLONES(T)                                                                                           \
  HK_CLONES double forward_clone(int64_t layers, int64_t d, const T* centers, const T* alpha, const T* beta, T* z,    \
                                 T* y) {                                                                              \
    return forward_row(layers, d, centers, alpha, beta, z, y);                                                        \
  }                                                                                                                   \
  HK_CLONES void backward_clone(int64_t layers, int64_t d, const T* centers, const T* alpha, const T* beta, T* z,     \
                                double grad_log, T* g, T* ys, Layer* stack, T* d_centers, double* d_alpha,            \
                                double* d_beta) {                                                                     \
    backward_row(layers, d, centers, alpha, beta, z, grad_log, g, ys, stack, d_centers, d_alpha, d_beta);             \
  }

HK_RADIAL_CLONES(float)
HK_RADIAL_CLONES(double)

struct Sizes {
  int64_t rows = 1, d, layers, chunk, chunks, grain;

  Sizes(const Tensor& z, const Tensor& center, const Tensor& alpha, const Tensor& beta) {
    bool fits = z.dim() >= 1 && center.dim() == 2 && alpha.dim() == 1 && same_shape(alpha, beta);
    fits = fits && center.size(0) == alpha.size(0) && center.size(1) == z.size(z.dim() - 1);
    for (const Tensor* t : {&center, &alpha, &beta}) fits = fits && t->scalar_type() == z.scalar_type();
    STD_TORCH_CHECK(fits, "radial_flow: shapes or dtypes do not fit");
    for (int64_t i = 0; i + 1 < z.dim(); ++i) rows *= z.size(i);
    layers = center.size(0), d = center.size(1);
    // Borders of chunks, each with sums of its own, depend on sizes alone.
    constexpr int64_t kChunk = 64, kMostChunks = 32, kGrain = 16384;
    chunk = std::max(kChunk, (rows + kMostChunks - 1) / kMostChunks);
    chunks = (rows + chunk - 1) / chunk;
    grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, chunk * d * layers));
  }

  int64_t sums() const { return layers * (d + 2); }

  // Runs f(chunk, first row, end) over the chunks, in parallel.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * chunk, std::min(rows, (i + 1) * chunk));
    });
  }
};

// ---- The two operators, in one dtype ----

template <class T>
void forward(const Sizes& sizes, const Tensor& z, const Tensor& center, const Tensor& alpha, const Tensor& beta,
             const Tensor& output, const Tensor& log_abs_det) {
  const T *from = data<T>(z), *centers = data<T>(center), *alphas = data<T>(alpha), *betas = data<T>(beta);
  T *to = written<T>(output), *logs = written<T>(log_abs_det);
  sizes.run([&](int64_t, int64_t first, int64_t last) {
    Buffer<T> y(sizes.d);
    for (int64_t row = first; row < last; ++row) {
      T* at = to + row * sizes.d;
      std::copy_n(from + row * sizes.d, sizes.d, at);
      logs[row] = static_cast<T>(forward_clone(sizes.layers, sizes.d, centers, alphas, betas, at, y.data()));
    }
  });
}

template <class T>
void backward(const Sizes& sizes, const MaybeTensor& grad, const MaybeTensor& grad_log, const Tensor& z,
              const Tensor& center, const Tensor& alpha, const Tensor& beta, const Tensor* results) {
  const T *gs = data<T>(grad), *ls = data<T>(grad_log), *from = data<T>(z), *centers = data<T>(center);
  const T *alphas = data<T>(alpha), *betas = data<T>(beta);
  const int64_t d = sizes.d, layers = sizes.layers;
  T* to = written<T>(results[0]);
  Buffer<double> partial(sizes.chunks * sizes.sums());
  sizes.run([&](int64_t chunk, int64_t first, int64_t last) {
    Buffer<T> here(d), ys(layers * d), run(layers * d);
    Buffer<double> room(layers * (sizeof(Layer) / sizeof(double)));
    Layer* stack = reinterpret_cast<Layer*>(room.data());
    double* sums = partial.data() + chunk * sizes.sums();
    for (int64_t row = first; row < last; ++row) {
      T* g = to + row * d;
      std::copy_n(from + row * d, d, here.data());
      if (gs)
        std::copy_n(gs + row * d, d, g);
      else
        std::fill(g, g + d, T(0));
      backward_clone(layers, d, centers, alphas, betas, here.data(), ls ? ls[row] : 0, g, ys.data(), stack,
                     run.data(), sums + layers * d, sums + layers * (d + 1));
      if ((row - first) % kRun == kRun - 1 || row == last - 1) flush(sums, run.data(), layers * d);
    }
  });
  Buffer<double> total(sizes.sums());
  for (int64_t chunk = 0; chunk < sizes.chunks; ++chunk)
    for (int64_t i = 0; i < sizes.sums(); ++i) total[i] += partial[chunk * sizes.sums() + i];
  const double* sum = total.data();
  for (int64_t n = 1; n < 4; ++n)
    for (int64_t i = 0; i < results[n].numel(); ++i) written<T>(results[n])[i] = static_cast<T>(*sum++);
}

}  // namespace

std::tuple<Tensor, Tensor> radial_flow(Tensor z, Tensor center, Tensor alpha, Tensor beta) {
  const Sizes sizes(z, center, alpha, beta);
  const Tensor output = empty_for(z, true), log_abs_det = empty_for(z, true, 1);
  HK_DISPATCH("radial_flow", z, forward, sizes, packed(z), packed(center), packed(alpha), packed(beta), output,
              log_abs_det);
  return {output, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> radial_flow_backward(MaybeTensor grad_output, MaybeTensor grad_log_abs_det,
                                                                Tensor z, Tensor center, Tensor alpha, Tensor beta) {
  const Sizes sizes(z, center, alpha, beta);
  const Tensor results[4] = {empty_for(z, true), empty_for(center, true), empty_for(alpha, true),
                             empty_for(beta, true)};
  HK_DISPATCH("radial_flow", z, backward, sizes, packed(grad_output), packed(grad_log_abs_det), packed(z),
              packed(center), packed(alpha), packed(beta), results);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace hk
