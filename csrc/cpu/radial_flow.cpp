// radial_flow on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/radial_flow.h.
#include "../kernels/radial_flow.h"

#include "rows.h"

namespace hk {
namespace {

using namespace radial;

// ---- Instruction-set clones of the kernels: thin, not templates ----

#define HK_RADIAL_CLONES(T)                                                                                           \
  HK_CLONES void forward_clone(const Layers<T>& layers, int64_t rows, Vector<T>* z, T* log_abs_det) {                 \
    if (rows == kRows) return forward_rows<T, kRows>(layers, z, log_abs_det);                                         \
    for (int64_t r = 0; r < rows; ++r) forward_rows<T, 1>(layers, z + r * layers.vectors, log_abs_det + r);           \
  }                                                                                                                   \
  HK_CLONES void backward_clone(const Layers<T>& layers, int64_t rows, Vector<T>* z, const T* grad_log, Vector<T>* g, \
                                Vector<T>* ys, Layer* stack, Vector<T>* d_centers, double* d_alpha, double* d_beta) { \
    if (rows == kRows)                                                                                                \
      return backward_rows<T, kRows>(layers, z, grad_log, g, ys, stack, d_centers, d_alpha, d_beta);                  \
    for (int64_t r = 0; r < rows; ++r, z += layers.vectors, g += layers.vectors)                                      \
      backward_rows<T, 1>(layers, z, grad_log ? grad_log + r : nullptr, g, ys, stack, d_centers, d_alpha, d_beta);    \
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

// ---- Rows in whole vectors ----

// `rows` rows of `d` numbers to rows of `width`, or back; the rest of a row is left as it is. Zeros without `from`.
template <class T>
void copy_rows(int64_t rows, int64_t d, const T* from, int64_t from_width, T* to, int64_t to_width) {
  for (int64_t r = 0; r < rows; ++r)
    if (from)
      std::copy_n(from + r * from_width, d, to + r * to_width);
    else
      std::fill_n(to + r * to_width, d, T(0));
}

template <class T>
Vector<T>* vectors(Buffer<T>& buffer) {
  return reinterpret_cast<Vector<T>*>(buffer.data());
}

// The layers, their centres in whole vectors.
template <class T>
struct PaddedLayers {
  int64_t width;
  Buffer<T> centers;
  Layers<T> layers;

  PaddedLayers(const Sizes& sizes, const Tensor& center, const Tensor& alpha, const Tensor& beta)
      : width((sizes.d + kVectorLanes<T> - 1) / kVectorLanes<T> * kVectorLanes<T>),
        centers(sizes.layers * width),
        layers{sizes.layers, sizes.d, width / kVectorLanes<T>, vectors(centers), data<T>(alpha), data<T>(beta)} {
    copy_rows(sizes.layers, sizes.d, data<T>(center), sizes.d, centers.data(), width);
  }
};

// ---- The two operators, in one dtype ----

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
      copy_rows(rows, d, from + row * d, d, here.data(), width);
      forward_clone(padded.layers, rows, vectors(here), logs + row);
      copy_rows(rows, d, here.data(), width, to + row * d, d);
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
    Buffer<T> here(kRows * width), g(kRows * width), ys(kRows * layers * width), run(layers * width);
    Buffer<double> room(kRows * layers * (sizeof(Layer) / sizeof(double)));
    double *sums = partial.data() + chunk * n_sums, *d_alpha = sums + layers * width, *d_beta = d_alpha + layers;
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = std::min(kRows, last - row);
      copy_rows(rows, d, from + row * d, d, here.data(), width);
      copy_rows(rows, d, gs ? gs + row * d : nullptr, d, g.data(), width);
      backward_clone(padded.layers, rows, vectors(here), ls ? ls + row : nullptr, vectors(g), vectors(ys),
                     reinterpret_cast<Layer*>(room.data()), vectors(run), d_alpha, d_beta);
      copy_rows(rows, d, g.data(), width, to + row * d, d);
      if ((row - first + kRows) % kRun == 0 || row + kRows >= last) flush(sums, run.data(), layers * width);
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
