// gaussian_leapfrog on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/gaussian_leapfrog.h.
#include "../kernels/gaussian_leapfrog.h"

#include <cmath>

#include "rows.h"

namespace hk {
namespace {

using namespace leapfrog;

// ---- Instruction-set clones of the kernels: thin, not templates ----

#define HK_LEAPFROG_CLONES(T)                                                                                         \
  HK_CLONES void forward_clone(int64_t rows, int64_t width, const Map<T>& m, const T* z, const T* rho, T* z_out,       \
                               T* rho_out) {                                                                           \
    forward_rows<T>(rows, width, m, z, rho, z_out, rho_out);                                                           \
  }                                                                                                                    \
  HK_CLONES void backward_clone(int64_t first, int64_t rows, int64_t width, const Map<T>& m, In<T> grad_z,             \
                                In<T> grad_rho, In<T> z, In<T> rho, Out<T> d_z, Out<T> d_rho, T* acc, double* sums) {  \
    backward_rows<T>(first, rows, width, m, grad_z, grad_rho, z, rho, d_z, d_rho, acc, sums);                          \
  }                                                                                                                    \
  HK_CLONES void double_backward_clone(int64_t first, int64_t rows, int64_t width, const Map<T>& m, const Map<T>& t,   \
                                       const T* h_loc, In<T> h_z, In<T> h_rho, In<T> grad_z, In<T> grad_rho, In<T> z,  \
                                       In<T> rho, Out<T> gg_z, Out<T> gg_rho, Out<T> d_z, Out<T> d_rho, T* acc,        \
                                       double* sums) {                                                                 \
    double_backward_rows<T>(first, rows, width, m, t, h_loc, h_z, h_rho, grad_z, grad_rho, z, rho, gg_z, gg_rho, d_z,  \
                            d_rho, acc, sums);                                                                         \
  }                                                                                                                    \
  HK_CLONES void compose_clone(const Shape& shape, const Parameters<T>& in, double* value, double* tangent) {          \
    if (tangent) compose<Dual>(shape, in, value, tangent);                                                             \
    else compose<double>(shape, in, value, tangent);                                                                   \
  }                                                                                                                    \
  HK_CLONES void chain_backward_clone(const Shape& shape, const Parameters<T>& in, const double* cotangent,            \
                                      double* d_precision, double* d_step, double* d_tempering) {                      \
    chain_backward<double>(shape, in, cotangent, nullptr, d_precision, d_step, d_tempering);                           \
  }                                                                                                                    \
  HK_CLONES void chain_double_backward_clone(const Shape& shape, const Parameters<T>& in, const double* cotangent,     \
                                             const double* cotangent_tangent, double* d_precision, double* d_step,     \
                                             double* d_tempering) {                                                    \
    chain_backward<Dual>(shape, in, cotangent, cotangent_tangent, d_precision, d_step, d_tempering);                   \
  }

HK_LEAPFROG_CLONES(float)
HK_LEAPFROG_CLONES(double)

// The call's sizes; the forms are told in ops/leapfrog/_layout.py. A call that fits none is refused here in a few words,
// and api.py then says which argument is at fault.
struct Problem {
  int64_t replicas, rows = 1;
  Shape shape;
  int64_t step_size_numel;  // of one replica

  Problem(const Tensor& z, const Tensor& rho, const Tensor& precision, const Tensor& loc, const Tensor& step_size,
          const Tensor& tempering) {
    const int64_t dim = z.dim(), replicated = tempering.dim() == 2;
    STD_TORCH_CHECK(dim >= 1 && (replicated ? dim == 3 : tempering.dim() == 1), "gaussian_leapfrog: dimensions");
    const int64_t d = z.size(dim - 1), K = tempering.size(replicated);
    replicas = replicated ? z.size(0) : 1;
    bool fits = same_shape(rho, z) && (!replicated || tempering.size(0) == replicas);
    for (int64_t i = replicated; i < dim - 1; ++i) rows *= z.size(i);
    fits = fits && is_row(precision, replicated, d) && is_row(loc, replicated, d);
    const int64_t step_dim = step_size.dim() - replicated;
    const int64_t step_rows = step_dim == 2 ? step_size.size(replicated) : 1;
    const bool shared = replicated ? step_rows == 1 : step_dim < 2;
    fits = fits && (step_dim == 0 ? !replicated : step_dim <= 2 && step_size.size(step_size.dim() - 1) == d);
    fits = fits && (!replicated || (step_dim == 2 && step_size.size(0) == replicas)) && (shared || step_rows == K);
    const ScalarType dtype = z.scalar_type();
    for (const Tensor* t : {&rho, &precision, &loc, &step_size, &tempering}) fits = fits && t->scalar_type() == dtype;
    STD_TORCH_CHECK(fits, "gaussian_leapfrog: shapes or dtypes do not fit");
    step_size_numel = step_dim == 0 ? 1 : step_rows * d;
    shape = {d, K, shared ? 0 : d, step_dim == 0 ? 0 : 1};
  }

