// Gradients of autoregressive maps on the CPU, for the known values and every tensor of the network: of the map, and of
// its inverse by the solve with its transposed Jacobian.
#include <deque>

#include "sweep.h"
#include "weight_grad.h"

namespace hk {
namespace {

// The values of every source that is read, in panels of lanes [panel][row][lane] in ascending order of degree. Index 0
// is the features.
template <class T>
class Columns {
 public:
  Columns(const Network<T>& net, int64_t rows, int64_t most_groups) : net_(net), rows_(rows) {
    for (int64_t s = kFeatures; s + 1 < int64_t(net.stages.size()); ++s) {
      const int64_t units = net.layer(s).size(), lanes = std::min(lanes_for<T>(units), most_groups * kGroupLanes<T>);
      lanes_.push_back(lanes);
      columns_.emplace_back((units + lanes - 1) / lanes * lanes * rows);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t lanes(int64_t source) const { return lanes_[source + 1]; }
  int64_t panels(int64_t source) const { return (net_.layer(source).size() + lanes(source) - 1) / lanes(source); }
  const T* of(int64_t source) const { return columns_[source + 1].data(); }

  // The values of one tile, from `row` on, before cotangents take their place.
  void keep(Sweep<T>& sweep, int64_t row, int64_t n) {
    Scratch<T> panel(kMostGroups * kGroupLanes<T> * sweep.lanes());
    for (int64_t s = kFeatures; s + 1 < int64_t(net_.stages.size()); ++s) {
      const Layer& layer = net_.layer(s);
      const T* values = s == kFeatures ? sweep.x() : sweep.value(s, 0);
      const int64_t lanes = this->lanes(s);
      for (int64_t first = 0; first < layer.size(); first += lanes) {
        const int64_t width = std::min(lanes, layer.size() - first);
        const bool in_order = ascending(layer.up.data() + first, width);
        for (int64_t i = 0; i < width && !in_order; ++i)
          std::copy_n(values + layer.up[first + i] * sweep.lanes(), n, panel.data() + i * sweep.lanes());
        T* to = columns_[s + 1].data() + first * rows_ + row * lanes;
        const T* from = in_order ? values + layer.up[first] * sweep.lanes() : panel.data();
        transposed(from, sweep.lanes(), width, n, to, lanes);
        for (int64_t r = 0; r < n && width < lanes; ++r) std::fill_n(to + r * lanes + width, lanes - width, T(0));
      }
    }
  }

 private:
  const Network<T>& net_;
  int64_t rows_;
  std::vector<int64_t> lanes_;
  std::vector<Scratch<T>> columns_;
};

// What the gradients of weights and biases sum over, of all samples: values, and each stage's cotangents [unit][row].
template <class T>
class Samples {
 public:
  Samples(const Network<T>& net, int64_t rows) : net_(net), rows_(rows), values_(net, rows, kMostGroups) {
    for (const Stage<T>& stage : net.stages) cotangents_.emplace_back(stage.layer.size() * rows);
  }

  void keep_values(Sweep<T>& sweep, int64_t row, int64_t n) { values_.keep(sweep, row, n); }

  void keep_cotangents(Sweep<T>& sweep, int64_t row, int64_t n) {
    for (int64_t s = 0; s < int64_t(net_.stages.size()); ++s)
      for (int64_t unit = 0; unit < net_.stages[s].layer.size(); ++unit)
        std::copy_n(sweep.cotangent(s, unit), n, cotangents_[s].data() + unit * rows_ + row);
  }

  void weight_grad(int64_t s, const Term<T>& term, T sign, T* to) const {
    const Layer &layer = net_.stages[s].layer, &source = net_.layer(term.source);
    if (layer.size() == 0 || source.size() == 0) return;
    const WeightGrad<T> product{layer.up, source.up, term.counts, rows_, sign};
    product.run(cotangents_[s].data(), values_.of(term.source), to);
  }

  void bias_grad(int64_t s, T sign, T* to) const {
    const int64_t units = net_.stages[s].layer.size();
    torch::stable::parallel_for(0, units, grain_for(units, units * rows_), [&](int64_t begin, int64_t end) {
      Buffer<double> sums(end - begin);
      run(RowSums<T>{.rows = end - begin, .n = rows_, .stride = rows_, .from = cotangents_[s].data() + begin * rows_,
                     .sums = sums.data()});
      for (int64_t unit = begin; unit < end; ++unit) to[unit] = static_cast<T>(sign * sums[unit - begin]);
    });
  }

 private:
  const Network<T>& net_;
  int64_t rows_;
  Columns<T> values_;
  std::vector<Scratch<T>> cotangents_;
};

// The same sums of a few tiles, taken while the tiles are in the cache: for networks whose weights are, too.
template <class T>
class TileSums {
 public:
  // Padded entries of all weights: as many as stay in a core's cache beside a tile.
  static bool fits(const Network<T>& net) {
    int64_t size = 0;
    for (const Stage<T>& stage : net.stages)
      for (const Term<T>& term : stage.terms) {
        const int64_t sources = net.layer(term.source).size(), lanes = lanes_for<T>(sources);
        size += stage.layer.size() * ((sources + lanes - 1) / lanes * lanes);
      }
    return size * int64_t{sizeof(T)} <= 1 << 18;
  }

  TileSums(const Network<T>& net, int64_t lanes) : net_(net), values_(net, lanes, narrow()), samples_(lanes) {
    std::iota(samples_.begin(), samples_.end(), 0);
    for (const Stage<T>& stage : net.stages) {
      biases_.emplace_back(stage.layer.size());
      for (const Term<T>& term : stage.terms)
        weights_.emplace_back(values_.panels(term.source) * values_.lanes(term.source) * stage.layer.size());
    }
  }

  void keep_values(Sweep<T>& sweep, int64_t, int64_t n) { values_.keep(sweep, 0, n); }

  void add(Sweep<T>& sweep, int64_t n) {
    const std::vector<int64_t> ends(net_.widest, n);
    auto sums = weights_.begin();
    for (int64_t s = 0; s < int64_t(net_.stages.size()); ++s) {
      const Layer& layer = net_.stages[s].layer;
      run(RowSums<T>{.rows = layer.size(), .n = n, .stride = sweep.lanes(), .from = sweep.cotangent(s, 0),
                     .sums = biases_[s].data()});
      for (const Term<T>& term : net_.stages[s].terms) {
        const int64_t lanes = values_.lanes(term.source);
        for (int64_t p = 0; p < values_.panels(term.source); ++p)
          run(StaircaseProduct<T>{.first = first_that_sees(term, p * lanes), .last = layer.size(),
                                  .unit = layer.up.data(), .ends = ends.data(), .begin = 0, .end = n,
                                  .index = samples_.data(), .weight = sweep.cotangent(s, 0),
                                  .unit_stride = sweep.lanes(), .term_stride = 1,
                                  .h = values_.of(term.source) + p * values_.rows() * lanes, .lanes = lanes,
                                  .to = sums->data() + p * layer.size() * lanes, .packed = false});
        ++sums;
      }
    }
  }

  // All entries of one weight's gradient; `n`th among the terms of all stages.
  static void weight_grad(const std::vector<std::unique_ptr<TileSums>>& all, int64_t s, int64_t n, const Term<T>& term,
                          T sign, T* to) {
    const TileSums& one = *all[0];
    const Layer &layer = one.net_.stages[s].layer, &source = one.net_.layer(term.source);
    const int64_t lanes = one.values_.lanes(term.source), sources = source.size();
    const bool in_order = ascending(source.up.data(), sources);
    const int64_t grain = 1 + (1 << 16) / (1 + sources * int64_t(all.size()));
    torch::stable::parallel_for(0, layer.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        T* row = to + layer.up[u] * sources;
        std::fill_n(row, sources, T(0));
        for (int64_t first = 0; first < term.counts[u]; first += lanes) {
          const int64_t at = first * layer.size() + layer.up[u] * lanes, seen = std::min(lanes, term.counts[u] - first);
          double total[kMostGroups * kGroupLanes<T>] = {};
          for (const auto& part : all)
            for (int64_t i = 0; i < seen; ++i) total[i] += part->weights_[n][at + i];
          if (in_order)
            for (int64_t i = 0; i < seen; ++i) row[first + i] = static_cast<T>(sign * total[i]);
          else
            for (int64_t i = 0; i < seen; ++i) row[source.up[first + i]] = static_cast<T>(sign * total[i]);
        }
      }
    });
  }

