// leapfrog_update on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/leapfrog_update.h.
#include "../kernels/leapfrog_update.h"

#include "rows.h"

namespace hk {
namespace {

using namespace update;

// The call's tiles. A call that does not fit is refused here in a few words, and api.py then says which argument is at
// fault.
Tiling tiling_of(const Tensor& rho, const Tensor& grad, const Tensor& decay, const Tensor& kick, const Tensor& drift) {
  STD_TORCH_CHECK(rho.dim() >= 1, "leapfrog_update: dimensions");
  const int64_t last = rho.dim() - 1, d = rho.size(last);
  bool fits = same_shape(grad, rho) && decay.dim() == 0 && kick.dim() == 1 && kick.size(0) == d;
  fits = fits && same_shape(drift, kick);
  for (const Tensor* t : {&grad, &decay, &kick, &drift}) fits = fits && t->scalar_type() == rho.scalar_type();
  STD_TORCH_CHECK(fits, "leapfrog_update: shapes or dtypes do not fit");
  int64_t rows = 1;
  for (int64_t i = 0; i < last; ++i) rows *= rho.size(i);
  return Tiling(1, rows, d);
}

// Coefficients tiled to the row width; absent ones are zero.
template <class T>
class Tiled {
 public:
  Tiled(const Tiling& tiling, const MaybeTensor& decay, const MaybeTensor& kick, const MaybeTensor& drift)
      : width_(tiling.width), decay_(decay ? *data<T>(decay) : T(0)), rows_(2 * width_) {
    if (kick) tiling.spread(data<T>(kick), rows_.data());
    if (drift) tiling.spread(data<T>(drift), rows_.data() + width_);
  }

  Coefficients<T> get() const { return {decay_, rows_.data(), rows_.data() + width_}; }

