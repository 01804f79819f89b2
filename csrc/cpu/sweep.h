// One tile of samples on its way through an autoregressive network, in either direction, and back.
#pragma once

#include "autoregressive_network.h"

namespace hk {

using namespace network;

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

template <class T>
class Sweep {
 public:
  Sweep(const Network<T>& net, int64_t lanes)
      : net_(net), tail_{net.gate, static_cast<T>(net.first), static_cast<T>(net.second)}, lanes_(lanes),
        x_(net.inputs[0].size() * lanes_), y_(net.inputs[0].size() * lanes_),
        log_det_(lanes_), through_(net.inputs[0].size() * lanes_), grad_log_det_(lanes_), least_(lanes_),
        tape_(net.units * lanes_), spline_scratch_(net.spline ? 3 * net.parameters() * spline::kBlock : 0) {
    place(tape_.data());
    for (const Stage<T>& s : net.stages) {
      value_.emplace_back(s.layer.size() * lanes_);
      offset_.emplace_back(s.offset ? s.layer.size() * lanes_ : 0);
      gates_.emplace_back(s.gate ? s.layer.size() * lanes_ : 0);
      ungated_.emplace_back(s.gate ? s.layer.size() * lanes_ : 0);
    }
  }

  // Where the tile's known and wanted rows lie.
  T* x() { return x_.data(); }
  T* y() { return y_.data(); }
  T* grad_log_det() { return grad_log_det_.data(); }
  // Whether a scale of the first n samples underflowed.
  bool underflowed(int64_t n) const {
    return std::any_of(least_.data(), least_.data() + n, [](T s) { return s < std::numeric_limits<T>::min(); });
  }
  const double* log_det() const { return log_det_.data(); }
  int64_t lanes() const { return lanes_; }
  int64_t tape_size() const { return net_.units * lanes_; }
  // Raw values are computed into this tape, or into the sweep's own.
  void write_to(T* tape) { place(tape ? tape : tape_.data()); }
  // All units' values from a tape, where nothing is gated; what a backward pass overwrites is copied.
  void read_from(const T* tape) {
    place(tape_.data());
    int64_t units = 0;
    for (int64_t s = 0; s <= last(); ++s) {
      const Stage<T>& stage = net_.stages[s];
      const int64_t size = stage.layer.size() * lanes_;
      const T* kept = tape + units * lanes_;
      if (s == last() || stage.residual != kNone) std::copy_n(kept, size, raw_[s]);
      else raw_[s] = const_cast<T*>(kept);
      if (s < last()) run(Activate<T>{stage.activation, kept, size, value(s, 0)});
      units += stage.layer.size();
    }
  }
  // One unit's values; after a backward pass or a solve its cotangents instead: of what its weights gave, and, where
  // that differs or is read, of its raw value.
  T* raw(int64_t s, int64_t unit) { return raw_[s] + unit * lanes_; }
  T* value(int64_t s, int64_t unit) { return value_[s].data() + unit * lanes_; }
  T* cotangent(int64_t s, int64_t unit) { return s == last() ? raw(s, unit) : value(s, unit); }
  const T* ungated(int64_t s, int64_t unit) const { return ungated_[s].data() + unit * lanes_; }
  const T* through(int64_t feature) const { return through_.data() + feature * lanes_; }

  void load_context(int64_t row, int64_t rows) {
    for (size_t s = 0; s < net_.stages.size(); ++s) {
      const int64_t units = net_.stages[s].layer.size();
      if (const T* from = net_.stages[s].offset)
        into_tile(from + row * units, units, rows, units, lanes_, offset_[s].data());
      if (const T* from = net_.stages[s].gate)
        into_tile(from + row * units, units, rows, units, lanes_, gates_[s].data());
    }
    std::fill_n(log_det_.data(), lanes_, 0.0);
    std::fill_n(least_.data(), lanes_, T(1));
  }

  // All units' values from x.
  void evaluate() {
    for (size_t s = 0; s < net_.stages.size(); ++s) {
      const int64_t units = net_.stages[s].layer.size();
      start(s, 0, units);
      add(s, 0, units, net_.steps + 1, true);
      finish(s, 0, units);
    }
  }

