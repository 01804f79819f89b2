// radial_flow on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/radial_flow.h.
#include "../kernels/radial_flow.h"

#include "rows.h"

namespace hk {
namespace {

using namespace radial;

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
    chunk = std::max(kChunk, (rows + kMostChunks * kRows - 1) / (kMostChunks * kRows) * kRows);
    chunks = (rows + chunk - 1) / chunk;
    grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, chunk * d * layers));
  }

  // Runs f(chunk, first row, end) over the chunks, in parallel.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * chunk, std::min(rows, (i + 1) * chunk));
    });
  }
};

// ---- Rows in whole groups of lanes ----

// Zeros without `from`.
template <class T>
void load(int64_t rows, int64_t d, const T* from, T* to, int64_t width) {
  if (from) pad_rows(rows, d, from, to, width);
  else std::fill_n(to, rows * width, T(0));
}

// The layers, their centres in whole groups of lanes.
template <class T>
struct PaddedLayers {
  int64_t width;
  Buffer<T> centers;
  Layers<T> layers;

  PaddedLayers(const Sizes& sizes, const Tensor& center, const Tensor& alpha, const Tensor& beta)
      : width((sizes.d + kGroupLanes<T> - 1) / kGroupLanes<T> * kGroupLanes<T>),
        centers(sizes.layers * width),
        layers{sizes.layers, sizes.d, width, centers.data(), data<T>(alpha), data<T>(beta)} {
    pad_rows(sizes.layers, sizes.d, data<T>(center), centers.data(), width);
  }
};

// ---- In one dtype ----

template <class T>
void forward(const Sizes& sizes, const Tensor& z, const Tensor& center, const Tensor& alpha, const Tensor& beta,
             const Tensor& output, const Tensor& log_abs_det) {
  const PaddedLayers<T> padded(sizes, center, alpha, beta);
  const int64_t d = sizes.d, width = padded.width;
  const T* from = data<T>(z);
  T *to = written<T>(output), *logs = written<T>(log_abs_det);
  sizes.run([&](int64_t, int64_t first, int64_t last) {
    Buffer<T> here(kRows * width);
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = std::min(kRows, last - row);
      load(rows, d, from + row * d, here.data(), width);
      run(Forward<T>{.layers = padded.layers, .rows = rows, .z = here.data(), .log_abs_det = logs + row});
      copy_rows(here.data(), width, rows, d, to + row * d, d);
    }
  });
}

template <class T>
void backward(const Sizes& sizes, const MaybeTensor& grad, const MaybeTensor& grad_log, const Tensor& z,
              const Tensor& center, const Tensor& alpha, const Tensor& beta, const Tensor* results) {
  const PaddedLayers<T> padded(sizes, center, alpha, beta);
  const int64_t d = sizes.d, width = padded.width, layers = sizes.layers, n_sums = layers * (width + 2);
  const T *gs = data<T>(grad), *ls = data<T>(grad_log), *from = data<T>(z);
  T* to = written<T>(results[0]);
  Buffer<double> partial(sizes.chunks * n_sums);
  sizes.run([&](int64_t chunk, int64_t first, int64_t last) {
    Buffer<T> here(kRows * width), g(kRows * width), ys(kRows * layers * width), run_sums(layers * width);
    std::vector<Layer> stack(kRows * layers);
    double *sums = partial.data() + chunk * n_sums, *d_alpha = sums + layers * width, *d_beta = d_alpha + layers;
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = std::min(kRows, last - row);
      load(rows, d, from + row * d, here.data(), width);
      load(rows, d, gs ? gs + row * d : nullptr, g.data(), width);
      run(Backward<T>{.layers = padded.layers, .rows = rows, .z = here.data(), .grad_log = ls ? ls + row : nullptr,
                      .g = g.data(), .ys = ys.data(), .stack = stack.data(), .d_centers = run_sums.data(),
                      .d_alpha = d_alpha, .d_beta = d_beta});
      copy_rows(g.data(), width, rows, d, to + row * d, d);
      if ((row - first + kRows) % kRun == 0 || row + kRows >= last) flush(sums, run_sums.data(), layers * width);
    }
  });
  Buffer<double> total(n_sums);
  for (int64_t chunk = 0; chunk < sizes.chunks; ++chunk)
    for (int64_t i = 0; i < n_sums; ++i) total[i] += partial[chunk * n_sums + i];
  T *d_center = written<T>(results[1]), *d_alpha = written<T>(results[2]), *d_beta = written<T>(results[3]);
  for (int64_t k = 0; k < layers; ++k) {
    for (int64_t j = 0; j < d; ++j) d_center[k * d + j] = static_cast<T>(total[k * width + j]);
    d_alpha[k] = static_cast<T>(total[layers * width + k]);
    d_beta[k] = static_cast<T>(total[layers * (width + 1) + k]);
  }
}

// ---- The operators ----

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("radial_flow.cpp", TORCH_BOX(&radial_flow));
  m.impl("radial_flow_backward.cpp", TORCH_BOX(&radial_flow_backward));
}

}  // namespace hk
