// How the implementation of an op is registered, on every device. What it cannot allocate is reported with the op's
// name: the tensor that there was no room for or, where a standard container wanted the memory, the op's arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <new>
#include <utility>

#include "generated/ops.h"
#include "tensor.h"

namespace tokenprune {

template <class T>
void list_argument(std::ostream&, const T&) {}  // not a tensor
inline void list_argument(std::ostream& text, const Tensor& t) {
  if (t.defined())
    text << ' ' << dtype_name(t.scalar_type()) << ' ' << shape_text(t) << " ("
         << t.numel() * static_cast<int64_t>(t.element_size()) << " bytes)";
}
inline void list_argument(std::ostream& text, const OptionalTensor& t) {
  if (t) list_argument(text, *t);
}
inline void list_argument(std::ostream& text, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) list_argument(text, t);
}

template <class Name, class Function, Function* function>
struct NamedOp;

template <class Name, class Result, class... Arguments, Result (*function)(Arguments...)>
struct NamedOp<Name, Result(Arguments...), function> {
  static Result call(Arguments... arguments) {
    try {
      return function(std::forward<Arguments>(arguments)...);
    } catch (const OutOfMemory& missing) {
      throw std::runtime_error(std::string("tokenprune::") + Name::text() + ": out of memory: " + missing.what());
    } catch (const std::bad_alloc&) {
      std::ostringstream text;
      text << "tokenprune::" << Name::text() << ": out of memory: cannot allocate working memory for";
      (list_argument(text, arguments), ...);
      throw std::runtime_error(text.str());
    }
  }
};

}  // namespace tokenprune

// The name of an op reaches its error messages as a type, because what torch registers is a function without state.
#define TOKENPRUNE_IMPL(m, op, function)                                                          \
  do {                                                                                            \
    struct Name {                                                                                 \
      static const char* text() { return op; }                                                    \
    };                                                                                            \
    (m).impl(op, TORCH_BOX((&::tokenprune::NamedOp<Name, decltype(function), &function>::call))); \
  } while (false)