  // x and all values known, y wanted.
  void forward() {
    const int64_t features = net_.inputs[0].size();
    for (int64_t j = 0; j < features; ++j) {
      if (net_.spline) apply_spline(j, false, x(), y());
      else
        run(ApplyTail<T>{.tail = tail_, .x = x() + j * lanes_, .shift = output(j, 0), .raw = output(j, 1), .n = lanes_,
                         .y = y() + j * lanes_, .log_det = log_det_.data()});
    }
  }

  // y known, x wanted: features in order of degree, each unit finished once, when its last input is known. What lies in
  // finished blocks of steps goes through the large products, what lies inside the block is added step by step.
  void inverse() {
    const Layer& features = net_.inputs[0];
    for (int64_t t0 = 0, t1; t0 < net_.steps; t0 = t1) {
      t1 = std::min(net_.steps, t0 + steps_a_block());
      for (size_t s = 0; s < net_.stages.size(); ++s) {
        const Layer& layer = net_.stages[s].layer;
        start(s, layer.start[t0], layer.start[t1]);
        add(s, layer.start[t0], layer.start[t1], t0, true);
      }
      for (int64_t t = t0; t < t1; ++t) {
        for (size_t s = 0; s < net_.stages.size(); ++s) {
          const Layer& layer = net_.stages[s].layer;
          add(s, layer.start[t], layer.start[t + 1], t0, false);
          finish(s, layer.start[t], layer.start[t + 1]);
        }
        for (int64_t i = features.start[t]; i < features.start[t + 1]; ++i) {
          const int64_t j = features.up[i];
          if (net_.spline) apply_spline(j, true, y(), x());
          else
            run(InvertTail<T>{.tail = tail_, .y = y() + j * lanes_, .shift = output(j, 0), .raw = output(j, 1),
                              .n = lanes_, .x = x() + j * lanes_, .log_det = log_det_.data(), .least = least_.data()});
        }
      }
    }
  }

  // x and all values known, y holds g and grad_log_det h: cotangents of everything that the network computes. y becomes
  // what reaches x past the network; with `to_features` through() what reaches it through the network.
  void backward(bool to_features) {
    for (int64_t j = 0; j < net_.inputs[0].size(); ++j) {
      if (net_.spline) pull_spline(j, false);
      else
        run(BackwardTail<T>{.tail = tail_, .x = x() + j * lanes_, .h = grad_log_det_.data(), .n = lanes_,
                            .g = y() + j * lanes_, .shift = output(j, 0), .raw = output(j, 1)});
    }
    for (int64_t s = last() - 1; s >= 0; --s) {
      const int64_t units = net_.stages[s].layer.size();
      pull(s, 0, units, 0, true);
      finish_cotangent(s, 0, units);
    }
    if (to_features) pull(kFeatures, 0, net_.inputs[0].size(), 0, true);
  }

  // x and all values known, y holds g, grad_log_det h: y becomes v with J^T v = g - h dL/dx, J the Jacobian of the map at
  // x and L its log-determinant; cotangents are as in backward(), of v in place of g. The inverse's sweep, backwards.
  void solve() {
    const Layer& features = net_.inputs[0];
    for (int64_t s = 0; s < last(); ++s) {  // units that no feature uses
      const Layer& layer = net_.stages[s].layer;
      for (int64_t i = 0; i < layer.rest[net_.steps]; ++i) {
        std::fill_n(value(s, layer.down[i]), lanes_, T(0));
        if (net_.stages[s].gate || net_.stages[s].residual != kNone) std::fill_n(raw(s, layer.down[i]), lanes_, T(0));
      }
    }
    for (int64_t t1 = net_.steps, t0; t1 > 0; t1 = t0) {
      t0 = std::max<int64_t>(0, t1 - steps_a_block());
      pull(kFeatures, features.rest[t1], features.rest[t0], t1, true);
      for (int64_t s = last() - 1; s >= 0; --s) {
        const Layer& layer = net_.stages[s].layer;
        pull(s, layer.rest[t1], layer.rest[t0], t1, true);
      }
      for (int64_t t = t1 - 1; t >= t0; --t) {
        pull(kFeatures, features.rest[t + 1], features.rest[t], t1, false);
        for (int64_t i = features.rest[t + 1]; i < features.rest[t]; ++i) {
          const int64_t j = features.down[i];
          if (net_.spline) pull_spline(j, true);
          else
            run(SolveTail<T>{.tail = tail_, .x = x() + j * lanes_, .through = through(j), .h = grad_log_det_.data(),
                             .n = lanes_, .g = y() + j * lanes_, .shift = output(j, 0), .raw = output(j, 1)});
        }
        for (int64_t s = last() - 1; s >= 0; --s) {
          const Layer& layer = net_.stages[s].layer;
          pull(s, layer.rest[t + 1], layer.rest[t], t1, false);
          finish_cotangent(s, layer.rest[t + 1], layer.rest[t]);
        }
      }
    }
  }

