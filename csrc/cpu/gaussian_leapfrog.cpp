// gaussian_leapfrog on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/gaussian_leapfrog.h.
#include "../kernels/gaussian_leapfrog.h"

#include <cmath>

#include "rows.h"

namespace hk {
namespace {

using namespace leapfrog;

// The call's sizes; the forms are told in ops/gaussian_leapfrog/_layout.py. A call that fits none is refused here in a
// few words, and api.py then says which argument is at fault.
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

// Runs f(replica, first block, last block) over all blocks of dimensions; short chains stay on the calling thread.
template <class F>
void for_blocks(const Problem& p, const F& f) {
  const int64_t blocks = p.shape.blocks(), grain = std::max<int64_t>(1, 8192 / (kBlock * (p.shape.n_steps + 1)));
  torch::stable::parallel_for(0, p.replicas * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t replica = i / blocks, first = i % blocks, last = std::min(blocks, first + end - i);
      f(replica, first, last);
      i += last - first;
    }
  });
}

template <class T>
Parameters<T> parameters_of(const Problem& p, Parameters<T> in, int64_t replica) {
  const int64_t d = replica * p.shape.features, k = replica * p.shape.n_steps, step = replica * p.step_size_numel;
  in.precision += d, in.step += step, in.tempering += k;
  if (in.h_precision) in.h_precision += d;
  if (in.h_step) in.h_step += step;
  if (in.h_tempering) in.h_tempering += k;
  return in;
}

// The composed maps of all replicas: exact[4][features] each and, in the batch's dtype, tiled to the row width:
// A (less one where positions move), B, C, D, loc. With `duals` also their tangents.
template <class T>
class Maps {
 public:
  Maps(const Problem& p, const Tiling& tiling, const Parameters<T>& in, const T* loc, bool moves, bool duals)
      : features_(p.shape.features), width_(tiling.width), exact_(p.replicas * 4 * features_),
        exact_tangents_(duals ? p.replicas * 4 * features_ : 0), values_(p.replicas * 5 * width_),
        tangents_(duals ? p.replicas * 5 * width_ : 0) {
    for_blocks(p, [&](int64_t r, int64_t first, int64_t last) {
      run(Compose<T>{.shape = p.shape, .in = parameters_of(p, in, r), .first = first, .last = last,
                     .value = exact_.data() + r * 4 * features_,
                     .tangent = duals ? exact_tangents_.data() + r * 4 * features_ : nullptr});
    });
    for (int64_t r = 0; r < p.replicas; ++r) {
      spread(values_.data() + r * 5 * width_, exact(r), tiling.repeat, moves);
      if (duals) spread(tangents_.data() + r * 5 * width_, exact_tangent(r), tiling.repeat, false);
      tiling.spread(loc + r * features_, values_.data() + (r * 5 + 4) * width_);
    }
  }

  // Two of A, B, C, D, from the first-th on, which multiply an absent cotangent alone: they might not be finite.
  void drop(int64_t first) {
    for (T* to = values_.data(); to < values_.data() + values_.size(); to += 5 * width_)
      std::fill_n(to + first * width_, 2 * width_, T(0));
  }
  Map<T> map(int64_t replica) const { return at(values_, replica); }
  Map<T> tangent(int64_t replica) const { return at(tangents_, replica); }
  const double* exact(int64_t replica) const { return exact_.data() + replica * 4 * features_; }
  const double* exact_tangent(int64_t replica) const { return exact_tangents_.data() + replica * 4 * features_; }

 private:
  void spread(T* to, const double* from, int64_t repeat, bool moves) const {
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t r = 0; r < repeat; ++r)
        for (int64_t j = 0; j < features_; ++j)
          to[i * width_ + r * features_ + j] = static_cast<T>(from[i * features_ + j] - (moves && i == 0));
  }

  Map<T> at(const Buffer<T>& all, int64_t replica) const {
    const T* p = all.data() + replica * 5 * width_;
    return {p, p + width_, p + 2 * width_, p + 3 * width_, p + 4 * width_};
  }

  int64_t features_, width_;
  Buffer<double> exact_, exact_tangents_;
  Buffer<T> values_, tangents_;
};

