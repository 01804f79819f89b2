// Autoregressive maps y = scale(x) x + weight(x) shift(x) on the CPU: the map, its inverse, and the solve with its
// transposed Jacobian, each in one pass through the network's connections.
#include "../kernels/network.h"

#include <atomic>

#include "network.h"

namespace hk {
namespace {

using network::Tail;

constexpr int64_t kTerms = 512, kColumnTerms = 96, kAll = std::numeric_limits<int64_t>::max();

// ---- Element-wise rows, in the widest instruction set ----

#define HK_NETWORK_CLONES(T)                                                                                          \
  HK_CLONES void activate(int64_t code, const T* raw, int64_t n, T* value) { network::activate(code, raw, n, value); }\
  HK_CLONES void times_derivative(int64_t code, const T* raw, int64_t n, T* grad) {                                   \
    network::times_derivative(code, raw, n, grad);                                                                    \
  }                                                                                                                   \
  HK_CLONES void apply_tail(const Tail<T>& tail, const T* x, const T* shift, const T* raw, int64_t n, T* y,         \
                            double* log_det) {                                                                        \
    network::apply_tail(tail, x, shift, raw, n, y, log_det);                                                          \
  }                                                                                                                   \
  HK_CLONES void invert_tail(const Tail<T>& tail, const T* y, const T* shift, const T* raw, int64_t n, T* x,          \
                             double* log_det, T* least) {                                                             \
    network::invert_tail(tail, y, shift, raw, n, x, log_det, least);                                                  \
  }                                                                                                                   \
  HK_CLONES void solve_tail(const Tail<T>& tail, const T* x, const T* through, const T* h, int64_t n, T* g,         \
                            T* shift, T* raw) {                                                                       \
    network::solve_tail(tail, x, through, h, n, g, shift, raw);                                                       \
  }

HK_NETWORK_CLONES(float)
HK_NETWORK_CLONES(double)

// ---- One tile of samples ----

template <class T>
class Sweep {
 public:
  Sweep(const Network<T>& net, const NetworkArguments& a, int64_t vectors)
      : net_(net), tail_{a.gate, static_cast<T>(a.first), static_cast<T>(a.second)}, vectors_(vectors),
        lanes_(vectors * kVectorLanes<T>), x_(net.inputs[0].size() * lanes_), y_(net.inputs[0].size() * lanes_),
        log_det_(lanes_), through_(net.inputs[0].size() * lanes_),
        grad_log_det_(lanes_), least_(lanes_) {
    for (const Stage<T>& s : net.stages) {
      raw_.emplace_back(s.layer.size() * lanes_);
      value_.emplace_back(s.layer.size() * lanes_);
      offset_.emplace_back(s.offset ? s.layer.size() * lanes_ : 0);
      gates_.emplace_back(s.gate ? s.layer.size() * lanes_ : 0);
    }
  }

  // Where the tile's known and wanted rows lie.
  T* x() { return x_.data(); }
  T* y() { return y_.data(); }
  T* grad_log_det() { return grad_log_det_.data(); }
  const T* outputs() { return output(0); }
  // Whether a scale of the first n samples underflowed.
  bool underflowed(int64_t n) const {
    return std::any_of(least_.data(), least_.data() + n, [](T s) { return s < std::numeric_limits<T>::min(); });
  }
  const double* log_det() const { return log_det_.data(); }
  int64_t lanes() const { return lanes_; }

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

