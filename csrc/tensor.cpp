#include "tensor.h"

#include <cstdlib>
#include <cstring>

namespace tokenprune {

namespace {

bool poisoning() {
  static const bool on = [] {
    const char* value = std::getenv("TOKENPRUNE_POISON");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

// `code` is the C interface's number of the dtype.
Tensor new_empty_of_code(const Tensor& like, const Shape& shape, int32_t code, bool floating) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    const int64_t size = shape[d] > 0 ? shape[d] : 1;
    if (__builtin_mul_overflow(stride, size, &stride)) throw std::runtime_error("tokenprune: output size overflows");
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  code, device_type, device_index, &handle));
  Tensor fresh(handle);
  if (poisoning() && fresh.numel() > 0) {
    // All ones is a NaN in every floating dtype; 0x5A.. is no index anyone could mistake for a real one.
    const int byte = floating ? 0xFF : 0x5A;
    if (fresh.is_cpu()) {
      std::memset(fresh.mutable_data_ptr(), byte, fresh.numel() * fresh.element_size());
    } else if (fresh.is_cuda() && fill_cuda_bytes != nullptr) {
      fill_cuda_bytes(fresh, byte);
    }
  }
  return fresh;
}

}  // namespace

void (*fill_cuda_bytes)(const Tensor& t, int byte) = nullptr;

Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  const bool floating = dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  return new_empty_of_code(like, shape, code, floating);
}

Tensor new_empty_of_same_dtype(const Tensor& like, const Shape& shape) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  return new_empty_of_code(like, shape, code, false);
}

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    default: {
      std::ostringstream text;
      text << dtype;
      return text.str();
    }
  }
}

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (t.is_cuda() ? "cuda:" : "another device:") << t.get_device_index();
  return text.str();
}

}  // namespace tokenprune
