// Autoregressive maps y = scale(x) x + weight(x) shift(x) on the CPU: the map and its inverse, each in one pass through
// the network's connections.
#include <atomic>

#include "sweep.h"

namespace hk {
namespace {

// x into y, or y into x, of one tile; false if a scale underflowed on the way back. `tape` keeps the raw values.
template <class T>
bool run_tile(Sweep<T>& sweep, bool inverse, int64_t features, int64_t n, const T* known, T* wanted, T* log_det,
              T* tape) {
  into_tile(known, features, n, features, sweep.lanes(), inverse ? sweep.y() : sweep.x());
  if (inverse) {
    sweep.inverse();
  } else {
    sweep.write_to(tape);
    sweep.evaluate();
    sweep.forward();
  }
  std::copy_n(sweep.log_det(), n, log_det);
  transposed(inverse ? sweep.x() : sweep.y(), sweep.lanes(), features, n, wanted, features);
  return !inverse || !sweep.underflowed(n);
}

template <class T>
void run_tiles(const Network<T>& net, bool inverse, const Tensor& known,
               const Tensor& wanted, const Tensor& log_det, T* tape) {
  const int64_t rows = known.size(0), features = known.size(1);
  const int64_t lanes = tile_lanes<T>(rows), tiles = (rows + lanes - 1) / lanes;
  const T* from = static_cast<const T*>(known.const_data_ptr());
  T *to = written<T>(wanted), *det = written<T>(log_det);
  std::atomic<bool> sound{true};
  torch::stable::parallel_for(0, tiles, grain_for(tiles, rows * net.connections), [&](int64_t begin, int64_t end) {
    Sweep<T> sweep(net, lanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * lanes, n = std::min(lanes, rows - row);
      sweep.load_context(row, n);
      T* kept = tape ? tape + t * sweep.tape_size() : nullptr;
      if (!run_tile(sweep, inverse, features, n, from + row * features, to + row * features, det + row, kept))
        sound = false;
    }
  });
  STD_TORCH_CHECK(sound, "autoregressive_inverse: a scale is below the least normal number, so the map has no inverse: "
                         "use a gate with a bounded scale, as clipped, soft-clipped, softplus or shifted-sigmoid");
}

template <class T>
void map(const NetworkArguments& a, bool inverse, const Tensor& known, const Tensor& wanted, const Tensor& log_det,
         Tensor* tape) {
  const Network<T> net(a, known.size(1), known.size(0));
  if (tape && !net.gated) *tape = empty_of({tape_rows<T>(known.size(0)) * net.units}, known);
  run_tiles<T>(net, inverse, known, wanted, log_det, tape && !net.gated ? written<T>(*tape) : nullptr);
}

std::tuple<Tensor, Tensor> mapped(bool inverse, const Tensor& known, const NetworkArguments& a, Tensor* tape) {
  STD_TORCH_CHECK(known.dim() == 2, "autoregressive network: known values must be a matrix");
  Tensor wanted = empty_for(known, true), log_det = empty_of({known.size(0)}, known);
  HK_DISPATCH("autoregressive network", known, map, a, inverse, packed(known), wanted, log_det, tape);
  return {wanted, log_det};
}

// ---- The operators ----

std::tuple<Tensor, Tensor> autoregressive_forward(Tensor x, HK_NETWORK_PARAMETERS) {
  return mapped(false, x, HK_NETWORK, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_training(Tensor x, HK_NETWORK_PARAMETERS) {
  Tensor tape = empty_of({0}, x);
  const auto [y, log_det] = mapped(false, x, HK_NETWORK, &tape);
  return {y, log_det, tape};
}

std::tuple<Tensor, Tensor> autoregressive_inverse(Tensor y, HK_NETWORK_PARAMETERS) {
  return mapped(true, y, HK_NETWORK, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("autoregressive_forward.cpp", TORCH_BOX(&autoregressive_forward));
  m.impl("autoregressive_training.cpp", TORCH_BOX(&autoregressive_training));
  m.impl("autoregressive_inverse.cpp", TORCH_BOX(&autoregressive_inverse));
}

}  // namespace hk
