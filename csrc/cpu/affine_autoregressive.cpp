// affine_autoregressive on the CPU: checks, allocation, parallel loops. The arithmetic is in
// kernels/affine_autoregressive.h.
#include "../kernels/affine_autoregressive.h"

#include "rows.h"

namespace hk {
namespace {

using namespace autoregressive;

// Bits of `needs`, as in the op's autograd.py.
constexpr int64_t kNeedsZ = 1, kNeedsShift = 2, kNeedsLogScale = 4, kNeedsOutput = 8, kNeedsLogAbsDet = 16;

// A call that does not fit is refused here in a few words; api.py then says which argument is at fault.
RowBlocks blocks_of(const Chosen& chosen, const Tensor& z, const MaybeTensor& shift, const Tensor& log_scale) {
  bool fits = z.dim() >= 1 && same_shape(log_scale, z) && log_scale.scalar_type() == z.scalar_type();
  if (shift) fits = fits && same_shape(*shift, z) && shift->scalar_type() == z.scalar_type();
  STD_TORCH_CHECK(fits, "affine_autoregressive: shapes or dtypes do not fit");
  STD_TORCH_CHECK(chosen.gate >= 0 && chosen.gate < kGates, "affine_autoregressive: no such gate");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < z.dim(); ++i) rows *= z.size(i);
  return RowBlocks(1, rows, z.size(z.dim() - 1));
}

// Where absent inputs read zeros, and unwanted results go: as long as a block.
template <class T>
struct Spare {
  alignas(64) T zeros[kRowBlock] = {};

  const T* in(const T* data, int64_t at) const { return data ? data + at : zeros; }
};

template <class T>
T* out(T* data, int64_t at, T* scratch) {
  return data ? data + at : scratch;
}

// ---- In one dtype ----

template <class T>
void forward(const Chosen& chosen, const RowBlocks& blocks, const Tensor& z, const Tensor& shift, const Tensor& log_scale,
             const Tensor& output, const Tensor& log_abs_det) {
  const T *zs = data<T>(z), *bs = data<T>(shift), *ss = data<T>(log_scale);
  T *to = written<T>(output), *rows_to = written<T>(log_abs_det);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
        alignas(64) T logs[kRowBlock];
        run(Forward<T>{.chosen = chosen, .rows = n, .width = width, .z = zs + at, .shift = bs + at,
                       .log_scale = ss + at, .output = to + at, .logs = logs, .sums = sums});
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(rows_to, first, n, sums); });
}

template <class T>
void backward(const Chosen& chosen, const RowBlocks& blocks, const MaybeTensor& grad, const MaybeTensor& grad_log,
              const Tensor& z, const MaybeTensor& shift, const Tensor& log_scale, const Tensor* d_inputs) {
  const Spare<T> spare;
  const T *gs = data<T>(grad), *ls = data<T>(grad_log), *zs = data<T>(z), *bs = data<T>(shift);
  const T* ss = data<T>(log_scale);
  T *dz = written<T>(d_inputs[0]), *db = written<T>(d_inputs[1]), *ds = written<T>(d_inputs[2]);
  blocks.run(
      [&](int64_t at, int64_t first, int64_t n, int64_t width, double*) {
        alignas(64) T scratch[4][kRowBlock];
        run(Backward<T>{.chosen = chosen, .rows = n, .width = width, .given = gs != nullptr, .grad = spare.in(gs, at),
                        .grad_log = ls ? ls + first : nullptr, .spread_log = scratch[0], .z = zs + at,
                        .shift = spare.in(bs, at), .log_scale = ss + at, .d_z = out(dz, at, scratch[1]),
                        .d_shift = out(db, at, scratch[2]), .d_log_scale = out(ds, at, scratch[3])});
      },
      [](int64_t, int64_t, const double*) {});
}

