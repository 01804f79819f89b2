// affine_autoregressive on the CPU: checks, allocation, parallel loops. The arithmetic is in
// kernels/affine_autoregressive.h.
#include "../kernels/affine_autoregressive.h"

#include "rows.h"

namespace hk {
namespace {

using namespace autoregressive;

// Bits of `needs`, as in the room's autograd.py.
constexpr int64_t kNeedsZ = 1, kNeedsShift = 2, kNeedsLogScale = 4, kNeedsOutput = 8, kNeedsLogAbsDet = 16;

// The gate's code and numbers, still in double.
struct Chosen {
  int64_t gate;
  double first, second;
};

// ---- Instruction-set clones of the kernels: thin, not templates; the lambdas are inlined ----

#define HK_IN(...) [&](const auto& gate) __attribute__((always_inline)) { __VA_ARGS__; }

#define HK_AUTOREGRESSIVE_CLONES(T)                                                                                   \
  HK_CLONES void forward_clone(const Chosen& c, int64_t rows, int64_t width, const T* z, const T* shift,              \
                               const T* log_scale, T* output, T* logs, double* sums) {                                \
    with_gate(c.gate, T(c.first), T(c.second),                                                                        \
              HK_IN(forward_block(gate, rows * width, z, shift, log_scale, output, logs)));                           \
    add_rows(rows, width, logs, sums);                                                                                \
  }                                                                                                                   \
  HK_CLONES void backward_clone(const Chosen& c, int64_t rows, int64_t width, const T* grad, const T* grad_log,       \
                                T* spread_log, const T* z, const T* shift, const T* log_scale, T* d_z, T* d_shift,    \
                                T* d_log_scale) {                                                                     \
    spread(rows, width, grad_log, spread_log);                                                                        \
    with_gate(c.gate, T(c.first), T(c.second),                                                                        \
              HK_IN(backward_block(gate, rows * width, grad, spread_log, z, shift, log_scale, d_z, d_shift,           \
                                   d_log_scale)));                                                                    \
  }                                                                                                                   \
  HK_CLONES void double_backward_clone(const Chosen& c, int64_t rows, int64_t width, const T* h_z, const T* h_shift,  \
                                       const T* h_log_scale, const T* grad, const T* grad_log, T* spread_log,         \
                                       const T* z, const T* shift, const T* log_scale, T* gg, T* logs, double* sums,  \
                                       T* d_z, T* d_shift, T* d_log_scale) {                                          \
    spread(rows, width, grad_log, spread_log);                                                                        \
    with_gate(c.gate, T(c.first), T(c.second),                                                                        \
              HK_IN(double_backward_block(gate, rows * width, h_z, h_shift, h_log_scale, grad, spread_log, z, shift,  \
                                          log_scale, gg, logs, d_z, d_shift, d_log_scale)));                          \
    add_rows(rows, width, logs, sums);                                                                                \
  }

HK_AUTOREGRESSIVE_CLONES(float)
HK_AUTOREGRESSIVE_CLONES(double)

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

// ---- The three operators, in one dtype ----

template <class T>
void forward(const Chosen& chosen, const RowBlocks& blocks, const Tensor& z, const Tensor& shift, const Tensor& log_scale,
             const Tensor& output, const Tensor& log_abs_det) {
  const T *zs = data<T>(z), *bs = data<T>(shift), *ss = data<T>(log_scale);
  T *to = written<T>(output), *rows_to = written<T>(log_abs_det);
  blocks.run(
      [&](int64_t at, int64_t, int64_t n, int64_t width, double* sums) {
        alignas(64) T logs[kRowBlock];
        forward_clone(chosen, n, width, zs + at, bs + at, ss + at, to + at, logs, sums);
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
        backward_clone(chosen, n, width, spare.in(gs, at), ls ? ls + first : nullptr, scratch[0], zs + at,
                       spare.in(bs, at), ss + at, out(dz, at, scratch[1]), out(db, at, scratch[2]),
                       out(ds, at, scratch[3]));
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
        double_backward_clone(chosen, n, width, spare.in(hz, at), spare.in(hb, at), spare.in(hs, at), spare.in(gs, at),
                              ls ? ls + first : nullptr, scratch[0], zs + at, spare.in(bs, at), ss + at,
                              out(gg, at, scratch[1]), scratch[2], sums, out(dz, at, scratch[3]),
                              out(db, at, scratch[4]), out(ds, at, scratch[5]));
      },
      [&](int64_t first, int64_t n, const double* sums) { store_rows(gl, first, n, sums); });
}

}  // namespace

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

}  // namespace hk
