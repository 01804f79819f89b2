// annealed_leapfrog_update on the CPU: checks, allocation, parallel loops. The arithmetic is in
// kernels/annealed_leapfrog.h.
#include "../kernels/annealed_leapfrog.h"

#include "rows.h"

namespace hk {
namespace {

using namespace annealed;

constexpr int64_t kKicks = 5;

// A call that does not fit is refused here in a few words, and api.py then says which argument is at fault.
int64_t rows_of(const Tensor& rho, const Tensor& base_grad, const Tensor& grad, const Tensor& noise,
                const Tensor& kicks, const Tensor& mixing) {
  STD_TORCH_CHECK(rho.dim() >= 1, "annealed_leapfrog_update: dimensions");
  const int64_t last = rho.dim() - 1;
  bool fits = same_shape(base_grad, rho) && same_shape(grad, rho) && same_shape(noise, rho);
  fits = fits && kicks.dim() == 2 && kicks.size(0) == kKicks && kicks.size(1) == rho.size(last);
  fits = fits && mixing.dim() == 1 && mixing.size(0) == 2;
  for (const Tensor* t : {&base_grad, &grad, &noise, &kicks, &mixing})
    fits = fits && t->scalar_type() == rho.scalar_type();
  STD_TORCH_CHECK(fits, "annealed_leapfrog_update: shapes or dtypes do not fit");
  int64_t rows = 1;
  for (int64_t i = 0; i < last; ++i) rows *= rho.size(i);
  return rows;
}

// Each row of `kicks` as long as a row of the tile.
template <class T>
void spread_kicks(const Tiling& tiling, const Tensor& kicks, Buffer<T>& table) {
  for (int64_t i = 0; i < kKicks; ++i)
    tiling.spread(data<T>(kicks) + i * tiling.features, table.data() + i * tiling.width);
}

template <class T>
Coefficients<T> coefficients(const Tensor& mixing, const T* kicks, int64_t width) {
  const T* mix = data<T>(mixing);
  return {mix[0], mix[1], kicks, kicks + width, kicks + 2 * width, kicks + 3 * width, kicks + 4 * width};
}

// ---- In one dtype ----

template <class T>
void forward(int64_t rows, const Tensor& z, const Tensor& rho, const Tensor& base_grad, const Tensor& grad,
             const Tensor& noise, const Tensor& kicks, const Tensor& mixing, const Tensor& z_out,
             const Tensor& rho_out, const Tensor& weight) {
  const int64_t d = z.size(z.dim() - 1);
  const T *zs = data<T>(z), *rs = data<T>(rho), *bs = data<T>(base_grad), *gs = data<T>(grad), *ns = data<T>(noise);
  T *to_z = written<T>(z_out), *to_rho = written<T>(rho_out), *to_weight = written<T>(weight);
  if (d >= kLine<T>) {
    constexpr int64_t kGrain = 8192;
    const int64_t bytes = z.numel() * sizeof(T);
    const bool far = streams(2 * bytes, 5 * bytes);
    const Coefficients<T> c = coefficients<T>(mixing, data<T>(kicks), d);
    const auto aligned = [&](auto address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; };
    const bool past_caches = far && aligned(to_z) && aligned(to_rho) && aligned(d * sizeof(T));
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / d), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * d;
      run(LongForward<T>{.rows = end - begin, .width = d, .c = c, .z = zs + at, .rho = rs + at, .base_grad = bs + at,
                         .grad = gs + at, .noise = ns + at, .z_out = to_z + at, .rho_out = to_rho + at,
                         .weight = to_weight + begin, .far = far, .streams = past_caches});
    });
    return;
  }
  const RowBlocks blocks(1, rows, d);
  const Tiling tiling(1, rows, d);
  Buffer<T> table(kKicks * tiling.width);
  spread_kicks(tiling, kicks, table);
  const Coefficients<T> c = coefficients<T>(mixing, table.data(), tiling.width);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
        alignas(64) T terms[kRowBlock];
        run(Forward<T>{.rows = n, .width = width, .run = std::min(tiling.width, n * width), .c = c, .z = zs + at,
                       .rho = rs + at, .base_grad = bs + at, .grad = gs + at, .noise = ns + at, .z_out = to_z + at,
                       .rho_out = to_rho + at, .terms = terms, .sums = sums});
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(to_weight, first, n, sums); });
}

