// Runs the kernels of csrc/kernels on any machine, or emulator of one, that runs a C++ program: without torch.
//
//   driver            prints the instruction sets that this machine has
//   driver SET        reads calls from standard input, makes them in this set, writes what their arrays hold then
//
// A call is a kernel's name in the table below, a dtype and arguments in the order of the kernel's fields; check.py
// writes them. A new kernel is one row here and its cases in cases.py.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/kernels/affine_autoregressive.h"
#include "../../csrc/kernels/annealed_leapfrog.h"
#include "../../csrc/kernels/bernoulli_log_prob.h"
#include "../../csrc/kernels/draw.h"
#include "../../csrc/kernels/elementary.h"
#include "../../csrc/kernels/gaussian_leapfrog.h"
#include "../../csrc/kernels/gaussian_mixture.h"
#include "../../csrc/kernels/iwae.h"
#include "../../csrc/kernels/leapfrog_update.h"
#include "../../csrc/kernels/local_reparam_linear.h"
#include "../../csrc/kernels/autoregressive_network.h"
#include "../../csrc/kernels/planar_flow.h"
#include "../../csrc/kernels/planar_flow_amortised.h"
#include "../../csrc/kernels/radial_flow.h"
#include "../../csrc/kernels/rational_quadratic_spline.h"
#include "../../csrc/kernels/rmsprop.h"
#include "../../csrc/kernels/tile.h"

using namespace hk;

// ---- Calls ----

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "driver: %s\n", why.c_str());
  std::exit(1);
}

// What an argument is; arrays by their elements. check.py numbers them alike.
enum Code : int64_t { kInteger, kNumber, kNull, kFloat, kDouble, kInt32, kInt64, kByte };

template <class E>
constexpr Code code_of() {
  if constexpr (std::is_same_v<E, float>) return kFloat;
  else if constexpr (std::is_same_v<E, int32_t>) return kInt32;
  else if constexpr (std::is_same_v<E, int64_t>) return kInt64;
  else if constexpr (std::is_same_v<E, uint8_t>) return kByte;
  else return kDouble;  // or a struct of them
}
constexpr int64_t bytes_of(Code code) { return code == kByte ? 1 : code == kFloat || code == kInt32 ? 4 : 8; }

// An array lies between margins that no kernel may touch. It is aligned to a group of lanes if it consists of such, and
// otherwise no better than one element.
struct Argument {
  static constexpr int64_t kMargin = kGroupBytes;
  static constexpr unsigned char kUntouched = 0xa5;
  Code code;
  int64_t integer = 0, size = 0;  // size: in bytes
  double number = 0;
  std::vector<unsigned char> memory = {};

  int64_t before() const {
    const int64_t past_a_group = reinterpret_cast<uintptr_t>(memory.data()) % kGroupBytes;
    return kMargin + kGroupBytes - past_a_group + (size % kGroupBytes ? bytes_of(code) : 0);
  }
  unsigned char* data() { return memory.data() + before(); }
  void resize(int64_t elements) {
    size = elements * bytes_of(code);
    memory.assign(size + 2 * kMargin + 2 * kGroupBytes, kUntouched);
  }
  bool margins_hold() const {
    for (int64_t i = 0; i < int64_t(memory.size()); ++i)
      if ((i < before() || i >= before() + size) && memory[i] != kUntouched) return false;
    return true;
  }
};

struct Call {
  std::string name;
  Code dtype;
  std::vector<Argument> arguments;
  size_t used = 0;

  Argument& next() {
    if (used == arguments.size()) fail(name + ": too few arguments");
    return arguments[used++];
  }
  [[noreturn]] void unfit() const { fail(name + ": argument " + std::to_string(used) + " is of another kind"); }
};

// ---- Kernels from arguments ----

template <class K>
K filled(Call& call);

// What kernels hold by reference.
template <class A>
constexpr bool kReferred = std::is_same_v<A, leapfrog::Shape> || std::is_same_v<A, autoregressive::Chosen> ||
                           std::is_same_v<A, spline::Spline> || std::is_same_v<A, spline::Layout> ||
                           std::is_same_v<A, network::Tail<float>> || std::is_same_v<A, network::Tail<double>>;

// The next argument, as what the field is.
struct Next {
  Call& call;

  template <class E>
    requires std::is_arithmetic_v<E>
  operator E() const {
    const Argument& a = call.next();
    if (a.code != (std::is_floating_point_v<E> ? kNumber : kInteger)) call.unfit();
    return std::is_floating_point_v<E> ? static_cast<E>(a.number) : static_cast<E>(a.integer);
  }
  template <class P>
    requires std::is_pointer_v<P>
  operator P() const {
    Argument& a = call.next();
    if (a.code == kNull) return nullptr;
    if (a.code != code_of<std::remove_cv_t<std::remove_pointer_t<P>>>()) call.unfit();
    return reinterpret_cast<P>(a.data());
  }
  template <class A>
    requires kReferred<A>
  operator const A&() const {
    static std::deque<A> held;  // a kernel may refer to several
    return held.emplace_back(filled<A>(call));
  }
};

