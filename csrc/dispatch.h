// dtype dispatch: one template that calls a generic lambda with the type, instead of nested switch macros.
#pragma once

#include "cpu/half.h"
#include "tensor.h"

namespace tokenprune {

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>{}) for T in float, double, Half, BFloat16.
template <class F>
auto dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::Half:
      return f(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return f(TypeTag<BFloat16>{});
    default:
      return f(TypeTag<float>{});
  }
}

}  // namespace tokenprune