 private:
  // (d,), or (replicas, 1, d).
  bool is_row(const Tensor& t, bool replicated, int64_t d) const {
    if (!replicated) return t.dim() == 1 && t.size(0) == d;
    return t.dim() == 3 && t.size(0) == replicas && t.size(1) == 1 && t.size(2) == d;
  }
};

template <class T>
void check_finite(const Tensor& t, const char* name) {
  const T* values = static_cast<const T*>(t.const_data_ptr());
  bool finite = true;
  for (int64_t i = 0, n = t.numel(); i < n; ++i) finite &= std::abs(values[i]) <= std::numeric_limits<T>::max();
  STD_TORCH_CHECK(finite, "gaussian_leapfrog: ", name, " must be finite");
}

// The composed maps of all replicas in the batch's dtype, tiled to the row width: A, B, C, D, loc.
template <class T>
class Maps {
 public:
  Maps(const Problem& p, const Tiling& tiling, const T* precision, const T* step, const T* tempering, const T* loc)
      : Maps(p, tiling, Parameters<T>{precision, step, tempering}, loc, false) {}

  Maps(const Problem& p, const Tiling& tiling, Parameters<T> in, const T* loc, bool duals)
      : width_(tiling.width), values_(p.replicas * 5 * width_), tangents_(duals ? p.replicas * 5 * width_ : 0) {
    const int64_t d = p.shape.features;
    Buffer<double> value(4 * d), tangent(duals ? 4 * d : 0);
    for (int64_t r = 0; r < p.replicas; ++r) {
      compose_clone(p.shape, in, value.data(), duals ? tangent.data() : nullptr);
      spread(values_.data() + r * 5 * width_, value, d, tiling.repeat);
      if (duals) spread(tangents_.data() + r * 5 * width_, tangent, d, tiling.repeat);
      tiling.spread(loc + r * d, values_.data() + (r * 5 + 4) * width_);
      advance(in, p);
    }
  }

  Map<T> map(int64_t replica) const { return at(values_, replica); }
  Map<T> tangent(int64_t replica) const { return at(tangents_, replica); }

  static void advance(Parameters<T>& in, const Problem& p) {
    in.precision += p.shape.features;
    in.step += p.step_size_numel;
    in.tempering += p.shape.n_steps;
    if (in.h_precision) in.h_precision += p.shape.features;
    if (in.h_step) in.h_step += p.step_size_numel;
    if (in.h_tempering) in.h_tempering += p.shape.n_steps;
  }

 private:
  void spread(T* to, const Buffer<double>& from, int64_t d, int64_t repeat) const {
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t r = 0; r < repeat; ++r)
        for (int64_t j = 0; j < d; ++j) to[i * width_ + r * d + j] = static_cast<T>(from[i * d + j]);
  }

  Map<T> at(const Buffer<T>& all, int64_t replica) const {
    const T* p = all.data() + replica * 5 * width_;
    return {p, p + width_, p + 2 * width_, p + 3 * width_, p + 4 * width_};
  }

  int64_t width_;
  Buffer<T> values_, tangents_;
};

struct ParameterGradients {
  Buffer<double> precision, step, tempering;
  explicit ParameterGradients(const Problem& p)
      : precision(p.shape.features), step(p.step_size_numel), tempering(p.shape.n_steps) {}
};

// ---- The three operators, in one dtype ----

template <class T>
void forward(const Problem& p, const Tensor& z, const Tensor& rho, const Tensor& precision, const Tensor& loc,
             const Tensor& step_size, const Tensor& tempering, const Tensor& z_out, const Tensor& rho_out) {
  check_finite<T>(step_size, "step_size");
  check_finite<T>(tempering, "tempering");
  if (z.numel() == 0) return;
  const Tiling tiling(p.replicas, p.rows, p.shape.features);
  const Maps<T> maps(p, tiling, data<T>(precision), data<T>(step_size), data<T>(tempering), data<T>(loc));
  const T *z_in = data<T>(z), *rho_in = data<T>(rho);
  T *z_to = written<T>(z_out), *rho_to = written<T>(rho_out);
  torch::stable::parallel_for(0, p.replicas * tiling.chunks, tiling.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t replica = item / tiling.chunks, offset = replica * p.rows * p.shape.features;
      tiling.rows_of(item % tiling.chunks, [&](int64_t first, int64_t n, int64_t width) {
        const int64_t at = offset + first * tiling.width;
        forward_clone(n, width, maps.map(replica), z_in + at, rho_in + at, z_to + at, rho_to + at);
      });
    }
  });
}

