// Module init and the operator registrations, nothing else. Schemas live in Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("affine_autoregressive.cpp", TORCH_BOX(&hk::affine_autoregressive));
  m.impl("affine_autoregressive_backward.cpp", TORCH_BOX(&hk::affine_autoregressive_backward));
  m.impl("affine_autoregressive_double_backward.cpp", TORCH_BOX(&hk::affine_autoregressive_double_backward));
  m.impl("bernoulli_log_prob.cpp", TORCH_BOX(&hk::bernoulli_log_prob));
  m.impl("bernoulli_log_prob_backward.cpp", TORCH_BOX(&hk::bernoulli_log_prob_backward));
  m.impl("bernoulli_log_prob_double_backward.cpp", TORCH_BOX(&hk::bernoulli_log_prob_double_backward));
  m.impl("gaussian_leapfrog.cpp", TORCH_BOX(&hk::gaussian_leapfrog));
  m.impl("gaussian_leapfrog_backward.cpp", TORCH_BOX(&hk::gaussian_leapfrog_backward));
  m.impl("gaussian_leapfrog_double_backward.cpp", TORCH_BOX(&hk::gaussian_leapfrog_double_backward));
  m.impl("iwae.cpp", TORCH_BOX(&hk::iwae));
  m.impl("iwae_backward.cpp", TORCH_BOX(&hk::iwae_backward));
  m.impl("leapfrog_update.cpp", TORCH_BOX(&hk::leapfrog_update));
  m.impl("leapfrog_update_backward.cpp", TORCH_BOX(&hk::leapfrog_update_backward));
  m.impl("leapfrog_update_double_backward.cpp", TORCH_BOX(&hk::leapfrog_update_double_backward));
  m.impl("local_reparam_linear.cpp", TORCH_BOX(&hk::local_reparam_linear));
  m.impl("local_reparam_linear_backward.cpp", TORCH_BOX(&hk::local_reparam_linear_backward));
  m.impl("masked_linear.cpp", TORCH_BOX(&hk::masked_linear));
  m.impl("masked_linear_input_grad.cpp", TORCH_BOX(&hk::masked_linear_input_grad));
  m.impl("masked_linear_weight_grad.cpp", TORCH_BOX(&hk::masked_linear_weight_grad));
  m.impl("autoregressive_forward.cpp", TORCH_BOX(&hk::autoregressive_forward));
  m.impl("autoregressive_inverse.cpp", TORCH_BOX(&hk::autoregressive_inverse));
  m.impl("autoregressive_training.cpp", TORCH_BOX(&hk::autoregressive_training));
  m.impl("autoregressive_backward.cpp", TORCH_BOX(&hk::autoregressive_backward));
  m.impl("planar_recursion.cpp", TORCH_BOX(&hk::planar_recursion));
  m.impl("planar_recursion_backward.cpp", TORCH_BOX(&hk::planar_recursion_backward));
  m.impl("planar_recursion_solve.cpp", TORCH_BOX(&hk::planar_recursion_solve));
  m.impl("radial_flow.cpp", TORCH_BOX(&hk::radial_flow));
  m.impl("radial_flow_backward.cpp", TORCH_BOX(&hk::radial_flow_backward));
  m.impl("rmsprop_step_.cpp", TORCH_BOX(&hk::rmsprop_step_));
  m.impl("gaussian_mixture.cpp", TORCH_BOX(&hk::gaussian_mixture));
  m.impl("gaussian_mixture_backward.cpp", TORCH_BOX(&hk::gaussian_mixture_backward));
  m.impl("gaussian_mixture_double_backward.cpp", TORCH_BOX(&hk::gaussian_mixture_double_backward));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
