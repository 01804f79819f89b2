// Module init and the operator registrations, nothing else. Schemas live in Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("affine_autoregressive.cpp", TORCH_BOX(&hk::affine_autoregressive));
  m.impl("affine_autoregressive_backward.cpp", TORCH_BOX(&hk::affine_autoregressive_backward));
  m.impl("affine_autoregressive_double_backward.cpp", TORCH_BOX(&hk::affine_autoregressive_double_backward));
  m.impl("gaussian_leapfrog.cpp", TORCH_BOX(&hk::gaussian_leapfrog));
  m.impl("gaussian_leapfrog_backward.cpp", TORCH_BOX(&hk::gaussian_leapfrog_backward));
  m.impl("gaussian_leapfrog_double_backward.cpp", TORCH_BOX(&hk::gaussian_leapfrog_double_backward));
  m.impl("leapfrog_update.cpp", TORCH_BOX(&hk::leapfrog_update));
  m.impl("leapfrog_update_backward.cpp", TORCH_BOX(&hk::leapfrog_update_backward));
  m.impl("leapfrog_update_double_backward.cpp", TORCH_BOX(&hk::leapfrog_update_double_backward));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