template <class T>
void backward(const Problem& p, const MaybeTensor& grad_z, const MaybeTensor& grad_rho, const Tensor& z,
              const Tensor& rho, const Tensor& precision, const Tensor& loc, const Tensor& step_size,
              const Tensor& tempering, const Tensor* d_state, const Tensor* d_parameters) {
  check_finite<T>(step_size, "step_size");
  check_finite<T>(tempering, "tempering");
  const int64_t d = p.shape.features;
  const Tiling tiling(p.replicas, p.rows, d);
  Parameters<T> in{data<T>(precision), data<T>(step_size), data<T>(tempering)};
  const Maps<T> maps(p, tiling, in, data<T>(loc), false);
  const Rows<T> rows(tiling);
  const T *gz = data<T>(grad_z), *gr = data<T>(grad_rho), *zs = data<T>(z), *rs = data<T>(rho);
  T *dz = written<T>(d_state[0]), *dr = written<T>(d_state[1]);
  Buffer<double> sums(p.replicas * kSums * d);
  reduce_rows<T>(
      tiling, kSums, 2, sums.data(),
      [&](int64_t r, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
        backward_clone(first, n, width, maps.map(r), rows.in(gz, r), rows.in(gr, r), rows.in(zs, r), rows.in(rs, r),
                       rows.out(dz, r, scratch), rows.out(dr, r, scratch + tiling.width), acc, into);
      });
  if (!d_parameters) return;
  Buffer<double> map(4 * d), d_loc(d);
  for (int64_t r = 0; r < p.replicas; ++r) {
    ParameterGradients gradients(p);
    const double* s = sums.data() + r * kSums * d;
    compose_clone(p.shape, in, map.data(), nullptr);
    for (int64_t j = 0; j < d; ++j) d_loc[j] = (1 - map[j]) * s[4 * d + j] - map[2 * d + j] * s[5 * d + j];
    chain_backward_clone(p.shape, in, s, gradients.precision.data(), gradients.step.data(), gradients.tempering.data());
    store(written<T>(d_parameters[0]), gradients.precision, r);
    store(written<T>(d_parameters[1]), d_loc, r);
    store(written<T>(d_parameters[2]), gradients.step, r);
    store(written<T>(d_parameters[3]), gradients.tempering, r);
    Maps<T>::advance(in, p);
  }
}

