// rational_quadratic_spline on the CPU: checks, allocation, parallel loops. The arithmetic is in
// kernels/rational_quadratic_spline.h.
#include "../kernels/rational_quadratic_spline.h"

#include "rows.h"

namespace hk {
namespace {

using namespace spline;

// Bits of `needs`, as in the op's autograd.py.
constexpr int64_t kNeedsX = 1, kNeedsParameters = 2, kNeedsOutput = 4, kNeedsLogAbsDet = 8;

// A spline as the parameters of an operator, and of these.
#define HK_SPLINE_PARAMETERS                                                                         \
  int64_t bins, int64_t tails, int64_t style, double left, double right, double bottom, double top,  \
      double min_width, double min_height, double min_derivative, double logit_scale, bool inverse
#define HK_SPLINE                                                                                    \
  {bins, tails, style, left, right, bottom, top, min_width, min_height, min_derivative, logit_scale, inverse}

// Rows are what a log-determinant is summed over. A call that does not fit is refused here in a few words; api.py then
// says which argument is at fault.
RowBlocks blocks_of(const Spline& spline, int64_t event_ndims, const Tensor& x, const Tensor& parameters) {
  const int64_t dim = x.dim();
  bool fits = dim >= 1 && parameters.dim() == dim + 1 && parameters.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < dim; ++i) fits = parameters.size(i) == x.size(i);
  fits = fits && spline.bins >= 2 && parameters.size(dim) == spline.parameters();
  STD_TORCH_CHECK(fits && event_ndims >= 0 && event_ndims <= dim,
                  "rational_quadratic_spline: shapes or dtypes do not fit");
  int64_t rows = 1, features = 1;
  for (int64_t i = 0; i < dim; ++i) (i < dim - event_ndims ? rows : features) *= x.size(i);
  return RowBlocks(1, rows, features);
}

// Parameters as rows of features, without a copy where their strides are those of such rows.
struct Parameters {
  Tensor tensor;
  Layout layout;

  explicit Parameters(const Tensor& given) : tensor(given) {
    if (!laid_out()) tensor = torch::stable::contiguous(given), laid_out();
  }

 private:
  bool laid_out() {
    const int64_t d = tensor.dim() - 2;  // of the features
    layout = {std::max<int64_t>(tensor.size(d), 1), 0, tensor.stride(d), tensor.stride(d + 1)};
    int64_t i = d - 1;
    while (i >= 0 && tensor.size(i) == 1) --i;
    layout.row_stride = i >= 0 ? tensor.stride(i) : layout.features * layout.feature_stride;
    int64_t expected = layout.row_stride;
    for (; i >= 0; --i) {
      if (tensor.size(i) == 1) continue;
      if (tensor.stride(i) != expected) return false;
      expected *= tensor.size(i);
    }
    return true;
  }
};

// A gradient of the parameters: (P, d) in memory where they are.
Tensor like_parameters(const Tensor& parameters, bool wanted) {
  if (!wanted) return empty_of({0}, parameters);
  const int64_t dim = parameters.dim();
  if (parameters.stride(dim - 2) >= parameters.stride(dim - 1)) return empty_for(parameters, true);
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i < dim; ++i) sizes[i] = parameters.size(i);
  std::swap(sizes[dim - 2], sizes[dim - 1]);
  return torch::stable::transpose(empty_of(sizes, dim, parameters), dim - 2, dim - 1);
}

// One cotangent an element from one a row.
template <class T>
void spread_rows(const T* rows_of, int64_t features, int64_t first, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = rows_of ? rows_of[(first + i) / features] : T(0);
}

// Runs f(first element, elements, scratch) over the pieces of a block.
template <class F>
void pieces_of(int64_t at, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kBlock) f(at + i, i, std::min(kBlock, n - i));
}

template <class T>
void forward(const Spline& spline, const RowBlocks& blocks, const Parameters& parameters, const Tensor& x,
             const Tensor& output, const Tensor& log_abs_det) {
  const T *ps = data<T>(parameters.tensor), *xs = data<T>(x);
  T *to = written<T>(output), *rows_to = written<T>(log_abs_det);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
        Scratch<T> scratch((spline.parameters() + 2 * spline.bins) * kBlock);
        alignas(64) T logs[kRowBlock];
        pieces_of(at, n * width, [&](int64_t first, int64_t i, int64_t count) {
          run(Forward<T>{.spline = spline, .first = first, .n = count, .layout = parameters.layout, .parameters = ps,
                         .x = xs + first, .scratch = scratch.data(), .output = to + first, .logs = logs + i});
        });
        add_rows(n, width, logs, sums);
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(rows_to, first, n, sums); });
}

template <class T>
void backward(const Spline& spline, const RowBlocks& blocks, const MaybeTensor& grad, const MaybeTensor& grad_log,
              const Parameters& parameters, const Tensor& x, const Tensor& d_x, const Tensor& d_parameters,
              const Layout& to) {
  const T *ps = data<T>(parameters.tensor), *xs = data<T>(x), *gs = data<T>(grad), *ls = data<T>(grad_log);
  T *dx = written<T>(d_x), *dp = written<T>(d_parameters);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double*) {
        Scratch<T> scratch((2 * spline.parameters() + 2 * spline.bins) * kBlock);
        const T zeros[kBlock] = {};
        alignas(64) T spread_log[kBlock];
        pieces_of(at, n * width, [&](int64_t first, int64_t, int64_t count) {
          spread_rows(ls, blocks.features, first, count, spread_log);
          run(Backward<T>{.spline = spline, .first = first, .n = count, .layout = parameters.layout, .to = to,
                          .grad = gs ? gs + first : zeros, .grad_log = spread_log, .parameters = ps, .x = xs + first,
                          .scratch = scratch.data(), .d_x = dx ? dx + first : nullptr, .d_parameters = dp});
        });
      },
      [](int64_t, int64_t, const double*) {});
}