 private:
  int64_t last() const { return net_.stages.size() - 1; }

  void place(T* tape) {
    raw_.clear();
    for (const Stage<T>& s : net_.stages) {
      raw_.push_back(tape);
      tape += s.layer.size() * lanes_;
    }
  }

  T* output(int64_t feature, int64_t p) { return raw(last(), net_.output_unit(feature, p)); }

  // Where a feature's spline finds the parameters of a tile: a row of lanes for each.
  spline::Layout spline_layout() const { return {lanes_, 0, 1, net_.output_stride() * lanes_}; }

  // Feature j of `known` to that of `wanted`, by the spline or its inverse.
  void apply_spline(int64_t j, bool inverse, const T* known, T* wanted) {
    static_assert(kMostGroups * kGroupLanes<T> <= spline::kBlock);
    spline::Spline spline = *net_.spline;
    spline.inverse = inverse;
    const spline::Layout layout = spline_layout();
    alignas(64) T logs[spline::kBlock];
    run(spline::Forward<T>{.spline = spline, .first = 0, .n = lanes_, .layout = layout, .parameters = output(j, 0),
                           .x = known + j * lanes_, .scratch = spline_scratch_.data(), .output = wanted + j * lanes_,
                           .logs = logs});
    for (int64_t i = 0; i < lanes_; ++i) log_det_.data()[i] += logs[i];
  }

  // What BackwardTail and, with `solves`, SolveTail do.
  void pull_spline(int64_t j, bool solves) {
    T* g = y() + j * lanes_;
    for (int64_t i = 0; i < lanes_ && solves; ++i) g[i] -= through(j)[i];
    const spline::Layout layout = spline_layout();
    run(spline::Backward<T>{.spline = *net_.spline, .first = 0, .n = lanes_, .layout = layout, .to = layout,
                            .grad = g, .grad_log = grad_log_det_.data(), .parameters = output(j, 0),
                            .x = x() + j * lanes_, .scratch = spline_scratch_.data(), .d_x = g,
                            .d_parameters = output(j, 0), .solves = solves});
  }

  // Wide enough for the large products, narrow enough that little is left to the step by step part.
  int64_t steps_a_block() const {
    constexpr int64_t kUnits = 64, kLeast = 4;
    return std::max(kLeast, kUnits * net_.steps / std::max<int64_t>(1, net_.widest));
  }

  void start(int64_t s, int64_t u0, int64_t u1) {
    const Stage<T>& stage = net_.stages[s];
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t unit = stage.layer.up[u];
      T* to = raw(s, unit);
      std::fill_n(to, lanes_, stage.bias ? stage.bias[unit] : T(0));
      if (stage.offset) accumulate(offset_[s].data() + unit * lanes_, to);
    }
  }

  // Adds to units u0..u1-1 what comes from sources before step t0 (`before`), or from all later ones that they see.
  void add(int64_t s, int64_t u0, int64_t u1, int64_t t0, bool before) {
    const Layer& layer = net_.stages[s].layer;
    for (const Term<T>& term : net_.stages[s].terms) {
      const Layer& source = net_.layer(term.source);
      const T* h = term.source == kFeatures ? x() : value(term.source, 0);
      const int64_t known = source.start[t0];
      products(layer.up.data(), u0, u1, term.counts, before ? 0 : known, before ? known : kAll, source.up.data(),
               term.weight, term.stride, 1, h, raw_[s]);
    }
  }

  // The same against the connections: into cotangents of values (or of features) from the stages that read them.
  void pull(int64_t source, int64_t i0, int64_t i1, int64_t t1, bool after) {
    const Layer& layer = net_.layer(source);
    T* to = source == kFeatures ? through_.data() : value(source, 0);
    for (int64_t i = i0; i < i1 && after; ++i) std::fill_n(to + layer.down[i] * lanes_, lanes_, T(0));
    for (int64_t s = last(); s > source; --s) {
      const int64_t known = net_.stages[s].layer.rest[t1];
      for (const Term<T>& term : net_.stages[s].terms)
        if (term.source == source)
          products(layer.down.data(), i0, i1, term.readers, after ? 0 : known, after ? known : kAll,
                   net_.stages[s].layer.down.data(), term.weight, 1, term.stride, cotangent(s, 0), to);
    }
  }