template <class T>
void backward(const Tiling& tiling, const MaybeTensor& grad_z, const MaybeTensor& grad_rho,
              const MaybeTensor& grad_weight, const Tensor& rho, const Tensor& base_grad, const Tensor& grad,
              const Tensor& noise, const Tensor& kicks, const Tensor& mixing, const Tensor* d_state,
              const Tensor* d_parameters) {
  const int64_t d = tiling.features, w = tiling.width;
  Buffer<T> table(kKicks * tiling.width);
  spread_kicks(tiling, kicks, table);
  const Coefficients<T> c = coefficients<T>(mixing, table.data(), w);
  const Rows<T> rows(tiling);
  const In<T> gz = rows.in(data<T>(grad_z)), gr = rows.in(data<T>(grad_rho)), rs = rows.in(data<T>(rho));
  const In<T> bs = rows.in(data<T>(base_grad)), gs = rows.in(data<T>(grad)), ns = rows.in(data<T>(noise));
  const T* gw = data<T>(grad_weight);
  T* to[4];
  for (int i = 0; i < 4; ++i) to[i] = written<T>(d_state[i]);
  Buffer<double> sums(kSums * d);
  reduce_rows<T>(tiling, kSums, 5, sums.data(),
                 [&](int64_t, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
                   run(Backward<T>{.first = first, .rows = n, .width = width, .features = d, .repeat = tiling.repeat,
                                   .c = c, .grad_z = gz, .grad_rho = gr, .rho = rs, .base_grad = bs, .grad = gs,
                                   .noise = ns, .grad_weight = gw, .spread_weight = scratch + 4 * w,
                                   .d_rho = rows.out(to[0], 0, scratch), .d_base_grad = rows.out(to[1], 0, scratch + w),
                                   .d_grad = rows.out(to[2], 0, scratch + 2 * w),
                                   .d_noise = rows.out(to[3], 0, scratch + 3 * w), .acc = acc, .sums = into});
                 });
  if (!d_parameters) return;
  T *d_kicks = written<T>(d_parameters[0]), *d_mixing = written<T>(d_parameters[1]);
  for (int64_t i = 0; i < kKicks * d; ++i) d_kicks[i] = static_cast<T>(sums[i]);
  for (int64_t k = 0; k < 2; ++k) {
    double total = 0;
    for (int64_t j = 0; j < d; ++j) total += sums[(kKicks + k) * d + j];
    d_mixing[k] = static_cast<T>(total);
  }
}

// ---- The operators ----

std::tuple<Tensor, Tensor, Tensor> annealed_leapfrog_update(Tensor z, Tensor rho, Tensor base_grad, Tensor grad,
                                                            Tensor noise, Tensor kicks, Tensor mixing) {
  const int64_t rows = rows_of(rho, base_grad, grad, noise, kicks, mixing);
  STD_TORCH_CHECK(same_shape(z, rho) && z.scalar_type() == rho.scalar_type(), "annealed_leapfrog_update: z");
  Tensor z_out = empty_for(z, true), rho_out = empty_for(rho, true), weight = empty_for(z, true, 1);
  HK_DISPATCH("annealed_leapfrog_update", z, forward, rows, packed(z), packed(rho), packed(base_grad), packed(grad),
              packed(noise), packed(kicks), packed(mixing), z_out, rho_out, weight);
  return {z_out, rho_out, weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> annealed_leapfrog_update_backward(
    MaybeTensor grad_z, MaybeTensor grad_rho, MaybeTensor grad_log_weight, Tensor rho, Tensor base_grad, Tensor grad,
    Tensor noise, Tensor kicks, Tensor mixing, int64_t needs) {
  const Tiling tiling(1, rows_of(rho, base_grad, grad, noise, kicks, mixing), rho.size(rho.dim() - 1));
  const bool state = needs & kNeedsState, parameters = needs & kNeedsParameters;
  const Tensor d_state[4] = {empty_for(rho, state), empty_for(rho, state), empty_for(rho, state), empty_for(rho, state)};
  const Tensor d_parameters[2] = {empty_for(kicks, parameters), empty_for(mixing, parameters)};
  HK_DISPATCH("annealed_leapfrog_update", rho, backward, tiling, packed(grad_z), packed(grad_rho),
              packed(grad_log_weight), packed(rho), packed(base_grad), packed(grad), packed(noise), packed(kicks),
              packed(mixing), d_state, parameters ? d_parameters : nullptr);
  return {d_state[0], d_state[1], d_state[2], d_state[3], d_parameters[0], d_parameters[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("annealed_leapfrog_update.cpp", TORCH_BOX(&annealed_leapfrog_update));
  m.impl("annealed_leapfrog_update_backward.cpp", TORCH_BOX(&annealed_leapfrog_update_backward));
}

}  // namespace hk