// Gradients of precision, step sizes and tempering (d_parameters 0, 2 and 3) from the column sums, in parallel over
// blocks of dimensions. What all dimensions share is summed over the blocks in order: the same on any number of threads.
template <class S, class T>
void chain(const Problem& p, const Parameters<T>& in, const double* sums, int64_t n_sums, int64_t tangent_at,
           const Tensor* d_parameters) {
  const int64_t d = p.shape.features, K = p.shape.n_steps, blocks = p.shape.blocks();
  const bool shared = p.shape.step_j == 0;
  Buffer<double> precision(p.replicas * d), step(p.replicas * (shared ? blocks : p.step_size_numel));
  Buffer<double> tempering(p.replicas * blocks * K);
  for_blocks(p, [&](int64_t r, int64_t first, int64_t last) {
    const Parameters<T> of = parameters_of(p, in, r);
    const double* cotangent = sums + r * n_sums * d;
    Buffer<S> prefix(K * 4 * kBlock);
    for (int64_t b = first; b < last; ++b)
      run(ChainBackward<S, T>{.shape = p.shape, .in = of, .number = b, .cotangent = cotangent,
                              .cotangent_tangent = tangent_at ? cotangent + tangent_at * d : nullptr,
                              .prefix = prefix.data(), .d_precision = precision.data() + r * d,
                              .d_step = step.data() + r * (shared ? blocks : p.step_size_numel) + (shared ? b : 0),
                              .d_tempering = tempering.data() + (r * blocks + b) * K});
  });
  store(written<T>(d_parameters[0]), precision);
  if (shared) store_sums(written<T>(d_parameters[2]), step, p.replicas, blocks, 1);
  else store(written<T>(d_parameters[2]), step);
  store_sums(written<T>(d_parameters[3]), tempering, p.replicas, blocks, K);
}

// ---- In one dtype ----

