// The op schemas, for every process that loads this library (Python or not), and the Python module around them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"
#include "generated/ops.h"
#include "tensor.h"
#include "tokenprune/overrides.h"

STABLE_TORCH_LIBRARY(tokenprune, m) { tokenprune::define_ops(m); }

namespace {

// JSON: what this binary was built with and what it chose at run time.
PyObject* build_info(PyObject*, PyObject*) {
  std::string text = "{\"compiler\": \"" __VERSION__ "\", \"cpu_capabilities\": \"" TOKENPRUNE_CAPABILITIES
                     "\", \"cpu_capability\": \"";
  text += tokenprune::capability_name();
  text += "\", \"torch_floor\": \"2.10\", \"cuda_architectures\": \"" TOKENPRUNE_CUDA_ARCHITECTURES "\"";
  text += ", \"cuda_runtime\": " + std::to_string(tokenprune::cuda_runtime_version) + "}";
  return PyUnicode_FromString(text.c_str());
}

// For bench/gpu_suite/tune.py: what TOKENPRUNE_PLAN would be in a fresh process.
PyObject* set_plan(PyObject*, PyObject* text) {
  const char* words = PyUnicode_AsUTF8AndSize(text, nullptr);
  if (words == nullptr) return nullptr;
  try {
    tokenprune::plan_overrides() = tokenprune::PlanOverrides::parse(words);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this library was built with, as JSON."},
    {"set_plan", set_plan, METH_O, "Other overrides of launch plans than those of TOKENPRUNE_PLAN."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
