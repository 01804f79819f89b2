// local_reparam_linear on the CPU: the products are BLAS's, what lies between them is in kernels/local_reparam_linear.h.
#include "../kernels/local_reparam_linear.h"

#include "rows.h"

namespace hk {
namespace {

using namespace local_reparam;

constexpr int64_t kGrain = 16384;  // elements that are worth another thread

// Kernel{n, inputs..., output} over all elements, in parallel.
template <class Kernel, class T, class... Inputs>
void pass(const Tensor& to, const Inputs&... inputs) {
  const auto pass_over = [&](T* out, auto... in) {
    torch::stable::parallel_for(0, to.numel(), kGrain, [&](int64_t begin, int64_t end) {
      run(Kernel{end - begin, in + begin..., out + begin});
    });
  };
  pass_over(written<T>(to), data<T>(inputs)...);
}

// ---- The passes between the products, in one dtype ----

template <class T>
void square(const Tensor& x, const Tensor& to) {
  pass<Square<T>, T>(to, x);
}

template <class T>
void variance(const Tensor& log_scale, const Tensor& to) {
  pass<Variance<T>, T>(to, log_scale);
}

template <class T>
void variance_grad(const Tensor& grad, const Tensor& noise, const Tensor& std, const Tensor& to) {
  pass<VarianceGrad<T>, T>(to, grad, noise, std);
}

template <class T>
void add_product(const Tensor& x, const Tensor& y, const Tensor& to) {
  pass<AddProduct<T>, T>(to, x, y);
}

template <class T>
void multiply(const Tensor& by, const Tensor& to) {
  pass<Multiply<T>, T>(to, by);
}

template <class T>
void sample(const MaybeTensor& bias_loc, const MaybeTensor& bias_log_scale, const Tensor& noise, const Tensor& std,
            const Tensor& y) {
  const int64_t units = y.size(1);
  Buffer<T> bias(units), bias_variance(units);
  if (bias_loc) std::copy_n(data<T>(bias_loc), units, bias.data());
  if (bias_log_scale) run(Variance<T>{units, data<T>(bias_log_scale), bias_variance.data()});
  const T* draws = data<T>(noise);
  T *deviations = written<T>(std), *samples = written<T>(y);
  torch::stable::parallel_for(0, y.size(0), 1 + kGrain / (1 + units), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * units; i < end * units; i += units)
      run(Sample<T>{units, bias.data(), bias_variance.data(), draws + i, deviations + i, samples + i});
  });
}

Tensor squared(const Tensor& x) {
  Tensor to = empty_for(x, true);
  HK_DISPATCH("local_reparam_linear", x, square, packed(x), to);
  return to;
}

Tensor variance_of(const Tensor& log_scale) {
  Tensor to = empty_for(log_scale, true);
  HK_DISPATCH("local_reparam_linear", log_scale, variance, packed(log_scale), to);
  return to;
}

// BLAS's product. Autocast would have made it a half-precision one.
Tensor product(const Tensor& a, const Tensor& b) {
  Tensor result = torch::stable::matmul(a, b);
  STD_TORCH_CHECK(result.scalar_type() == a.scalar_type(), "local_reparam_linear: autocast must be off here");
  return result;
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

void check(const Tensor& x, const Tensor& weight_loc, const Tensor& weight_log_scale, const Tensor& like_result) {
  bool fits = x.dim() == 2 && weight_loc.dim() == 2 && weight_loc.size(1) == x.size(1) &&
              same_shape(weight_loc, weight_log_scale) && like_result.dim() == 2 &&
              like_result.size(0) == x.size(0) && like_result.size(1) == weight_loc.size(0);
  for (const Tensor* t : {&weight_loc, &weight_log_scale, &like_result})
    fits = fits && t->scalar_type() == x.scalar_type();
  STD_TORCH_CHECK(fits, "local_reparam_linear: shapes or dtypes do not fit");
}

// ---- The operators ----

std::tuple<Tensor, Tensor> local_reparam_linear(Tensor x, Tensor weight_loc, Tensor weight_log_scale,
                                                MaybeTensor bias_loc, MaybeTensor bias_log_scale, Tensor noise) {
  check(x, weight_loc, weight_log_scale, noise);
  for (const MaybeTensor* t : {&bias_loc, &bias_log_scale})
    STD_TORCH_CHECK(!*t || ((*t)->dim() == 1 && (*t)->size(0) == noise.size(1) &&
                            (*t)->scalar_type() == x.scalar_type()),
                    "local_reparam_linear: biases do not fit");
  Tensor y = product(x, transposed(weight_loc));
  Tensor std = product(squared(x), transposed(variance_of(weight_log_scale)));
  HK_DISPATCH("local_reparam_linear", x, sample, packed(bias_loc), packed(bias_log_scale), packed(noise), std, y);
  return {y, std};
}

// Twice the variance's cotangent, and what comes of it and of `grad` for x and for weight_log_scale.
std::tuple<Tensor, Tensor, Tensor> local_reparam_linear_backward(Tensor grad, Tensor x, Tensor weight_loc,
                                                                 Tensor weight_log_scale, Tensor noise, Tensor std,
                                                                 bool needs_x, bool needs_log_scale) {
  check(x, weight_loc, weight_log_scale, grad);
  STD_TORCH_CHECK(same_shape(noise, grad) && same_shape(std, grad) && noise.scalar_type() == x.scalar_type() &&
                      std.scalar_type() == x.scalar_type(),
                  "local_reparam_linear: noise or std do not fit");
  Tensor twice = empty_for(grad, true), d_x = empty_of({0}, x), d_log_scale = empty_of({0}, x);
  HK_DISPATCH("local_reparam_linear", x, variance_grad, packed(grad), packed(noise), packed(std), twice);
  const Tensor variance = variance_of(weight_log_scale);
  if (needs_x) {
    d_x = product(grad, weight_loc);
    HK_DISPATCH("local_reparam_linear", x, add_product, packed(x), product(twice, variance), d_x);
  }
  if (needs_log_scale) {
    d_log_scale = product(transposed(twice), squared(x));
    HK_DISPATCH("local_reparam_linear", x, multiply, variance, d_log_scale);
  }
  return {twice, d_x, d_log_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("local_reparam_linear.cpp", TORCH_BOX(&local_reparam_linear));
  m.impl("local_reparam_linear_backward.cpp", TORCH_BOX(&local_reparam_linear_backward));
}

}  // namespace hk
