// Stacked radial layers on a few rows at a time, which stay in the cache however many layers there are. Derivation:
// hvae_kernels/ops/radial_flow/README.md.
#pragma once

#include <cmath>

#include "tile.h"

namespace hk::radial {

// Rows taken together: their chains of roots and divisions overlap, and the centres are read once for all of them.
constexpr int64_t kRows = 4;

// K layers; rows and centres are `width` numbers long, whole groups of lanes, the last one filled up with zeros.
template <class T>
struct Layers {
  int64_t count, d, width;
  const T *centers, *alpha, *beta;
};

// The sum of logarithms of |factors| by that of their product, taken before it leaves the number range.
struct LogProduct {
  double sum = 0, product = 1;
  HK_INLINE void times(double factor) {
    product *= factor;
    if (const double size = std::abs(product); !(size > 1e-100 && size < 1e100)) flush();
  }
  HK_INLINE void flush() {
    sum += std::log(std::abs(product));
    product = 1;
  }
};

// What a layer is for one row: h = 1 / (alpha + r), the stretch 1 + beta h, and 1 + alpha beta h^2.
struct Layer {
  double radius, h, stretch, along;
  Layer() = default;
  HK_INLINE Layer(double radius, double alpha, double beta)
      : radius(radius), h(1 / (alpha + radius)), stretch(1 + beta * h), along(1 + alpha * beta * h * h) {}
};

// The end of one layer and the beginning of the next in one pass: z += factor (z - last), y = z - next, and |y|^2. The
// first layer has no `last`, the last one no `next`; y is kept if kKeep.
template <class Set, int R, bool kLast, bool kNext, bool kKeep, class T>
HK_INLINE void step(int64_t n, const T* last, const T* next, const T* factor, T* z, T* y, double* squares) {
  constexpr int64_t kAhead = 12 * kGroupLanes<T>;
  Vector<T, Set> sums[R] = {};
  for (int64_t i = 0; i < n; i += kLanes<T, Set>)
    for (int r = 0; r < R; ++r) {
      Vector<T, Set> at = *vectors<Set>(z + r * n + i);
      if constexpr (kLast) *vectors<Set>(z + r * n + i) = at += factor[r] * (at - *vectors<Set>(last + i));
      if constexpr (!kNext) continue;
      at -= *vectors<Set>(next + i);
      sums[r] += at * at;
      if constexpr (!kKeep) continue;
      __builtin_prefetch(y + r * n + i + kAhead, 1);  // its lines come from L2, and stores that wait hold up loads
      *vectors<Set>(y + r * n + i) = at;
    }
  if constexpr (kNext)
    for (int r = 0; r < R; ++r) squares[r] = total<Set, T>(sums[r]);
}

// z becomes z_K; each layer of a row goes to done(layer, row, k). With kKeep, ys receives y, (K, R, width).
template <class Set, int R, bool kKeep, class T, class F>
HK_INLINE void forward_rows(const Layers<T>& layers, T* z, T* ys, const F& done) {
  const int64_t n = layers.width, last = layers.count - 1;
  const T* c = layers.centers;
  if (last < 0) return;
  double squares[R];
  step<Set, R, false, true, kKeep>(n, c, c, c, z, ys, squares);
  for (int64_t k = 0; k <= last; ++k, c += n) {
    T factor[R];
    for (int r = 0; r < R; ++r) {
      const Layer layer(std::sqrt(squares[r]), layers.alpha[k], layers.beta[k]);
      factor[r] = static_cast<T>(layers.beta[k] * layer.h);
      done(layer, r, k);
    }
    if (k < last)
      step<Set, R, true, true, kKeep>(n, c, c + n, factor, z, ys + (k + 1) * R * n, squares);
    else if constexpr (!kKeep)
      step<Set, R, true, false, false>(n, c, c, factor, z, z, squares);
  }
}

// z, (rows, width), becomes z_K.
template <class T>
struct Forward {
  Layers<T> layers;
  int64_t rows;
  T *z, *log_abs_det;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (rows == kRows) return some<Set, kRows>(z, log_abs_det);
    for (int64_t r = 0; r < rows; ++r) some<Set, 1>(z + r * layers.width, log_abs_det + r);
  }

