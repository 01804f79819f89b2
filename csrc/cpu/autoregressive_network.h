// A masked network (MADE) as a list of stages, ready to be evaluated unit by unit in order of degree.
#pragma once

#include <array>

#include "../kernels/autoregressive_network.h"
#include "../kernels/rational_quadratic_spline.h"
#include "tile.h"

namespace hk {

// What the Python side passes; ops/autoregressive_network/network.py tells the same.
struct NetworkArguments {
  std::vector<Tensor> weights, biases, offsets, gates, degrees;
  std::vector<int64_t> program;
  std::vector<int64_t> tail;    // a gate's code; of a spline kSplineTail, bins, tails, style
  std::vector<double> numbers;  // of the gate, or of the spline in the order of its op's schema
};

constexpr int64_t kSplineTail = -1;

// The same as the parameters of an operator.
#define HK_NETWORK_PARAMETERS                                                                                     \
  std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> offsets, std::vector<Tensor> gates, \
      std::vector<Tensor> degrees, std::vector<int64_t> program, std::vector<int64_t> tail, std::vector<double> numbers
#define HK_NETWORK                                                                                    \
  {std::move(weights), std::move(biases),  std::move(offsets), std::move(gates), std::move(degrees), \
   std::move(program), std::move(tail),    std::move(numbers)}

// Connections to one source: unit u (ascending degree) sees the source's first counts[u] units (ascending), and source
// unit i (descending degree) is seen by the first readers[i] units (descending).
template <class T>
struct Term {
  int64_t source, index;  // kFeatures or a stage; which of the weights
  const T* weight;
  int64_t stride;
  std::vector<int64_t> counts, readers;
};

constexpr int64_t kFeatures = -1, kNone = -1;

// Units, or features, in ascending and descending order of degree. At step t of the sweep through the features, the
// units that see t levels of them are computed, then the features of level t.
struct Layer {
  std::vector<int64_t> degrees;
  std::vector<int32_t> up, down;
  std::vector<int64_t> start, rest;  // units before step t in `up`; units at or after step t in `down`

  Layer(std::vector<int64_t> d, const std::vector<int64_t>& levels, bool features)
      : degrees(std::move(d)), up(by_degree(degrees)), down(by_degree(reversed(degrees))) {
    const int64_t steps = levels.size();
    start.assign(steps + 2, 0);
    for (int64_t degree : degrees) {
      // A unit sees the levels of degree <= its own; a feature belongs to its own level.
      const auto at = features ? std::lower_bound(levels.begin(), levels.end(), degree)
                               : std::upper_bound(levels.begin(), levels.end(), degree);
      ++start[at - levels.begin() + 1];
    }
    for (int64_t t = 0; t <= steps; ++t) start[t + 1] += start[t];
    rest.resize(steps + 2);
    for (int64_t t = 0; t <= steps + 1; ++t) rest[t] = size() - start[t];
  }

  int64_t size() const { return degrees.size(); }
};

template <class T>
struct Stage {
  Layer layer;
  std::vector<Term<T>> terms;
  int64_t residual, activation;
  const T *bias, *offset, *gate;  // (units), (rows, units), (rows, units), or null
};

template <class T>
class Network {
 public:
  explicit Network(const NetworkArguments& a, int64_t features, int64_t rows) {
    const int64_t n = a.degrees.size() - 1;
    check(n >= 1 && a.program.size() == size_t(kLayout + kWords * n));
    check(a.biases.size() == size_t(n) && a.offsets.size() == size_t(n) && a.gates.size() == size_t(n));
    std::vector<int64_t> levels = degrees_of(a.degrees[0]);
    check(int64_t(levels.size()) == features);
    inputs.emplace_back(levels, unique(levels), true);
    levels = unique(levels);
    steps = levels.size();
    for (int64_t s = 0; s < n; ++s) {
      const int64_t* word = a.program.data() + kLayout + kWords * s;
      Stage<T> stage{Layer(degrees_of(a.degrees[s + 1]), levels, false), {}, word[1], word[2],
                     optional(a.biases[s], 1, 0, s, a), optional(a.offsets[s], 2, rows, s, a),
                     optional(a.gates[s], 2, rows, s, a)};
      stages.push_back(std::move(stage));
      check(word[0] >= kFeatures && word[0] < s && word[1] >= kNone && word[1] < s);
      add_term(s, word[0], a.weights, s);
      if (word[3] != kNone) add_term(s, kFeatures, a.weights, word[3]);
      check(word[1] == kNone || stages[word[1]].layer.size() == stages[s].layer.size());
    }
    const int64_t* at = a.program.data();  // first unit and step of a feature's first parameter and of its second
    outputs = {at[0], at[1], at[2] - at[0]};
    check(at[1] == at[3]);
    read_tail(a);
    for (const Stage<T>& s : stages) {
      widest = std::max(widest, s.layer.size());
      units += s.layer.size();
      gated |= s.gate != nullptr;
    }
    // The outputs are the last stage's raw values.
    const int64_t P = parameters(), units_of_last = P * features;
    check(stages.back().layer.size() == units_of_last && stages.back().activation == 0 && !stages.back().gate);
    for (int64_t p : {int64_t{0}, P - 1})
      for (int64_t j : {int64_t{0}, features - 1})
        check(features == 0 || (output_unit(j, p) >= 0 && output_unit(j, p) < units_of_last));
  }

