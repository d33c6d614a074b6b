// The op schemas, for every process that loads this library (Python or not), and the Python module around them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"
#include "generated/ops.h"

STABLE_TORCH_LIBRARY(tokenprune, m) { tokenprune::define_ops(m); }

namespace {

// JSON: what this binary was built with and what it chose at run time.
PyObject* build_info(PyObject*, PyObject*) {
  std::string text = "{\"compiler\": \"" __VERSION__ "\", \"cpu_capabilities\": \"" TOKENPRUNE_CAPABILITIES
                     "\", \"cpu_capability\": \"";
  text += tokenprune::capability_name();
  text += "\", \"torch_floor\": \"2.10\", \"cuda_architectures\": \"" TOKENPRUNE_CUDA_ARCHITECTURES "\"}";
  return PyUnicode_FromString(text.c_str());
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, "What this library was built with, as JSON."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