// How many fields K has, those of structs in it counted each.
template <class K, size_t... i>
constexpr bool takes(std::index_sequence<i...>) {
  return requires(Next next) { K{(void(i), next)...}; };
}
constexpr size_t kMostFields = 48;

template <class K, size_t n = kMostFields>
constexpr size_t fields() {
  static_assert(!takes<K>(std::make_index_sequence<kMostFields>()));
  if constexpr (takes<K>(std::make_index_sequence<n>())) return n;
  else return fields<K, n - 1>();
}

template <class K, size_t... i>
K filled_with(Call& call, std::index_sequence<i...>) {
  return K{(void(i), Next{call})...};
}
template <class K>
K filled(Call& call) {
  return filled_with<K>(call, std::make_index_sequence<fields<K>()>());
}

// A kernel's result becomes one more array.
template <class K>
void make(Call& call) {
  const K kernel = filled<K>(call);
  if (call.used != call.arguments.size()) fail(call.name + ": too many arguments");
  if constexpr (std::is_void_v<decltype(run(kernel))>) {
    run(kernel);
  } else {
    const double result = run(kernel);
    call.arguments.push_back({.code = kDouble});
    call.arguments.back().resize(1);
    std::memcpy(call.arguments.back().data(), &result, sizeof(result));
  }
}

// ---- The table ----

struct Row {
  void (*in_float)(Call&);
  void (*in_double)(Call&);
};
template <template <class> class Kernel>
constexpr Row row() {
  return {make<Kernel<float>>, make<Kernel<double>>};
}

// Kernels that are for other than one type, and functions that are no kernels.
template <class T> using ChainBackward = leapfrog::ChainBackward<double, T>;
template <class T> using ChainBackwardOfDuals = leapfrog::ChainBackward<Dual, T>;
template <class T> using BernoulliForward = bernoulli::Forward<T, T>;
template <class T> using BernoulliBackward = bernoulli::Backward<T, T>;
template <class T> using BernoulliDoubleBackward = bernoulli::DoubleBackward<T, T>;
template <class T> using BitsForward = bernoulli::Forward<T, uint8_t>;
template <class T> using BitsBackward = bernoulli::Backward<T, uint8_t>;
template <class T> using BitsDoubleBackward = bernoulli::DoubleBackward<T, uint8_t>;
template <class T> using MixtureBackward = mixture::Backward<false, T>;
template <class T> using MixtureDoubleBackward = mixture::Backward<true, T>;

template <class T> using PlanarBackward = planar::Backward;

template <class T>
struct IwaeResults {
  iwae_columns::Sums<T> sums;
  int64_t samples, n, power;
  T* to;
  HK_INLINE void operator()(auto) const { iwae_columns::results(sums, samples, n, power, to); }
};

template <class T, class V>
struct AreProbabilities {
  int64_t n;
  const V* value;
  T* to;
  HK_INLINE void operator()(auto set) const { *to = bernoulli::AreProbabilities<V>{n, value}(set); }
};
template <class T> using FractionsAreProbabilities = AreProbabilities<T, T>;
template <class T> using BitsAreProbabilities = AreProbabilities<T, uint8_t>;

template <auto function>
struct Each {
  template <class T>
  struct Loop {
    int64_t n;
    const T* from;
    T* to;
    HK_INLINE void operator()(auto) const {
      for (int64_t i = 0; i < n; ++i) to[i] = function(from[i]);
    }
  };
};

#define ROW(kernel) {#kernel, row<kernel>()}
#define FUNCTION(name, function) \
  {name, row<Each<[](auto x) __attribute__((always_inline)) { return function(x); }>::template Loop>()}
#define ACTIVATION(name, kind) \
  FUNCTION(name, activation::kind::value), FUNCTION(name "_derivative", activation::kind::derivative)