  static void bias_grad(const std::vector<std::unique_ptr<TileSums>>& all, int64_t s, T sign, T* to) {
    for (int64_t unit = 0; unit < all[0]->biases_[s].size(); ++unit) {
      double total = 0;
      for (const auto& part : all) total += part->biases_[s][unit];
      to[unit] = static_cast<T>(sign * total);
    }
  }

 private:
  // A multiple of kMostUnits, that no unit's sums depend on where the panel's begin.
  static int64_t first_that_sees(const Term<T>& term, int64_t source) {
    const int64_t blind = std::upper_bound(term.counts.begin(), term.counts.end(), source) - term.counts.begin();
    return blind / kMostUnits * kMostUnits;
  }

  // Groups of a panel: few, as no unit that sees any of a panel's sources skips the others, but two vectors at least,
  // as one has too few sums to hide the latency of their products.
  static int64_t narrow() { return chosen_set.load(std::memory_order_relaxed) == SetId::avx512 ? 2 : 1; }

  const Network<T>& net_;
  Columns<T> values_;
  std::vector<int32_t> samples_;
  std::deque<Buffer<double>> biases_;
  std::deque<Buffer<T>> weights_;
};

template <class T>
struct Gradients {
  T* known;
  std::vector<T*> offsets, gates;  // of each stage, null where there is none
};

// Cotangents of one tile, whose known values, cotangents and tape (or null) are given.
template <class T, class Values>
void run_tile(Sweep<T>& sweep, const Network<T>& net, bool inverse, int64_t row, int64_t n, const T* tape,
              Values* values, const Gradients<T>& to) {
  const int64_t features = net.inputs[0].size(), lanes = sweep.lanes();
  if (tape) sweep.read_from(tape);
  else sweep.evaluate();
  if (values) values->keep_values(sweep, row, n);
  if (inverse) sweep.solve();
  else sweep.backward(to.known);
  const T sign = inverse ? T(-1) : T(1);
  for (int64_t s = 0; s < int64_t(net.stages.size()); ++s) {
    const int64_t units = net.stages[s].layer.size();
    for (int64_t unit = 0; unit < units && (to.offsets[s] || to.gates[s]); ++unit) {
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
  const auto load = [&](const T* from, int64_t width, int64_t row, int64_t n, T* into) {
    if (from) into_tile(from + row * width, width, n, width, lanes, into);
    else std::fill_n(into, width * lanes, T(0));
  };
  // Cotangents of tiles first to last - 1, and done(sweep, row, n) after each.
  const auto run_tiles = [&](int64_t first, int64_t last, auto* values, const auto& done) {
    Sweep<T> sweep(net, lanes);
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = t * lanes, n = std::min(lanes, rows - row);
      sweep.load_context(row, n);
      load(xs, features, row, n, sweep.x());
      load(g, features, row, n, sweep.y());
      load(h, 1, row, n, sweep.grad_log_det());
      run_tile(sweep, net, inverse, row, n, kept ? kept + t * sweep.tape_size() : nullptr, values, to);
      done(sweep, row, n);
    }
  };
  const T sign = inverse ? T(-1) : T(1);
  const bool in_tiles = results && rows && TileSums<T>::fits(net);
  if (!in_tiles) {
    Samples<T> samples(net, results ? rows : 0);
    torch::stable::parallel_for(0, tiles, grain_for(tiles, rows * net.connections), [&](int64_t begin, int64_t end) {
      run_tiles(begin, end, results ? &samples : nullptr, [&](Sweep<T>& sweep, int64_t row, int64_t n) {
        if (results) samples.keep_cotangents(sweep, row, n);
      });
    });
    for (int64_t s = 0; s < n_stages && results; ++s) {
      for (const Term<T>& term : net.stages[s].terms)
        samples.weight_grad(s, term, sign, written<T>((*results)[term.index]));
      if (T* bias = written<T>((*results)[n_weights + s])) samples.bias_grad(s, sign, bias);
    }
    return;
  }
  // Borders of chunks depend on sizes alone, so sums do not depend on the number of threads.
  constexpr int64_t kMostChunks = 16;
  const int64_t chunk = (tiles + kMostChunks - 1) / kMostChunks, chunks = (tiles + chunk - 1) / chunk;
  std::vector<std::unique_ptr<TileSums<T>>> sums(chunks);
  torch::stable::parallel_for(0, chunks, grain_for(chunks, rows * net.connections), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      sums[c] = std::make_unique<TileSums<T>>(net, lanes);
      run_tiles(c * chunk, std::min(tiles, (c + 1) * chunk), sums[c].get(),
                [&](Sweep<T>& sweep, int64_t, int64_t n) { sums[c]->add(sweep, n); });
    }
  });
  for (int64_t s = 0, n = 0; s < n_stages; ++s) {
    for (const Term<T>& term : net.stages[s].terms)
      TileSums<T>::weight_grad(sums, s, n++, term, sign, written<T>((*results)[term.index]));
    if (T* bias = written<T>((*results)[n_weights + s])) TileSums<T>::bias_grad(sums, s, sign, bias);
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