  void products(const int32_t* units, int64_t u0, int64_t u1, const std::vector<int64_t>& ends, int64_t begin,
                int64_t end, const int32_t* index, const T* weight, int64_t unit_stride, int64_t term_stride,
                const T* h, T* to) {
    run(StaircaseProduct<T>{.first = u0, .last = u1, .unit = units, .ends = ends.data(), .begin = begin, .end = end,
                            .index = index, .weight = weight, .unit_stride = unit_stride, .term_stride = term_stride,
                            .h = h, .lanes = lanes_, .to = to, .packed = false});
  }

  // Whether all units of a stage are asked for, and nothing but their own raw values enters.
  bool plain(const Stage<T>& stage, int64_t u0, int64_t u1) const {
    return u0 == 0 && u1 == stage.layer.size() && !stage.gate && stage.residual == kNone;
  }

  void finish(int64_t s, int64_t u0, int64_t u1) {
    const Stage<T>& stage = net_.stages[s];
    if (plain(stage, u0, u1)) return run(Activate<T>{stage.activation, raw(s, 0), u1 * lanes_, value(s, 0)});
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t unit = stage.layer.up[u];
      T* r = raw(s, unit);
      if (stage.gate) {
        std::copy_n(r, lanes_, ungated_[s].data() + unit * lanes_);
        multiply(gates_[s].data() + unit * lanes_, r);
      }
      if (stage.residual != kNone) accumulate(raw(stage.residual, unit), r);
      run(Activate<T>{stage.activation, r, lanes_, value(s, unit)});
    }
  }

  // From the cotangent of a unit's value to those of its raw value (kept in its place) and of what its weights gave.
  void finish_cotangent(int64_t s, int64_t i0, int64_t i1) {
    const Stage<T>& stage = net_.stages[s];
    const bool read = std::any_of(net_.stages.begin(), net_.stages.end(), [&](auto& r) { return r.residual == s; });
    if (plain(stage, i0, i1) && !read)
      return run(TimesDerivative<T>{stage.activation, raw(s, 0), i1 * lanes_, value(s, 0)});
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t unit = stage.layer.down[i];
      T *c = value(s, unit), *r = raw(s, unit);
      run(TimesDerivative<T>{stage.activation, r, lanes_, c});
      for (size_t reader = s + 1; reader < net_.stages.size(); ++reader)
        if (net_.stages[reader].residual == s) accumulate(raw(reader, unit), c);
      if (stage.gate || stage.residual != kNone) std::copy_n(c, lanes_, r);
      if (stage.gate) multiply(gates_[s].data() + unit * lanes_, c);
    }
  }

  void accumulate(const T* from, T* to) const {
    for (int64_t i = 0; i < lanes_; ++i) to[i] += from[i];
  }
  void multiply(const T* by, T* to) const {
    for (int64_t i = 0; i < lanes_; ++i) to[i] *= by[i];
  }

  const Network<T>& net_;
  Tail<T> tail_;
  int64_t lanes_;
  Scratch<T> x_, y_;
  Scratch<double> log_det_;
  Scratch<T> through_, grad_log_det_, least_;
  Scratch<T> tape_;  // raw values of all stages
  Scratch<T> spline_scratch_;
  std::vector<T*> raw_;
  std::vector<Scratch<T>> value_, offset_, gates_, ungated_;
};

// Narrow tiles for small batches, so that all threads have one.
template <class T>
int64_t tile_lanes(int64_t rows) {
  const int64_t groups = rows <= 2 * kGroupLanes<T> ? 1 : rows <= 4 * kGroupLanes<T> ? 2 : kMostGroups;
  return groups * kGroupLanes<T>;
}

// Rows of a batch with the last tile filled up.
template <class T>
int64_t tape_rows(int64_t rows) {
  const int64_t lanes = tile_lanes<T>(rows);
  return (rows + lanes - 1) / lanes * lanes;
}

}  // namespace hk
