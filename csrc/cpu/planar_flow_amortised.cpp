// planar_flow with layers for every row, on the CPU: checks, allocation, parallel loops. The arithmetic is in
// kernels/planar_flow_amortised.h.
#include "../kernels/planar_flow_amortised.h"

#include "rows.h"

namespace hk {
namespace {

using namespace planar;

struct Sizes {
  int64_t rows, layers, d;
  bool large;  // whether the gradients of u and w are to go past the caches; decided once, as another thread may change it

  // The public functions validate; so a refusal needs no more words.
  Sizes(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& numbers) {
    bool fits = z.dim() == 2 && u.dim() == 3 && numbers.dim() == 2 && same_shape(u, w);
    fits = fits && u.size(0) == z.size(0) && u.size(2) == z.size(1);
    fits = fits && numbers.size(0) == z.size(0) && numbers.size(1) == u.size(1);
    for (const Tensor* t : {&u, &w, &numbers}) fits = fits && t->scalar_type() == z.scalar_type();
    STD_TORCH_CHECK(fits, "planar_flow: shapes or dtypes do not fit");
    rows = z.size(0), layers = u.size(1), d = u.size(2);
    const int64_t bytes = 2 * u.numel() * (z.scalar_type() == ScalarType::Float ? 4 : 8);
    large = streams(bytes, bytes);
  }

  template <class T>
  int64_t width() const {
    constexpr int64_t kLine = 64 / sizeof(T);
    return (d + kLine - 1) / kLine * kLine;
  }

  // Runs f(work, first row, rows) over all rows, `together` at a time, in parallel; every range has a Work of its own.
  template <class Work, class F>
  void run(int64_t together, const F& f) const {
    constexpr int64_t kGrain = 32768;
    const int64_t groups = (rows + together - 1) / together;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, together * layers * d));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      const Work work(*this);
      for (int64_t i = begin; i < end; ++i) f(work, i * together, std::min(together, rows - i * together));
    });
  }
};

template <class T>
struct Given {
  const Sizes& sizes;
  bool constrain;
  const T *u, *w;

  RowLayers<T> from(int64_t row) const {
    const int64_t offset = row * sizes.layers * sizes.d;
    return {.layers = sizes.layers, .d = sizes.d, .constrain = constrain, .u = u + offset, .w = w + offset};
  }
};

// ---- In one dtype ----

template <class T>
struct ForwardRows {
  Scratch<T> z;
  explicit ForwardRows(const Sizes& sizes) : z(kTogether * sizes.width<T>()) {}
};

template <class T>
void forward(const Sizes& sizes, bool constrain, const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
             const Tensor& output, const Tensor& log_abs_det, const Tensor& a) {
  const int64_t d = sizes.d, width = sizes.width<T>(), layers = sizes.layers;
  const Given<T> given{sizes, constrain, data<T>(u), data<T>(w)};
  const T *from = data<T>(z), *biases = data<T>(b);
  T *to = written<T>(output), *logs = written<T>(log_abs_det), *kept = written<T>(a);
  sizes.run<ForwardRows<T>>(kTogether, [&](const ForwardRows<T>& work, int64_t row, int64_t n) {
    pad_rows(n, d, from + row * d, work.z.data(), width);
    run(AmortisedForward<T>{.row = given.from(row), .rows = n, .width = width, .b = biases + row * layers,
                            .z = work.z.data(), .log_abs_det = logs + row, .a = kept ? kept + row * layers : nullptr});
    copy_rows(work.z.data(), width, n, d, to + row * d, d);
  });
}

template <class T>
struct BackwardRows {
  // Numbers of u, and of w, that are taken together: they, their gradients and the next rows' lie in a core's second cache,
  // of 512 kB or more, on the way back.
  static constexpr int64_t kNumbers = (1 << 16) / sizeof(T);
  // d_u and d_w are made here where they go past the caches: layers come one by one, so that lines would go in halves.
  Scratch<T> z, g, d_u, d_w;
  Scratch<double> kept;
  explicit BackwardRows(const Sizes& sizes)
      : z(kTogether * sizes.width<T>()), g(kTogether * sizes.width<T>()), d_u(layers_kept(sizes)),
        d_w(layers_kept(sizes)), kept(sizes.layers * AmortisedBackward<T>::kKept * kTogether) {}

