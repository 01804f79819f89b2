// Module init: loading the module registers the operators, each at the foot of its file.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