  const Layer& layer(int64_t source) const { return source == kFeatures ? inputs[0] : stages[source].layer; }
  // A feature's parameters: the shift and the raw scale of an affine tail, or those of a spline.
  int64_t parameters() const { return spline ? spline->parameters() : 2; }
  int64_t output_unit(int64_t feature, int64_t p) const { return outputs[0] + outputs[1] * feature + outputs[2] * p; }
  int64_t output_stride() const { return outputs[2]; }

  std::vector<Layer> inputs;
  std::vector<Stage<T>> stages;
  std::optional<spline::Spline> spline;  // the tail, where it is one
  int64_t gate = 0;                      // otherwise
  double first = 0, second = 0;
  int64_t steps, widest = 0, units = 0, connections = 0;
  bool gated = false;

 private:
  static constexpr int64_t kLayout = 4, kWords = 4;
  std::array<int64_t, 3> outputs;  // the first unit, a step for each feature, a stride for each parameter

  static void check(bool fits) { STD_TORCH_CHECK(fits, "autoregressive network: shapes or dtypes do not fit"); }

  void read_tail(const NetworkArguments& a) {
    const auto &tail = a.tail;
    const auto &n = a.numbers;
    check(!tail.empty());
    if (tail[0] != kSplineTail) {
      check(tail.size() == 1 && n.size() == 2 && tail[0] >= 0 && tail[0] < autoregressive::kGates);
      gate = tail[0], first = n[0], second = n[1];
      return;
    }
    check(tail.size() == 4 && n.size() == 8 && tail[1] >= 2);
    spline = {tail[1], tail[2], tail[3], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], false};
  }

  static std::vector<int64_t> degrees_of(const Tensor& t) {
    check(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous());
    const int64_t* values = static_cast<const int64_t*>(t.const_data_ptr());
    return {values, values + t.numel()};
  }

  static std::vector<int64_t> unique(std::vector<int64_t> values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
  }

  // An absent tensor is an empty one.
  static const T* optional(const Tensor& t, int64_t dim, int64_t rows, int64_t s, const NetworkArguments& a) {
    if (t.numel() == 0) return nullptr;
    check(t.dim() == dim && t.is_contiguous() && sizeof(T) == t.element_size());
    check(t.size(dim - 1) == a.degrees[s + 1].size(0) && (dim == 1 || t.size(0) == rows));
    return static_cast<const T*>(t.const_data_ptr());
  }

  void add_term(int64_t s, int64_t source, const std::vector<Tensor>& weights, int64_t index) {
    check(index >= 0 && index < int64_t(weights.size()));
    const Tensor& w = weights[index];
    const Layer &from = layer(source), &to = stages[s].layer;
    check(w.dim() == 2 && w.size(0) == to.size() && w.size(1) == from.size() && sizeof(T) == w.element_size());
    check(w.size(1) <= 1 || w.stride(1) == 1);
    connections += to.size() * from.size();
    stages[s].terms.push_back({source, index, static_cast<const T*>(w.const_data_ptr()), w.stride(0),
                               visible(to.degrees, to.up, from.degrees, from.up, false),
                               visible(reversed(from.degrees), from.down, reversed(to.degrees), to.down, false)});
  }
};

}  // namespace hk