template <class T>
void double_backward(const Spline& spline, const RowBlocks& blocks, const MaybeTensor& h_x,
                     const std::optional<Parameters>& h_parameters, const MaybeTensor& grad, const MaybeTensor& grad_log,
                     const Parameters& parameters, const Tensor& x, const Tensor* results, const Layout& to) {
  const T *ps = data<T>(parameters.tensor), *xs = data<T>(x), *gs = data<T>(grad), *ls = data<T>(grad_log);
  const T *hx = data<T>(h_x), *hp = h_parameters ? data<T>(h_parameters->tensor) : nullptr;
  const Layout direction_layout = h_parameters ? h_parameters->layout : Layout{};
  T *out = written<T>(results[0]), *rows_to = written<T>(results[1]);
  T *dx = written<T>(results[2]), *dp = written<T>(results[3]);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
        Scratch<T> scratch((3 * spline.parameters() + 2 * spline.bins) * kBlock);
        const T zeros[kBlock] = {};
        alignas(64) T spread_log[kBlock], logs[kRowBlock];
        pieces_of(at, n * width, [&](int64_t first, int64_t i, int64_t count) {
          spread_rows(ls, blocks.features, first, count, spread_log);
          run(DoubleBackward<T>{.spline = spline, .first = first, .n = count, .layout = parameters.layout,
                                .direction_layout = direction_layout, .to = to, .h_x = hx ? hx + first : zeros,
                                .h_parameters = hp, .grad = gs ? gs + first : zeros, .grad_log = spread_log,
                                .parameters = ps, .x = xs + first, .scratch = scratch.data(),
                                .output = out ? out + first : nullptr, .logs = logs + i,
                                .d_x = dx ? dx + first : nullptr, .d_parameters = dp});
        });
        add_rows(n, width, logs, sums);
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(rows_to, first, n, sums); });
}

// ---- The operators ----

std::tuple<Tensor, Tensor> rational_quadratic_spline(Tensor x, Tensor parameters, HK_SPLINE_PARAMETERS,
                                                     int64_t event_ndims) {
  const Spline spline HK_SPLINE;
  const RowBlocks blocks = blocks_of(spline, event_ndims, x, parameters);
  const Tensor output = empty_for(x, true), log_abs_det = empty_for(x, true, event_ndims);
  HK_DISPATCH("rational_quadratic_spline", x, forward, spline, blocks, Parameters(parameters), packed(x), output,
              log_abs_det);
  return {output, log_abs_det};
}

std::tuple<Tensor, Tensor> rational_quadratic_spline_backward(MaybeTensor grad_output, MaybeTensor grad_log_abs_det,
                                                              Tensor x, Tensor parameters, HK_SPLINE_PARAMETERS,
                                                              int64_t event_ndims, int64_t needs) {
  const Spline spline HK_SPLINE;
  const RowBlocks blocks = blocks_of(spline, event_ndims, x, parameters);
  const Tensor d_x = empty_for(x, needs & kNeedsX);
  const Tensor d_parameters = like_parameters(parameters, needs & kNeedsParameters);
  const Layout to = needs & kNeedsParameters ? Parameters(d_parameters).layout : Layout{};
  HK_DISPATCH("rational_quadratic_spline", x, backward, spline, blocks, packed(grad_output), packed(grad_log_abs_det),
              Parameters(parameters), packed(x), d_x, d_parameters, to);
  return {d_x, d_parameters};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_double_backward(
    MaybeTensor h_x, MaybeTensor h_parameters, MaybeTensor grad_output, MaybeTensor grad_log_abs_det, Tensor x,
    Tensor parameters, HK_SPLINE_PARAMETERS, int64_t event_ndims, int64_t needs) {
  const Spline spline HK_SPLINE;
  const RowBlocks blocks = blocks_of(spline, event_ndims, x, parameters);
  const Tensor results[4] = {
      empty_for(x, needs & kNeedsOutput),
      empty_for(x, needs & kNeedsLogAbsDet, event_ndims),
      empty_for(x, needs & kNeedsX),
      like_parameters(parameters, needs & kNeedsParameters),
  };
  const Layout to = needs & kNeedsParameters ? Parameters(results[3]).layout : Layout{};
  std::optional<Parameters> directions;
  if (h_parameters) directions.emplace(*h_parameters);
  HK_DISPATCH("rational_quadratic_spline", x, double_backward, spline, blocks, packed(h_x), directions,
              packed(grad_output), packed(grad_log_abs_det), Parameters(parameters), packed(x), results, to);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("rational_quadratic_spline.cpp", TORCH_BOX(&rational_quadratic_spline));
  m.impl("rational_quadratic_spline_backward.cpp", TORCH_BOX(&rational_quadratic_spline_backward));
  m.impl("rational_quadratic_spline_double_backward.cpp", TORCH_BOX(&rational_quadratic_spline_double_backward));
}

}  // namespace hk
