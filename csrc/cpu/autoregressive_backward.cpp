// Gradients of autoregressive maps on the CPU, for the known values and every tensor of the network: of the map, and of
// its inverse by the solve with its transposed Jacobian.
#include "sweep.h"
#include "weight_grad.h"

namespace hk {
namespace {

// What the weight gradients sum over, of all samples: each stage's cotangents [unit][row], and the values of every source
// that is read, in panels of lanes [panel][row][lane] in ascending order of degree. Index 0 is the features.
template <class T>
class Samples {
 public:
  Samples(const Network<T>& net, int64_t rows) : net_(net), rows_(rows) {
    for (int64_t s = kFeatures; s < int64_t(net.stages.size()); ++s) {
      const int64_t units = net.layer(s).size(), lanes = lanes_for<T>(units);
      const bool read = s + 1 < int64_t(net.stages.size());
      lanes_.push_back(lanes);
      columns_.emplace_back(read ? (units + lanes - 1) / lanes * lanes * rows : 0);
      cotangents_.emplace_back(s == kFeatures ? 0 : units * rows);
    }
  }

  // The values of one tile, before cotangents take their place.
  void keep_values(Sweep<T>& sweep, int64_t row, int64_t n) {
    Scratch<T> panel(kMostGroups * kGroupLanes<T> * sweep.lanes());
    for (int64_t s = kFeatures; s + 1 < int64_t(net_.stages.size()); ++s) {
      const Layer& layer = net_.layer(s);
      const T* values = s == kFeatures ? sweep.x() : sweep.value(s, 0);
      const int64_t lanes = lanes_[s + 1];
      for (int64_t first = 0; first < layer.size(); first += lanes) {
        const int64_t width = std::min(lanes, layer.size() - first);
        for (int64_t i = 0; i < width; ++i)
          std::copy_n(values + layer.up[first + i] * sweep.lanes(), n, panel.data() + i * sweep.lanes());
        T* to = columns_[s + 1].data() + first * rows_ + row * lanes;
        transposed(panel.data(), sweep.lanes(), width, n, to, lanes);
        for (int64_t r = 0; r < n; ++r) std::fill_n(to + r * lanes + width, lanes - width, T(0));
      }
    }
  }

  void keep_cotangents(Sweep<T>& sweep, int64_t row, int64_t n, T sign) {
    for (int64_t s = 0; s < int64_t(net_.stages.size()); ++s)
      for (int64_t unit = 0; unit < net_.stages[s].layer.size(); ++unit) {
        const T* from = sweep.cotangent(s, unit);
        T* to = cotangents_[s + 1].data() + unit * rows_ + row;
        for (int64_t i = 0; i < n; ++i) to[i] = sign * from[i];
      }
  }

  void weight_grad(int64_t s, const Term<T>& term, T* to) const {
    const Layer &layer = net_.stages[s].layer, &source = net_.layer(term.source);
    if (layer.size() == 0 || source.size() == 0) return;
    WeightGrad<T>{layer.up, source.up, term.counts, rows_}.run(cotangents_[s + 1].data(),
                                                               columns_[term.source + 1].data(), to);
  }

  void bias_grad(int64_t s, T* to) const {
    const int64_t units = net_.stages[s].layer.size();
    torch::stable::parallel_for(0, units, grain_for(units, units * rows_), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit)
        to[unit] = static_cast<T>(run(RowSum<T>{cotangents_[s + 1].data() + unit * rows_, rows_}));
    });
  }

 private:
  const Network<T>& net_;
  int64_t rows_;
  std::vector<int64_t> lanes_;
  std::vector<Scratch<T>> columns_, cotangents_;
};

template <class T>
struct Gradients {
  T* known;
  std::vector<T*> offsets, gates;  // of each stage, null where there is none
};

// Cotangents of one tile, whose known values, cotangents and tape (or null) are given.
template <class T>
void run_tile(Sweep<T>& sweep, const Network<T>& net, bool inverse, int64_t row, int64_t n, const T* tape,
              Samples<T>* samples, const Gradients<T>& to) {
  const int64_t features = net.inputs[0].size(), lanes = sweep.lanes();
  if (tape) {
    std::copy_n(tape, sweep.tape_size(), sweep.tape());
    sweep.activate_all();
  } else {
    sweep.evaluate();
  }
  if (samples) samples->keep_values(sweep, row, n);
  if (inverse) sweep.solve();
  else sweep.backward(to.known);
  const T sign = inverse ? T(-1) : T(1);
  if (samples) samples->keep_cotangents(sweep, row, n, sign);
  for (int64_t s = 0; s < int64_t(net.stages.size()); ++s) {
    const int64_t units = net.stages[s].layer.size();
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t i = 0; i < n && to.offsets[s]; ++i)
        to.offsets[s][(row + i) * units + unit] = sign * sweep.cotangent(s, unit)[i];
      for (int64_t i = 0; i < n && to.gates[s]; ++i)
        to.gates[s][(row + i) * units + unit] = sign * sweep.raw(s, unit)[i] * sweep.ungated(s, unit)[i];
    }
  }
  if (!to.known) return;
  for (int64_t i = 0; i < features * lanes && !inverse; ++i) sweep.y()[i] += sweep.through(0)[i];
  transposed(sweep.y(), lanes, features, n, to.known + row * features, features);
}

