// Module init and the choice of instruction set. Loading it registers the operators, each at the foot of its file.
#include <Python.h>

#include "kernels/sets.h"

namespace {

// ((name, None or why it cannot be used here), ...) in ascending order.
PyObject* cpu_sets(PyObject*, PyObject*) {
  PyObject* sets = PyTuple_New(hk::kSets);
  for (int i = 0; sets && i < hk::kSets; ++i) {
    PyObject* set = Py_BuildValue("(sz)", hk::kSetNames[i], hk::why_not(static_cast<hk::SetId>(i)));
    if (!set || PyTuple_SetItem(sets, i, set)) Py_CLEAR(sets);
  }
  return sets;
}

PyObject* cpu_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(hk::kSetNames[static_cast<int>(hk::chosen_set.load())]);
}

PyObject* use_cpu_set(PyObject*, PyObject* name) {
  for (int i = 0; PyUnicode_Check(name) && i < hk::kSets; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, hk::kSetNames[i])) continue;
    const auto set = static_cast<hk::SetId>(i);
    if (const char* reason = hk::why_not(set))
      return PyErr_Format(PyExc_ValueError, "instruction set %R cannot be used: %s", name, reason);
    hk::chosen_set = set;
    return Py_BuildValue("");
  }
  return PyErr_Format(PyExc_ValueError, "instruction set must be one of %s, %s, %s, got %R", hk::kSetNames[0],
                      hk::kSetNames[1], hk::kSetNames[2], name);
}

PyMethodDef methods[] = {{"cpu_sets", cpu_sets, METH_NOARGS, nullptr},
                         {"cpu_set", cpu_set, METH_NOARGS, nullptr},
                         {"use_cpu_set", use_cpu_set, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