template <class T>
void forward(const Problem& p, const Tensor& z, const Tensor& rho, const Tensor& precision, const Tensor& loc,
             const Tensor& step_size, const Tensor& tempering, const Tensor& z_out, const Tensor& rho_out) {
  check_finite<T>(step_size, "step_size");
  check_finite<T>(tempering, "tempering");
  if (z.numel() == 0) return;
  if (p.shape.n_steps == 0) {
    std::copy_n(data<T>(z), z.numel(), written<T>(z_out));
    std::copy_n(data<T>(rho), rho.numel(), written<T>(rho_out));
    return;
  }
  const Tiling tiling(p.replicas, p.rows, p.shape.features);
  const Parameters<T> in{data<T>(precision), data<T>(step_size), data<T>(tempering)};
  const Maps<T> maps(p, tiling, in, data<T>(loc), true, false);
  const T *z_in = data<T>(z), *rho_in = data<T>(rho);
  T *z_to = written<T>(z_out), *rho_to = written<T>(rho_out);
  const auto aligned = [&](auto address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; };
  const int64_t bytes = z.numel() * sizeof(T);
  const bool past_caches = streams(2 * bytes, 2 * bytes) && aligned(z_to) && aligned(rho_to) &&
                           aligned(p.rows * p.shape.features * sizeof(T)) && aligned(tiling.width * sizeof(T));
  torch::stable::parallel_for(0, p.replicas * tiling.chunks, tiling.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t replica = item / tiling.chunks, offset = replica * p.rows * p.shape.features;
      tiling.rows_of(item % tiling.chunks, [&](int64_t first, int64_t n, int64_t width) {
        const int64_t at = offset + first * tiling.width;
        run(Forward<T>{.rows = n, .width = width, .map = maps.map(replica), .z = z_in + at, .rho = rho_in + at,
                       .z_out = z_to + at, .rho_out = rho_to + at, .streams = past_caches && width == tiling.width});
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
  const Parameters<T> in{data<T>(precision), data<T>(step_size), data<T>(tempering)};
  Maps<T> maps(p, tiling, in, data<T>(loc), false, false);
  if (!grad_z) maps.drop(0);
  if (!grad_rho) maps.drop(2);
  const Rows<T> rows(tiling);
  const T *gz = data<T>(grad_z), *gr = data<T>(grad_rho), *zs = data<T>(z), *rs = data<T>(rho);
  T *dz = written<T>(d_state[0]), *dr = written<T>(d_state[1]);
  Buffer<double> sums(p.replicas * Backward<T>::kSums * d);
  const int64_t bytes = z.numel() * sizeof(T);
  const bool past_caches = dz && streams(2 * bytes, 4 * bytes);
  reduce_rows<T>(
      tiling, Backward<T>::kSums, 2, sums.data(),
      [&](int64_t r, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
        run(Backward<T>{.first = first, .rows = n, .width = width, .map = maps.map(r), .grad_z = rows.in(gz, r),
                        .grad_rho = rows.in(gr, r), .z = rows.in(zs, r), .rho = rows.in(rs, r),
                        .d_z = rows.out(dz, r, scratch), .d_rho = rows.out(dr, r, scratch + tiling.width), .acc = acc,
                        .scratch = scratch, .sums = into, .streams = past_caches});
      });
  if (!d_parameters) return;
  Buffer<double> d_loc(p.replicas * d);
  for (int64_t r = 0; r < p.replicas; ++r) {
    const double *map = maps.exact(r), *s = sums.data() + r * Backward<T>::kSums * d;
    for (int64_t j = 0; j < d; ++j) d_loc[r * d + j] = (1 - map[j]) * s[4 * d + j] - map[2 * d + j] * s[5 * d + j];
  }
  store(written<T>(d_parameters[1]), d_loc);
  chain<double>(p, in, sums.data(), Backward<T>::kSums, 0, d_parameters);
}

template <class T>
void double_backward(const Problem& p, const MaybeTensor* h, const MaybeTensor& grad_z, const MaybeTensor& grad_rho,
                     const Tensor& z, const Tensor& rho, const Tensor& precision, const Tensor& loc,
                     const Tensor& step_size, const Tensor& tempering, const Tensor* d_outputs, const Tensor* d_state,
                     const Tensor* d_parameters) {
  const int64_t d = p.shape.features;
  const Tiling tiling(p.replicas, p.rows, d);
  const Parameters<T> in{data<T>(precision), data<T>(step_size), data<T>(tempering),
                   data<T>(h[2]),      data<T>(h[4]),      data<T>(h[5])};
  const Maps<T> maps(p, tiling, in, data<T>(loc), true, true);
  const Rows<T> rows(tiling);
  Buffer<T> h_loc(p.replicas * tiling.width);
  if (const T* given = data<T>(h[3]))
    for (int64_t r = 0; r < p.replicas; ++r) tiling.spread(given + r * d, h_loc.data() + r * tiling.width);
  const T *hz = data<T>(h[0]), *hr = data<T>(h[1]), *gz = data<T>(grad_z), *gr = data<T>(grad_rho);
  const T *zs = data<T>(z), *rs = data<T>(rho);
  T *ggz = written<T>(d_outputs[0]), *ggr = written<T>(d_outputs[1]);
  T *dz = written<T>(d_state[0]), *dr = written<T>(d_state[1]);
  Buffer<double> sums(p.replicas * DoubleBackward<T>::kSums * d);
  reduce_rows<T>(
      tiling, DoubleBackward<T>::kSums, 4, sums.data(),
      [&](int64_t r, int64_t first, int64_t n, int64_t width, T* scratch, T* acc, double* into) {
        run(DoubleBackward<T>{.first = first, .rows = n, .width = width, .map = maps.map(r), .tangent = maps.tangent(r),
                              .h_loc = h_loc.data() + r * tiling.width, .h_z = rows.in(hz, r), .h_rho = rows.in(hr, r),
                              .grad_z = rows.in(gz, r), .grad_rho = rows.in(gr, r), .z = rows.in(zs, r),
                              .rho = rows.in(rs, r), .gg_z = rows.out(ggz, r, scratch),
                              .gg_rho = rows.out(ggr, r, scratch + tiling.width),
                              .d_z = rows.out(dz, r, scratch + 2 * tiling.width),
                              .d_rho = rows.out(dr, r, scratch + 3 * tiling.width), .acc = acc, .sums = into});
      });
  if (!d_parameters) return;
  Buffer<double> d_loc(p.replicas * d);
  for (int64_t r = 0; r < p.replicas; ++r) {
    const double *tangent = maps.exact_tangent(r), *s = sums.data() + r * DoubleBackward<T>::kSums * d;
    for (int64_t j = 0; j < d; ++j) d_loc[r * d + j] = -(tangent[j] * s[4 * d + j] + tangent[2 * d + j] * s[5 * d + j]);
  }
  store(written<T>(d_parameters[1]), d_loc);
  chain<Dual>(p, in, sums.data(), DoubleBackward<T>::kSums, 6, d_parameters);
}

// ---- The operators ----

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("gaussian_leapfrog.cpp", TORCH_BOX(&gaussian_leapfrog));
  m.impl("gaussian_leapfrog_backward.cpp", TORCH_BOX(&gaussian_leapfrog_backward));
  m.impl("gaussian_leapfrog_double_backward.cpp", TORCH_BOX(&gaussian_leapfrog_double_backward));
}

}  // namespace hk