 private:
  template <class Set, int R>
  HK_INLINE void some(T* at, T* log) const {
    LogProduct across[R], along[R];
    forward_rows<Set, R, false>(layers, at, at, [&](const Layer& layer, int r, int64_t) __attribute__((always_inline)) {
      across[r].times(layer.stretch);
      along[r].times(layer.along);
    });
    for (int r = 0; r < R; ++r) {
      across[r].flush();
      along[r].flush();
      log[r] = static_cast<T>(double(layers.d - 1) * across[r].sum + along[r].sum);
    }
  }
};

// The same backwards: v = keep g + turn y, g += v, sums -= v over the rows, and then g.next for the layer before.
template <class Set, int R, bool kLast, bool kNext, class T>
HK_INLINE void step_back(int64_t n, const T* keep, const T* turn, const T* y, const T* next, T* g, T* sums,
                         double* projected) {
  Vector<T, Set> products[R] = {};
  for (int64_t i = 0; i < n; i += kLanes<T, Set>) {
    Vector<T, Set> moved_rows = {};
    for (int r = 0; r < R; ++r) {
      Vector<T, Set> at = *vectors<Set>(g + r * n + i);
      if constexpr (kLast) {
        const Vector<T, Set> moved = keep[r] * at + turn[r] * *vectors<Set>(y + r * n + i);
        moved_rows += moved;
        *vectors<Set>(g + r * n + i) = at += moved;
      }
      if constexpr (kNext) products[r] += at * *vectors<Set>(next + r * n + i);
    }
    if constexpr (kLast) *vectors<Set>(sums + i) -= moved_rows;
  }
  if constexpr (kNext)
    for (int r = 0; r < R; ++r) projected[r] = total<Set, T>(products[r]);
}

// g, (rows, width), holds the cotangents of z_K and becomes those of z_0; z is scratch with z_0, ys scratch for (K, R,
// width), `stack` for (K, R). The sums (K, width), (K), (K) grow by the rows' gradients; the first in T, to be flushed
// after a run.
template <class T>
struct Backward {
  Layers<T> layers;
  int64_t rows;
  T* z;
  const T* grad_log;
  T *g, *ys;
  Layer* stack;
  T* d_centers;
  double *d_alpha, *d_beta;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (!layers.count) return;
    if (rows == kRows) return some<Set, kRows>(z, grad_log, g);
    for (int64_t r = 0; r < rows; ++r)
      some<Set, 1>(z + r * layers.width, grad_log ? grad_log + r : nullptr, g + r * layers.width);
  }

 private:
  template <class Set, int R>
  HK_INLINE void some(T* at, const T* grads_log, T* grads) const {
    const int64_t n = layers.width;
    const auto keep_layer = [&](const Layer& layer, int r, int64_t k) __attribute__((always_inline)) {
      stack[k * R + r] = layer;
    };
    forward_rows<Set, R, true>(layers, at, ys, keep_layer);
    double projected[R];
    T keep[R], turn[R];
    step_back<Set, R, false, true>(n, keep, turn, ys, ys + (layers.count - 1) * R * n, grads, d_centers, projected);
    for (int64_t k = layers.count - 1; k >= 0; --k) {
      for (int r = 0; r < R; ++r) {
        const Layer& p = stack[k * R + r];
        const double a = layers.alpha[k], b = layers.beta[k], square = p.h * p.h, log = grads_log ? grads_log[r] : 0;
        const double across = log == 0 ? 0 : double(layers.d - 1) * log / p.stretch, along = log == 0 ? 0 : log / p.along;
        const double d_h = b * (projected[r] + across + 2 * a * p.h * along);
        d_alpha[k] += square * (b * along - d_h);
        d_beta[k] += p.h * (projected[r] + across) + a * square * along;
        keep[r] = static_cast<T>(b * p.h), turn[r] = static_cast<T>(p.radius > 0 ? -square * d_h / p.radius : 0);
      }
      const T* y = ys + k * R * n;
      T* sums = d_centers + k * n;
      if (k > 0)
        step_back<Set, R, true, true>(n, keep, turn, y, y - R * n, grads, sums, projected);
      else
        step_back<Set, R, true, false>(n, keep, turn, y, y, grads, sums, projected);
    }
  }
};

}  // namespace hk::radial