template <class T>
void double_backward(const Chosen& chosen, const RowBlocks& blocks, const MaybeTensor* h, const MaybeTensor& grad,
                     const MaybeTensor& grad_log, const Tensor& z, const MaybeTensor& shift, const Tensor& log_scale,
                     const Tensor& gg_output, const Tensor& gg_log, const Tensor* d_inputs) {
  const Spare<T> spare;
  const T *hz = data<T>(h[0]), *hb = data<T>(h[1]), *hs = data<T>(h[2]), *gs = data<T>(grad), *ls = data<T>(grad_log);
  const T *zs = data<T>(z), *bs = data<T>(shift), *ss = data<T>(log_scale);
  T *gg = written<T>(gg_output), *gl = written<T>(gg_log);
  T *dz = written<T>(d_inputs[0]), *db = written<T>(d_inputs[1]), *ds = written<T>(d_inputs[2]);
  blocks.run(
      [&](int64_t at, int64_t first, int64_t n, int64_t width, double* sums) {
        alignas(64) T scratch[6][kRowBlock];
        run(DoubleBackward<T>{.chosen = chosen, .rows = n, .width = width, .h_z = spare.in(hz, at),
                              .h_shift = spare.in(hb, at), .h_log_scale = spare.in(hs, at), .grad = spare.in(gs, at),
                              .grad_log = ls ? ls + first : nullptr, .spread_log = scratch[0], .z = zs + at,
                              .shift = spare.in(bs, at), .log_scale = ss + at, .gg = out(gg, at, scratch[1]),
                              .logs = scratch[2], .sums = sums, .d_z = out(dz, at, scratch[3]),
                              .d_shift = out(db, at, scratch[4]), .d_log_scale = out(ds, at, scratch[5])});
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(gl, first, n, sums); });
}

// ---- The operators ----

std::tuple<Tensor, Tensor> affine_autoregressive(Tensor z, Tensor shift, Tensor log_scale, int64_t gate, double first,
                                                 double second) {
  const Chosen chosen{gate, first, second};
  const RowBlocks blocks = blocks_of(chosen, z, shift, log_scale);
  Tensor output = empty_for(z, true), log_abs_det = empty_for(z, true, 1);
  HK_DISPATCH("affine_autoregressive", z, forward, chosen, blocks, packed(z), packed(shift), packed(log_scale), output,
              log_abs_det);
  return {output, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor> affine_autoregressive_backward(MaybeTensor grad_output,
                                                                  MaybeTensor grad_log_abs_det, Tensor z,
                                                                  MaybeTensor shift, Tensor log_scale, int64_t gate,
                                                                  double first, double second, int64_t needs) {
  const Chosen chosen{gate, first, second};
  const RowBlocks blocks = blocks_of(chosen, z, shift, log_scale);
  const Tensor d_inputs[3] = {empty_for(z, needs & kNeedsZ), empty_for(z, needs & kNeedsShift),
                              empty_for(z, needs & kNeedsLogScale)};
  HK_DISPATCH("affine_autoregressive", z, backward, chosen, blocks, packed(grad_output), packed(grad_log_abs_det),
              packed(z), packed(shift), packed(log_scale), d_inputs);
  return {d_inputs[0], d_inputs[1], d_inputs[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> affine_autoregressive_double_backward(
    MaybeTensor h_z, MaybeTensor h_shift, MaybeTensor h_log_scale, MaybeTensor grad_output,
    MaybeTensor grad_log_abs_det, Tensor z, MaybeTensor shift, Tensor log_scale, int64_t gate, double first,
    double second, int64_t needs) {
  const Chosen chosen{gate, first, second};
  const RowBlocks blocks = blocks_of(chosen, z, shift, log_scale);
  const MaybeTensor h[3] = {packed(h_z), packed(h_shift), packed(h_log_scale)};
  const Tensor gg_output = empty_for(z, needs & kNeedsOutput), gg_log = empty_for(z, needs & kNeedsLogAbsDet, 1);
  const Tensor d_inputs[3] = {empty_for(z, needs & kNeedsZ), empty_for(z, needs & kNeedsShift),
                              empty_for(z, needs & kNeedsLogScale)};
  HK_DISPATCH("affine_autoregressive", z, double_backward, chosen, blocks, h, packed(grad_output),
              packed(grad_log_abs_det), packed(z), packed(shift), packed(log_scale), gg_output, gg_log, d_inputs);
  return {gg_output, gg_log, d_inputs[0], d_inputs[1], d_inputs[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("affine_autoregressive.cpp", TORCH_BOX(&affine_autoregressive));
  m.impl("affine_autoregressive_backward.cpp", TORCH_BOX(&affine_autoregressive_backward));
  m.impl("affine_autoregressive_double_backward.cpp", TORCH_BOX(&affine_autoregressive_double_backward));
}

}  // namespace hk