template <class T>
void backward(const NetworkArguments& a, bool inverse, const MaybeTensor& grad, const MaybeTensor& grad_log_det,
              const Tensor& x, const Tensor& tape, const Tensor* d_known, const std::vector<Tensor>* results) {
  const int64_t rows = x.size(0), features = x.size(1), n_stages = a.biases.size(), n_weights = a.weights.size();
  const Network<T> net(a, features, rows);
  const int64_t lanes = tile_lanes<T>(rows), tiles = (rows + lanes - 1) / lanes;
  STD_TORCH_CHECK(tape.numel() == 0 || tape.numel() == tape_rows<T>(rows) * net.units, "autoregressive network: tape");
  const T *xs = static_cast<const T*>(x.const_data_ptr()), *g = data<T>(grad), *h = data<T>(grad_log_det);
  const T* kept = tape.numel() ? static_cast<const T*>(tape.const_data_ptr()) : nullptr;
  Gradients<T> to{d_known ? written<T>(*d_known) : nullptr, std::vector<T*>(n_stages), std::vector<T*>(n_stages)};
  for (int64_t s = 0; s < n_stages && results; ++s) {
    to.offsets[s] = written<T>((*results)[n_weights + n_stages + s]);
    to.gates[s] = written<T>((*results)[n_weights + 2 * n_stages + s]);
  }
  Samples<T> samples(net, results ? rows : 0);
  torch::stable::parallel_for(0, tiles, grain_for(tiles, rows * net.connections), [&](int64_t begin, int64_t end) {
    Sweep<T> sweep(net, a, lanes);
    const auto load = [&](const T* from, int64_t width, int64_t row, int64_t n, T* into) {
      if (from) into_tile(from + row * width, width, n, width, lanes, into);
      else std::fill_n(into, width * lanes, T(0));
    };
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * lanes, n = std::min(lanes, rows - row);
      sweep.load_context(row, n);
      load(xs, features, row, n, sweep.x());
      load(g, features, row, n, sweep.y());
      load(h, 1, row, n, sweep.grad_log_det());
      run_tile(sweep, net, inverse, row, n, kept ? kept + t * sweep.tape_size() : nullptr,
               results ? &samples : nullptr, to);
    }
  });
  for (int64_t s = 0; s < n_stages && results; ++s) {
    for (const Term<T>& term : net.stages[s].terms)
      samples.weight_grad(s, term, written<T>((*results)[term.index]));
    if (T* bias = written<T>((*results)[n_weights + s])) samples.bias_grad(s, bias);
  }
}

// ---- The operators ----

std::tuple<Tensor, std::vector<Tensor>> autoregressive_backward(MaybeTensor grad, MaybeTensor grad_log_det, Tensor x,
                                                                Tensor tape, bool inverse, bool needs_known,
                                                                bool needs_parameters, HK_NETWORK_PARAMETERS) {
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type(); };
  STD_TORCH_CHECK(x.dim() == 2 && fits(tape) && (!grad || (same_shape(*grad, x) && fits(*grad))) &&
                      (!grad_log_det || (grad_log_det->dim() == 1 && grad_log_det->size(0) == x.size(0) &&
                                         fits(*grad_log_det))),
                  "autoregressive network: cotangents and x do not fit");
  const NetworkArguments a HK_NETWORK;
  const Tensor d_known = empty_for(x, needs_known);
  std::vector<Tensor> results;
  for (const auto* tensors : {&a.weights, &a.biases, &a.offsets, &a.gates})
    for (const Tensor& t : *tensors) results.push_back(empty_for(t, needs_parameters));
  HK_DISPATCH("autoregressive network", x, backward, a, inverse, packed(grad), packed(grad_log_det), packed(x), tape,
              needs_known ? &d_known : nullptr, needs_parameters ? &results : nullptr);
  return {d_known, results};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("autoregressive_backward.cpp", TORCH_BOX(&autoregressive_backward));
}

}  // namespace hk