  // x known, y wanted.
  void forward() {
    evaluate(net_.steps);
    const int64_t features = net_.inputs[0].size();
    for (int64_t j = 0; j < features; ++j)
      apply_tail(tail_, x() + j * lanes_, output(net_.shift_unit(j)), output(net_.scale_unit(j)),
                 lanes_, y() + j * lanes_, log_det_.data());
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
          invert_tail(tail_, y() + j * lanes_, output(net_.shift_unit(j)),
                      output(net_.scale_unit(j)), lanes_, x() + j * lanes_, log_det_.data(), least_.data());
        }
      }
    }
  }

  // x known, y holds g, grad_log_det h: y becomes v with J^T v = g - h dL/dx, J the Jacobian of the map at x and L its
  // log-determinant; the outputs become their cotangents. The same sweep, backwards.
  void solve() {
    const Layer& features = net_.inputs[0];
    const int64_t last = net_.stages.size() - 1;
    evaluate(net_.steps);
    for (int64_t s = 0; s < last; ++s) {  // units that no feature uses
      const Layer& layer = net_.stages[s].layer;
      for (int64_t i = 0; i < layer.rest[net_.steps]; ++i) {
        std::fill_n(cotangent(s, layer.down[i]), lanes_, T(0));
        std::fill_n(raw(s, layer.down[i]), lanes_, T(0));  // another stage's residual may ask for it
      }
    }
    for (int64_t t1 = net_.steps, t0; t1 > 0; t1 = t0) {
      t0 = std::max<int64_t>(0, t1 - steps_a_block());
      pull(kFeatures, features.rest[t1], features.rest[t0], t1, true);
      for (int64_t s = last - 1; s >= 0; --s) {
        const Layer& layer = net_.stages[s].layer;
        pull(s, layer.rest[t1], layer.rest[t0], t1, true);
      }
      for (int64_t t = t1 - 1; t >= t0; --t) {
        pull(kFeatures, features.rest[t + 1], features.rest[t], t1, false);
        for (int64_t i = features.rest[t + 1]; i < features.rest[t]; ++i) {
          const int64_t j = features.down[i];
          solve_tail(tail_, x() + j * lanes_, through(j), grad_log_det_.data(), lanes_, y() + j * lanes_,
                     output(net_.shift_unit(j)), output(net_.scale_unit(j)));
        }
        for (int64_t s = last - 1; s >= 0; --s) {
          const Layer& layer = net_.stages[s].layer;
          pull(s, layer.rest[t + 1], layer.rest[t], t1, false);
          finish_cotangent(s, layer.rest[t + 1], layer.rest[t]);
        }
      }
    }
  }

 private:
  T* raw(int64_t s, int64_t unit) { return raw_[s].data() + unit * lanes_; }
  T* value(int64_t s, int64_t unit) { return value_[s].data() + unit * lanes_; }
  T* output(int64_t unit) { return raw(net_.stages.size() - 1, unit); }
  T* through(int64_t feature) { return through_.data() + feature * lanes_; }
  // Backwards: a unit's cotangent before its weight (and gate), in the place of its value.
  T* cotangent(int64_t s, int64_t unit) { return value(s, unit); }

  // Wide enough for the large products, narrow enough that little is left to the step by step part.
  int64_t steps_a_block() const {
    constexpr int64_t kUnits = 64, kLeast = 4;
    return std::max(kLeast, kUnits * net_.steps / std::max<int64_t>(1, net_.widest));
  }

  void evaluate(int64_t steps) {
    for (size_t s = 0; s < net_.stages.size(); ++s) {
      const int64_t units = net_.stages[s].layer.start[steps];
      start(s, 0, units);
      add(s, 0, units, steps, true);
      finish(s, 0, units);
    }
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
      products(layer.up.data(), u0, u1, term.counts, before ? 0 : known, before ? known : kAll, kTerms,
               source.up.data(), term.weight, term.stride, 1, h, raw_[s].data());
    }
  }

  // The same against the connections: into cotangents of values (or of features) from the stages that read them.
  void pull(int64_t source, int64_t i0, int64_t i1, int64_t t1, bool after) {
    const Layer& layer = net_.layer(source);
    const int64_t last = net_.stages.size() - 1;
    T* to = source == kFeatures ? through_.data() : value(source, 0);
    for (int64_t i = i0; i < i1 && after; ++i) std::fill_n(to + layer.down[i] * lanes_, lanes_, T(0));
    for (int64_t s = last; s > source; --s) {
      const Layer& reader = net_.stages[s].layer;
      const T* h = s == last ? raw(s, 0) : cotangent(s, 0);
      for (const Term<T>& term : net_.stages[s].terms)
        if (term.source == source)
          products(layer.down.data(), i0, i1, term.readers, after ? 0 : reader.rest[t1], after ? reader.rest[t1] : kAll,
                   kColumnTerms, reader.down.data(), term.weight, 1, term.stride, h, to);
    }
  }

  void products(const int32_t* units, int64_t u0, int64_t u1, const std::vector<int64_t>& ends, int64_t begin,
                int64_t end, int64_t terms, const int32_t* index, const T* weight, int64_t unit_stride,
                int64_t source_stride, const T* h, T* to) {
    if (u0 >= u1) return;
    end = std::min(end, ends[u1 - 1]);
    for (int64_t at = begin; at < end; at += terms)
      for (int64_t u = u0; u < u1; u += kMostUnits) {
        const int64_t n = std::min(kMostUnits, u1 - u);
        if (ends[u + n - 1] <= at) continue;
        const T* w[kMostUnits];
        T* out[kMostUnits];
        for (int64_t i = 0; i < n; ++i) {
          w[i] = weight + units[u + i] * unit_stride;
          out[i] = to + units[u + i] * lanes_;
        }
        tile({at, std::min(end, at + terms), ends.data() + u, index, source_stride, lanes_, w, h, out, vectors_}, n);
      }
  }

  void finish(int64_t s, int64_t u0, int64_t u1) {
    const Stage<T>& stage = net_.stages[s];
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t unit = stage.layer.up[u];
      T* r = raw(s, unit);
      if (stage.gate) multiply(gates_[s].data() + unit * lanes_, r);
      if (stage.residual != kNone) accumulate(raw(stage.residual, unit), r);
      activate(stage.activation, r, lanes_, value(s, unit));
    }
  }

  // From the cotangent of a unit's value to those of its raw value (kept in its place) and of what its weights gave.
  void finish_cotangent(int64_t s, int64_t i0, int64_t i1) {
    const Stage<T>& stage = net_.stages[s];
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t unit = stage.layer.down[i];
      T *c = cotangent(s, unit), *r = raw(s, unit);
      times_derivative(stage.activation, r, lanes_, c);
      for (size_t reader = s + 1; reader < net_.stages.size(); ++reader)
        if (net_.stages[reader].residual == s) accumulate(raw(reader, unit), c);
      std::copy_n(c, lanes_, r);
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
  int64_t vectors_, lanes_;
  Scratch<T> x_, y_;
  Scratch<double> log_det_;
  Scratch<T> through_, grad_log_det_, least_;
  std::vector<Scratch<T>> raw_, value_, offset_, gates_;
};