template <class T>
void double_backward(const Problem& p, const MaybeTensor* h, const MaybeTensor& grad_z, const MaybeTensor& grad_rho,
                     const Tensor& z, const Tensor& rho, const Tensor& precision, const Tensor& loc,
                     const Tensor& step_size, const Tensor& tempering, const Tensor* d_outputs, const Tensor* d_state,
                     const Tensor* d_parameters) {
  const int64_t d = p.shape.features;
  const Tiling tiling(p.replicas, p.rows, d);
  Parameters<T> in{data<T>(precision), data<T>(step_size), data<T>(tempering),
                   data<T>(h[2]),      data<T>(h[4]),      data<T>(h[5])};
  const Maps<T> maps(p, tiling, in, data<T>(loc), true);
  const Rows<T> rows(tiling);
  Buffer<T> h_loc(p.replicas * tiling.width);
  if (const T* given = data<T>(h[3]))
    for (int64_t r = 0; r < p.replicas; ++r) tiling.spread(given + r * d, h_loc.data() + r * tiling.width);
  const T *hz = data<T>(h[0]), *hr = data<T>(h[1]), *gz = data<T>(grad_z), *gr = data<T>(grad_rho);
  const T *zs = data<T>(z), *rs = data<T>(rho);
  T *ggz = written<T>(d_outputs[0]), *ggr = written<T>(d_outputs[1]);
  T *dz = written<T>(d_state[0]), *dr = written<T>(d_state[1]);
  Buffer<double> sums(p.replicas * kDoubleSums * d);
  reduce_rows<T>(
      tiling, kDoubleSums, 4, sums.data(),
      [&](int64_t r, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
        double_backward_clone(first, n, width, maps.map(r), maps.tangent(r), h_loc.data() + r * tiling.width,
                              rows.in(hz, r), rows.in(hr, r), rows.in(gz, r), rows.in(gr, r), rows.in(zs, r),
                              rows.in(rs, r), rows.out(ggz, r, scratch), rows.out(ggr, r, scratch + tiling.width),
                              rows.out(dz, r, scratch + 2 * tiling.width), rows.out(dr, r, scratch + 3 * tiling.width),
                              acc, into);
      });
  if (!d_parameters) return;
  Buffer<double> map(4 * d), tangent(4 * d), d_loc(d);
  for (int64_t r = 0; r < p.replicas; ++r) {
    ParameterGradients gradients(p);
    const double* s = sums.data() + r * kDoubleSums * d;
    compose_clone(p.shape, in, map.data(), tangent.data());
    for (int64_t j = 0; j < d; ++j) d_loc[j] = -(tangent[j] * s[4 * d + j] + tangent[2 * d + j] * s[5 * d + j]);
    chain_double_backward_clone(p.shape, in, s, s + 6 * d, gradients.precision.data(), gradients.step.data(),
                                gradients.tempering.data());
    store(written<T>(d_parameters[0]), gradients.precision, r);
    store(written<T>(d_parameters[1]), d_loc, r);
    store(written<T>(d_parameters[2]), gradients.step, r);
    store(written<T>(d_parameters[3]), gradients.tempering, r);
    Maps<T>::advance(in, p);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> gaussian_leapfrog(Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size,
                                             Tensor tempering) {
  const Problem p(z, rho, precision, loc, step_size, tempering);
  Tensor z_out = empty_for(z, true), rho_out = empty_for(rho, true);
  HK_DISPATCH("gaussian_leapfrog", z, forward, p, packed(z), packed(rho), packed(precision), packed(loc),
              packed(step_size), packed(tempering), z_out, rho_out);
  return {z_out, rho_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_leapfrog_backward(
    MaybeTensor grad_z, MaybeTensor grad_rho, Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size,
    Tensor tempering, int64_t needs) {
  const Problem p(z, rho, precision, loc, step_size, tempering);
  for (const MaybeTensor* g : {&grad_z, &grad_rho})
    STD_TORCH_CHECK(!*g || (same_shape(**g, z) && (*g)->scalar_type() == z.scalar_type()),
                    "gaussian_leapfrog: a cotangent does not fit");
  const bool state = needs & kNeedsState, parameters = needs & kNeedsParameters;
  const Tensor d_state[2] = {empty_for(z, state), empty_for(rho, state)};
  const Tensor d_parameters[4] = {empty_for(precision, parameters), empty_for(loc, parameters),
                                  empty_for(step_size, parameters), empty_for(tempering, parameters)};
  HK_DISPATCH("gaussian_leapfrog", z, backward, p, packed(grad_z), packed(grad_rho), packed(z), packed(rho),
              packed(precision), packed(loc), packed(step_size), packed(tempering), d_state,
              parameters ? d_parameters : nullptr);
  return {d_state[0], d_state[1], d_parameters[0], d_parameters[1], d_parameters[2], d_parameters[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_leapfrog_double_backward(
    MaybeTensor h_z, MaybeTensor h_rho, MaybeTensor h_precision, MaybeTensor h_loc, MaybeTensor h_step_size,
    MaybeTensor h_tempering, MaybeTensor grad_z, MaybeTensor grad_rho, Tensor z, Tensor rho, Tensor precision,
    Tensor loc, Tensor step_size, Tensor tempering, int64_t needs) {
  const Problem p(z, rho, precision, loc, step_size, tempering);
  const bool outputs = needs & kNeedsOutputs, state = needs & kNeedsState, parameters = needs & kNeedsParameters;
  const MaybeTensor h[6] = {packed(h_z),   packed(h_rho),       packed(h_precision),
                            packed(h_loc), packed(h_step_size), packed(h_tempering)};
  const Tensor d_outputs[2] = {empty_for(z, outputs), empty_for(rho, outputs)};
  const Tensor d_state[2] = {empty_for(z, state), empty_for(rho, state)};
  const Tensor d_parameters[4] = {empty_for(precision, parameters), empty_for(loc, parameters),
                                  empty_for(step_size, parameters), empty_for(tempering, parameters)};
  HK_DISPATCH("gaussian_leapfrog", z, double_backward, p, h, packed(grad_z), packed(grad_rho), packed(z), packed(rho),
              packed(precision), packed(loc), packed(step_size), packed(tempering), d_outputs, d_state,
              parameters ? d_parameters : nullptr);
  return {d_outputs[0],    d_outputs[1],    d_state[0],      d_state[1],
          d_parameters[0], d_parameters[1], d_parameters[2], d_parameters[3]};
}

}  // namespace hk
