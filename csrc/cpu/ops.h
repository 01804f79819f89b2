// The CPU operators, as registered.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace hk {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> gaussian_leapfrog(Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size,
                                             Tensor tempering);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_leapfrog_backward(
    MaybeTensor grad_z, MaybeTensor grad_rho, Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size,
    Tensor tempering, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_leapfrog_double_backward(
    MaybeTensor h_z, MaybeTensor h_rho, MaybeTensor h_precision, MaybeTensor h_loc, MaybeTensor h_step_size,
    MaybeTensor h_tempering, MaybeTensor grad_z, MaybeTensor grad_rho, Tensor z, Tensor rho, Tensor precision,
    Tensor loc, Tensor step_size, Tensor tempering, int64_t needs);

std::tuple<Tensor, Tensor> leapfrog_update(Tensor z, Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> leapfrog_update_backward(MaybeTensor grad_z, MaybeTensor grad_rho,
                                                                            Tensor rho, Tensor grad, Tensor decay,
                                                                            Tensor kick, Tensor drift, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> leapfrog_update_double_backward(
    MaybeTensor h_rho, MaybeTensor h_grad, MaybeTensor h_decay, MaybeTensor h_kick, MaybeTensor h_drift,
    MaybeTensor grad_z, MaybeTensor grad_rho, Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift,
    int64_t needs);

std::tuple<Tensor, Tensor> local_reparam_linear(Tensor x, Tensor weight_loc, Tensor weight_log_scale,
                                                MaybeTensor bias_loc, MaybeTensor bias_log_scale, Tensor noise);
std::tuple<Tensor, Tensor, Tensor> local_reparam_linear_backward(Tensor grad, Tensor x, Tensor weight_loc,
                                                                 Tensor weight_log_scale, Tensor noise, Tensor std,
                                                                 bool needs_x, bool needs_log_scale);

Tensor masked_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor in_degrees, Tensor out_degrees, bool strict);
Tensor masked_linear_input_grad(Tensor grad, Tensor weight, Tensor in_degrees, Tensor out_degrees, bool strict);
Tensor masked_linear_weight_grad(Tensor grad, Tensor x, Tensor in_degrees, Tensor out_degrees, bool strict);

// A masked network and its tail, as ops/autoregressive/network.py lays them out.
#define HK_NETWORK_PARAMETERS                                                                                     \
  std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> offsets, std::vector<Tensor> gates, \
      std::vector<Tensor> degrees, std::vector<int64_t> program, int64_t gate, double first, double second
#define HK_NETWORK                                                                                    \
  {std::move(weights), std::move(biases),  std::move(offsets), std::move(gates), std::move(degrees), \
   std::move(program), gate,               first,              second}

std::tuple<Tensor, Tensor> autoregressive_forward(Tensor x, HK_NETWORK_PARAMETERS);
std::tuple<Tensor, Tensor> autoregressive_inverse(Tensor y, HK_NETWORK_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor> autoregressive_training(Tensor x, HK_NETWORK_PARAMETERS);
std::tuple<Tensor, std::vector<Tensor>> autoregressive_backward(MaybeTensor grad, MaybeTensor grad_log_det, Tensor x,
                                                                Tensor tape, bool inverse, bool needs_known,
                                                                bool needs_parameters, HK_NETWORK_PARAMETERS);

std::tuple<Tensor, Tensor> affine_autoregressive(Tensor z, Tensor shift, Tensor log_scale, int64_t gate, double first,
                                                 double second);

std::tuple<Tensor, Tensor, Tensor> affine_autoregressive_backward(MaybeTensor grad_output,
                                                                  MaybeTensor grad_log_abs_det, Tensor z,
                                                                  MaybeTensor shift, Tensor log_scale, int64_t gate,
                                                                  double first, double second, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> affine_autoregressive_double_backward(
    MaybeTensor h_z, MaybeTensor h_shift, MaybeTensor h_log_scale, MaybeTensor grad_output,
    MaybeTensor grad_log_abs_det, Tensor z, MaybeTensor shift, Tensor log_scale, int64_t gate, double first,
    double second, int64_t needs);

Tensor bernoulli_log_prob(Tensor logits, Tensor value);
Tensor bernoulli_log_prob_backward(Tensor grad, Tensor logits, Tensor value);
std::tuple<Tensor, Tensor> bernoulli_log_prob_double_backward(Tensor h, Tensor grad, Tensor logits, Tensor value);

Tensor iwae(Tensor log_weights, int64_t power);
Tensor iwae_backward(Tensor grad, Tensor log_weights, int64_t power);

std::tuple<Tensor, Tensor, Tensor> planar_recursion(Tensor projections, Tensor table, double offset);
std::tuple<Tensor, Tensor> planar_recursion_backward(MaybeTensor grad_h, MaybeTensor grad_log_abs_det, Tensor h,
                                                     Tensor slope, Tensor table, double offset, bool needs_table);
Tensor planar_recursion_solve(Tensor constant, Tensor slope, Tensor table, bool transposed);

std::tuple<Tensor, Tensor> radial_flow(Tensor z, Tensor center, Tensor alpha, Tensor beta);
std::tuple<Tensor, Tensor, Tensor, Tensor> radial_flow_backward(MaybeTensor grad_output, MaybeTensor grad_log_abs_det,
                                                                Tensor z, Tensor center, Tensor alpha, Tensor beta);

bool rmsprop_step_(Tensor parameter, Tensor gradient, Tensor square_average, double learning_rate, double alpha,
                   double eps, double max_norm);

Tensor gaussian_mixture(Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities);
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_mixture_backward(Tensor grad, Tensor value, Tensor log_weight,
                                                                     Tensor loc, Tensor log_scale,
                                                                     bool responsibilities);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_mixture_double_backward(
    MaybeTensor h_value, MaybeTensor h_log_weight, MaybeTensor h_loc, MaybeTensor h_log_scale, Tensor grad,
    Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities);

}  // namespace hk