const std::map<std::string, Row> kRows = {
    FUNCTION("exponential", exponential),
    FUNCTION("exp_nonpositive", exp_nonpositive),
    FUNCTION("exp_normal", exp_normal),
    FUNCTION("expm1_nonpositive", expm1_nonpositive),
    FUNCTION("log1p_unit", log1p_unit),
    FUNCTION("log1p_nonnegative", log1p_nonnegative),
    FUNCTION("logarithm", logarithm),
    FUNCTION("error_function", error_function),
    ACTIVATION("relu", Relu),
    ACTIVATION("elu", Elu),
    ACTIVATION("tanh", Tanh),
    ACTIVATION("softplus", Softplus),
    ACTIVATION("sigmoid", Sigmoid),
    ACTIVATION("gelu", Gelu),
    ACTIVATION("silu", Silu),
    ROW(leapfrog::Compose),
    ROW(ChainBackward),
    ROW(ChainBackwardOfDuals),
    ROW(leapfrog::Forward),
    ROW(leapfrog::Backward),
    ROW(leapfrog::DoubleBackward),
    ROW(update::Forward),
    ROW(update::Backward),
    ROW(update::DoubleBackward),
    ROW(annealed::Forward),
    ROW(annealed::LongForward),
    ROW(annealed::Backward),
    ROW(autoregressive::Forward),
    ROW(autoregressive::Backward),
    ROW(autoregressive::DoubleBackward),
    ROW(FractionsAreProbabilities),
    ROW(BitsAreProbabilities),
    ROW(BernoulliForward),
    ROW(BernoulliBackward),
    ROW(BernoulliDoubleBackward),
    ROW(BitsForward),
    ROW(BitsBackward),
    ROW(BitsDoubleBackward),
    ROW(mixture::Forward),
    ROW(mixture::Weights),
    ROW(mixture::Slopes),
    ROW(mixture::WeightsAndSlopes),
    ROW(MixtureBackward),
    ROW(MixtureDoubleBackward),
    ROW(mixture::Inverse),
    ROW(mixture::Flush),
    ROW(iwae_columns::ColumnSums),
    ROW(iwae_columns::Join),
    ROW(iwae_columns::Gradient),
    ROW(IwaeResults),
    ROW(planar::Project),
    ROW(planar::Combine),
    ROW(planar::SumOverRows),
    ROW(planar::StoreRows),
    ROW(planar::Prepare),
    ROW(planar::LayerGradient),
    ROW(planar::Forward),
    ROW(PlanarBackward),
    ROW(planar::Solve),
    ROW(planar::AmortisedForward),
    ROW(planar::AmortisedBackward),
    ROW(radial::Forward),
    ROW(radial::Backward),
    ROW(spline::Forward),
    ROW(spline::Backward),
    ROW(spline::DoubleBackward),
    ROW(draw::Sample),
    ROW(rmsprop::SumOfSquares),
    ROW(rmsprop::Update),
    ROW(local_reparam::Square),
    ROW(local_reparam::Variance),
    ROW(local_reparam::Sample),
    ROW(local_reparam::VarianceGrad),
    ROW(local_reparam::AddProduct),
    ROW(local_reparam::Multiply),
    ROW(StaircaseProduct),
    ROW(Transpose),
    ROW(network::Activate),
    ROW(network::TimesDerivative),
    ROW(network::RowSums),
    ROW(network::ApplyTail),
    ROW(network::InvertTail),
    ROW(network::BackwardTail),
    ROW(network::SolveTail),
};

// ---- Reading and writing, in this machine's byte order ----

bool read(void* to, int64_t size) { return std::fread(to, 1, size, stdin) == size_t(size); }

template <class T>
T read() {
  T value;
  if (!read(&value, sizeof(value))) fail("the input ends within a call");
  return value;
}

Argument read_argument() {
  Argument a{.code = static_cast<Code>(read<int64_t>())};
  if (a.code == kInteger) a.integer = read<int64_t>();
  else if (a.code == kNumber) a.number = read<double>();
  else if (a.code != kNull) {
    a.resize(read<int64_t>());
    if (!read(a.data(), a.size)) fail("the input ends within an array");
  }
  return a;
}

bool read_call(Call& call) {
  int64_t length;
  if (!read(&length, sizeof(length))) return false;
  call.name.resize(length);
  if (!read(call.name.data(), length)) fail("the input ends within a name");
  call.dtype = static_cast<Code>(read<int64_t>());
  for (int64_t i = read<int64_t>(); i > 0; --i) call.arguments.push_back(read_argument());
  return true;
}

void write_arrays(Call& call) {
  for (Argument& a : call.arguments) {
    if (!a.margins_hold()) fail(call.name + ": wrote beyond an array");
    if (a.size && std::fwrite(a.data(), 1, a.size, stdout) != size_t(a.size)) fail("cannot write");
  }
}

int main(int argc, char** argv) {
  int set = 0;
  for (; set < kSets; ++set) {
    const char* reason = why_not(static_cast<SetId>(set));
    if (argc < 2 && !reason) std::puts(kSetNames[set]);
    if (argc < 2 || std::strcmp(argv[1], kSetNames[set])) continue;
    if (reason) fail(std::string(argv[1]) + ": " + reason);
    break;
  }
  if (argc < 2) return 0;
  if (set == kSets) fail(std::string("no such instruction set: ") + argv[1]);
  chosen_set = static_cast<SetId>(set);
  for (Call call; read_call(call); call = {}) {
    const auto found = kRows.find(call.name);
    if (found == kRows.end()) fail("no such kernel: " + call.name);
    (call.dtype == kFloat ? found->second.in_float : found->second.in_double)(call);
    write_arrays(call);
  }
}