// ---- The three operators ----

enum class Task { kForward, kInverse, kSolve };

// Narrow tiles for small batches, so that all threads have one.
template <class T>
int64_t vectors_of(int64_t rows) {
  if (rows <= 2 * kVectorLanes<T>) return 1;
  return rows <= 4 * kVectorLanes<T> ? 2 : kMostVectors;
}

// What a task reads and writes besides the network: known (rows, d) into wanted (rows, d). A map also writes log_det
// (rows); a solve reads the cotangents grad (rows, d) and grad_log_det (rows) and writes those of the network's outputs.
template <class T>
struct Ends {
  const T *known, *grad, *grad_log_det;
  T *wanted, *log_det, *outputs;
};

template <class T>
bool run_tile(Sweep<T>& sweep, Task task, const Ends<T>& ends, int64_t row, int64_t n, int64_t features) {
  const int64_t lanes = sweep.lanes();
  const bool inverse = task == Task::kInverse;
  const auto load = [&](const T* from, int64_t width, T* to) {
    if (from) into_tile(from + row * width, width, n, width, lanes, to);
    else std::fill_n(to, width * lanes, T(0));
  };
  sweep.load_context(row, n);
  load(ends.known, features, inverse ? sweep.y() : sweep.x());
  if (task == Task::kSolve) {
    load(ends.grad, features, sweep.y());
    load(ends.grad_log_det, 1, sweep.grad_log_det());
    sweep.solve();
    transposed(sweep.outputs(), lanes, 2 * features, n, ends.outputs + row * 2 * features, 2 * features);
  } else {
    if (inverse) sweep.inverse();
    else sweep.forward();
    std::copy_n(sweep.log_det(), n, ends.log_det + row);
  }
  transposed(inverse ? sweep.x() : sweep.y(), lanes, features, n, ends.wanted + row * features, features);
  return !inverse || !sweep.underflowed(n);
}