 private:
  int64_t width_;
  T decay_;
  Buffer<T> rows_;
};

// Turns the column sums into d_decay, d_kick, d_drift.
template <class T>
void store_parameters(const Tiling& tiling, const Buffer<double>& sums, const Tensor* d_parameters) {
  const int64_t d = tiling.features;
  T *kick = written<T>(d_parameters[1]), *drift = written<T>(d_parameters[2]);
  double decay = 0;
  for (int64_t j = 0; j < d; ++j) decay += sums[j];
  *written<T>(d_parameters[0]) = static_cast<T>(decay);
  for (int64_t j = 0; j < d; ++j) kick[j] = static_cast<T>(-sums[d + j]), drift[j] = static_cast<T>(sums[2 * d + j]);
}

// ---- In one dtype ----

template <class T>
void forward(const Tiling& tiling, const Tensor& z, const Tensor& rho, const Tensor& grad, const Tensor& decay,
             const Tensor& kick, const Tensor& drift, const Tensor& z_out, const Tensor& rho_out) {
  if (z.numel() == 0) return;
  const Tiled<T> tiled(tiling, decay, kick, drift);
  const Coefficients<T> c = tiled.get();
  const T *z_in = data<T>(z), *rho_in = data<T>(rho), *grad_in = data<T>(grad);
  T *z_to = written<T>(z_out), *rho_to = written<T>(rho_out);
  const int64_t bytes = z.numel() * sizeof(T);
  const bool past_caches = streams(2 * bytes, 3 * bytes);
  torch::stable::parallel_for(0, tiling.chunks, tiling.grain(), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(past_caches ? 2 * tiling.width : 0);
    for (int64_t item = begin; item < end; ++item)
      tiling.rows_of(item, [&](int64_t first, int64_t n, int64_t width) {
        const int64_t at = first * tiling.width;
        run(Forward<T>{.rows = n, .width = width, .c = c, .z = z_in + at, .rho = rho_in + at, .grad = grad_in + at,
                       .z_out = z_to + at, .rho_out = rho_to + at,
                       .scratch = past_caches ? scratch.data() : nullptr});
      });
  });
}

template <class T>
void backward(const Tiling& tiling, const MaybeTensor& grad_z, const MaybeTensor& grad_rho, const Tensor& rho,
              const Tensor& grad, const Tensor& decay, const Tensor& kick, const Tensor& drift, const Tensor* d_state,
              const Tensor* d_parameters) {
  const Tiled<T> tiled(tiling, decay, kick, drift);
  const Coefficients<T> c = tiled.get();
  const Rows<T> rows(tiling);
  const In<T> gz = rows.in(data<T>(grad_z)), gr = rows.in(data<T>(grad_rho));
  const In<T> rs = rows.in(data<T>(rho)), gs = rows.in(data<T>(grad));
  T *dr = written<T>(d_state[0]), *dg = written<T>(d_state[1]);
  Buffer<double> sums(kSums * tiling.features);
  reduce_rows<T>(tiling, kSums, 2, sums.data(),
                 [&](int64_t, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
                   run(Backward<T>{.first = first, .rows = n, .width = width, .c = c, .grad_z = gz, .grad_rho = gr,
                                   .rho = rs, .grad = gs, .d_rho = rows.out(dr, 0, scratch),
                                   .d_grad = rows.out(dg, 0, scratch + tiling.width), .acc = acc, .sums = into});
                 });
  if (d_parameters) store_parameters<T>(tiling, sums, d_parameters);
}

template <class T>
void double_backward(const Tiling& tiling, const MaybeTensor* h, const MaybeTensor& grad_z, const MaybeTensor& grad_rho,
                     const Tensor& rho, const Tensor& grad, const Tensor& decay, const Tensor& kick,
                     const Tensor& drift, const Tensor* d_outputs, const Tensor* d_state, const Tensor* d_parameters) {
  const Tiled<T> tiled(tiling, decay, kick, drift), tangents(tiling, h[2], h[3], h[4]);
  const Coefficients<T> c = tiled.get(), t = tangents.get();
  const Rows<T> rows(tiling);
  const In<T> hr = rows.in(data<T>(h[0])), hg = rows.in(data<T>(h[1]));
  const In<T> gz = rows.in(data<T>(grad_z)), gr = rows.in(data<T>(grad_rho));
  const In<T> rs = rows.in(data<T>(rho)), gs = rows.in(data<T>(grad));
  T *ggz = written<T>(d_outputs[0]), *ggr = written<T>(d_outputs[1]);
  T *dr = written<T>(d_state[0]), *dg = written<T>(d_state[1]);
  Buffer<double> sums(kSums * tiling.features);
  reduce_rows<T>(tiling, kSums, 4, sums.data(),
                 [&](int64_t, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
                   run(DoubleBackward<T>{.first = first, .rows = n, .width = width, .c = c, .h = t, .h_rho = hr,
                                         .h_grad = hg, .grad_z = gz, .grad_rho = gr, .rho = rs, .grad = gs,
                                         .gg_z = rows.out(ggz, 0, scratch),
                                         .gg_rho = rows.out(ggr, 0, scratch + tiling.width),
                                         .d_rho = rows.out(dr, 0, scratch + 2 * tiling.width),
                                         .d_grad = rows.out(dg, 0, scratch + 3 * tiling.width), .acc = acc,
                                         .sums = into});
                 });
  if (d_parameters) store_parameters<T>(tiling, sums, d_parameters);
}

// ---- The operators ----

std::tuple<Tensor, Tensor> leapfrog_update(Tensor z, Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift) {
  const Tiling tiling = tiling_of(rho, grad, decay, kick, drift);
  STD_TORCH_CHECK(same_shape(z, rho) && z.scalar_type() == rho.scalar_type(), "leapfrog_update: z does not fit");
  Tensor z_out = empty_for(z, true), rho_out = empty_for(rho, true);
  HK_DISPATCH("leapfrog_update", z, forward, tiling, packed(z), packed(rho), packed(grad), decay, packed(kick),
              packed(drift), z_out, rho_out);
  return {z_out, rho_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> leapfrog_update_backward(MaybeTensor grad_z, MaybeTensor grad_rho,
                                                                            Tensor rho, Tensor grad, Tensor decay,
                                                                            Tensor kick, Tensor drift, int64_t needs) {
  const Tiling tiling = tiling_of(rho, grad, decay, kick, drift);
  const bool state = needs & kNeedsState, parameters = needs & kNeedsParameters;
  const Tensor d_state[2] = {empty_for(rho, state), empty_for(grad, state)};
  const Tensor d_parameters[3] = {empty_for(decay, parameters), empty_for(kick, parameters),
                                  empty_for(drift, parameters)};
  HK_DISPATCH("leapfrog_update", rho, backward, tiling, packed(grad_z), packed(grad_rho), packed(rho), packed(grad),
              decay, packed(kick), packed(drift), d_state, parameters ? d_parameters : nullptr);
  return {d_state[0], d_state[1], d_parameters[0], d_parameters[1], d_parameters[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> leapfrog_update_double_backward(
    MaybeTensor h_rho, MaybeTensor h_grad, MaybeTensor h_decay, MaybeTensor h_kick, MaybeTensor h_drift,
    MaybeTensor grad_z, MaybeTensor grad_rho, Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift,
    int64_t needs) {
  const Tiling tiling = tiling_of(rho, grad, decay, kick, drift);
  const bool outputs = needs & kNeedsOutputs, state = needs & kNeedsState, parameters = needs & kNeedsParameters;
  const MaybeTensor h[5] = {packed(h_rho), packed(h_grad), h_decay, packed(h_kick), packed(h_drift)};
  const Tensor d_outputs[2] = {empty_for(rho, outputs), empty_for(rho, outputs)};
  const Tensor d_state[2] = {empty_for(rho, state), empty_for(grad, state)};
  const Tensor d_parameters[3] = {empty_for(decay, parameters), empty_for(kick, parameters),
                                  empty_for(drift, parameters)};
  HK_DISPATCH("leapfrog_update", rho, double_backward, tiling, h, packed(grad_z), packed(grad_rho), packed(rho),
              packed(grad), decay, packed(kick), packed(drift), d_outputs, d_state,
              parameters ? d_parameters : nullptr);
  return {d_outputs[0], d_outputs[1], d_state[0], d_state[1], d_parameters[0], d_parameters[1], d_parameters[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("leapfrog_update.cpp", TORCH_BOX(&leapfrog_update));
  m.impl("leapfrog_update_backward.cpp", TORCH_BOX(&leapfrog_update_backward));
  m.impl("leapfrog_update_double_backward.cpp", TORCH_BOX(&leapfrog_update_double_backward));
}

}  // namespace hk