  static int64_t together(const Sizes& sizes) {
    return std::clamp<int64_t>(kNumbers / std::max<int64_t>(1, sizes.layers * sizes.d), 1, kTogether);
  }
  static bool past_caches(const Sizes& sizes) { return sizes.large && sizes.layers * sizes.d <= kNumbers; }

 private:
  static int64_t layers_kept(const Sizes& sizes) {
    return past_caches(sizes) ? together(sizes) * sizes.layers * sizes.d : 0;
  }
};

template <class T>
void backward(const Sizes& sizes, bool constrain, const MaybeTensor& grad, const MaybeTensor& grad_log,
              const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& a, const Tensor* results) {
  const int64_t d = sizes.d, width = sizes.width<T>(), layers = sizes.layers;
  const Given<T> given{sizes, constrain, data<T>(u), data<T>(w)};
  const T *gs = data<T>(grad), *ls = data<T>(grad_log), *from = data<T>(z), *kept = data<T>(a);
  T *d_z = written<T>(results[0]), *d_u = written<T>(results[1]), *d_w = written<T>(results[2]);
  T* d_b = written<T>(results[3]);
  const bool past_caches = BackwardRows<T>::past_caches(sizes);
  sizes.run<BackwardRows<T>>(BackwardRows<T>::together(sizes), [&](const BackwardRows<T>& work, int64_t row,
                                                                    int64_t n) {
    const int64_t offset = row * layers * d, numbers = n * layers * d;
    pad_rows(n, d, from + row * d, work.z.data(), width);
    if (gs) pad_rows(n, d, gs + row * d, work.g.data(), width);
    else std::fill_n(work.g.data(), n * width, T(0));
    run(AmortisedBackward<T>{.row = given.from(row), .rows = n, .width = width, .a = kept + row * layers,
                             .grad_log = ls ? ls + row : nullptr, .z = work.z.data(), .g = work.g.data(),
                             .d_u = past_caches ? work.d_u.data() : d_u + offset,
                             .d_w = past_caches ? work.d_w.data() : d_w + offset, .d_b = d_b + row * layers,
                             .kept = work.kept.data()});
    if (past_caches) {
      run(StoreRows<T>{.rows = 1, .d = numbers, .width = numbers, .from = work.d_u.data(), .to = d_u + offset,
                       .streams = true});
      run(StoreRows<T>{.rows = 1, .d = numbers, .width = numbers, .from = work.d_w.data(), .to = d_w + offset,
                       .streams = true});
    }
    copy_rows(work.g.data(), width, n, d, d_z + row * d, d);
  });
}

// ---- The operators ----

std::tuple<Tensor, Tensor, Tensor> planar_flow_amortised(Tensor z, Tensor u, Tensor w, Tensor b, bool constrain,
                                                         bool keep) {
  const Sizes sizes(z, u, w, b);
  const Tensor output = empty_for(z, true), log_abs_det = empty_for(z, true, 1), a = empty_for(b, keep);
  HK_DISPATCH("planar_flow", z, forward, sizes, constrain, packed(z), packed(u), packed(w), packed(b), output,
              log_abs_det, a);
  return {output, log_abs_det, a};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_flow_amortised_backward(MaybeTensor grad_output,
                                                                          MaybeTensor grad_log_abs_det, Tensor z,
                                                                          Tensor u, Tensor w, Tensor a,
                                                                          bool constrain) {
  const Sizes sizes(z, u, w, a);
  const Tensor results[4] = {empty_for(z, true), empty_for(u, true), empty_for(w, true), empty_for(a, true)};
  HK_DISPATCH("planar_flow", z, backward, sizes, constrain, packed(grad_output), packed(grad_log_abs_det), packed(z),
              packed(u), packed(w), packed(a), results);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("planar_flow_amortised.cpp", TORCH_BOX(&planar_flow_amortised));
  m.impl("planar_flow_amortised_backward.cpp", TORCH_BOX(&planar_flow_amortised_backward));
}

}  // namespace hk