template <class T>
void run(const NetworkArguments& a, Task task, const Tensor& known, const MaybeTensor& grad,
         const MaybeTensor& grad_log_det, const Tensor& wanted, const Tensor& second) {
  const int64_t rows = known.size(0), features = known.size(1);
  const Network<T> net(a, features, rows);
  const int64_t vectors = vectors_of<T>(rows), lanes = vectors * kVectorLanes<T>, tiles = (rows + lanes - 1) / lanes;
  const Ends<T> ends{static_cast<const T*>(known.const_data_ptr()), data<T>(grad), data<T>(grad_log_det),
                     written<T>(wanted), written<T>(second), written<T>(second)};
  std::atomic<bool> sound{true};
  torch::stable::parallel_for(0, tiles, grain_for(tiles, rows * net.connections), [&](int64_t begin, int64_t end) {
    Sweep<T> sweep(net, a, vectors);
    for (int64_t t = begin; t < end; ++t)
      if (!run_tile(sweep, task, ends, t * lanes, std::min(lanes, rows - t * lanes), features)) sound = false;
  });
  STD_TORCH_CHECK(sound, "autoregressive_inverse: a scale underflowed to 0, so the map has no inverse: use a gate with a "
                         "bounded scale, as clipped, soft-clipped, softplus or shifted-sigmoid");
}

std::tuple<Tensor, Tensor> map(Task task, const Tensor& known, const NetworkArguments& a) {
  STD_TORCH_CHECK(known.dim() == 2, "autoregressive network: known values must be a matrix");
  Tensor wanted = empty_for(known, true), log_det = empty_of({known.size(0)}, known);
  HK_DISPATCH("autoregressive network", known, run, a, task, packed(known), {}, {}, wanted, log_det);
  return {wanted, log_det};
}

}  // namespace

#define HK_NETWORK                                                                                                    \
  {std::move(weights), std::move(biases), std::move(offsets), std::move(gates), std::move(degrees),                   \
   std::move(program), gate, first, second}

std::tuple<Tensor, Tensor> autoregressive_forward(Tensor x, HK_NETWORK_PARAMETERS) {
  return map(Task::kForward, x, HK_NETWORK);
}

std::tuple<Tensor, Tensor> autoregressive_inverse(Tensor y, HK_NETWORK_PARAMETERS) {
  return map(Task::kInverse, y, HK_NETWORK);
}

std::tuple<Tensor, Tensor> autoregressive_solve(MaybeTensor grad, MaybeTensor grad_log_det, Tensor x,
                                                HK_NETWORK_PARAMETERS) {
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type(); };
  STD_TORCH_CHECK(x.dim() == 2 && (!grad || (same_shape(*grad, x) && fits(*grad))) &&
                      (!grad_log_det || (grad_log_det->dim() == 1 && grad_log_det->size(0) == x.size(0) &&
                                         fits(*grad_log_det))),
                  "autoregressive network: cotangents and x do not fit");
  Tensor solution = empty_for(x, true), outputs = empty_of({x.size(0), 2 * x.size(1)}, x);
  const NetworkArguments a HK_NETWORK;
  HK_DISPATCH("autoregressive network", x, run, a, Task::kSolve, packed(x), packed(grad), packed(grad_log_det),
              solution, outputs);
  return {solution, outputs};
}

}  // namespace hk
