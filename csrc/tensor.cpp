#include "tensor.h"

#include <cstdlib>
#include <cstring>
#include <iomanip>

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
[[noreturn]] void out_of_memory(const Tensor& like, const Shape& shape, int32_t code) {
  std::ostringstream text;
  text << "cannot allocate " << dtype_name(static_cast<ScalarType>(code)) << ' ' << shape_text(shape);
  double bytes = aoti_torch_dtype_element_size(code);
  for (const int64_t size : shape) bytes *= static_cast<double>(size);
  text << " (" << std::fixed << std::setprecision(0) << bytes << " bytes) on " << device_text(like);
  throw OutOfMemory(text.str());
}

int32_t code_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

Tensor new_empty_of_code(const Tensor& like, const Shape& shape, int32_t code, bool floating) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    const int64_t size = shape[d] > 0 ? shape[d] : 1;
    if (__builtin_mul_overflow(stride, size, &stride)) out_of_memory(like, shape, code);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code, device_type,
                               device_index, &handle) != AOTI_TORCH_SUCCESS)
    out_of_memory(like, shape, code);
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

// A contiguous copy. The only thing that can go wrong is that there is no memory for it.
Tensor copied(const Tensor& t, ScalarType dtype) {
  try {
    return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
  } catch (const std::exception&) {
    out_of_memory(t, Shape(t.sizes().begin(), t.sizes().end()), code_of(dtype));
  }
}

}  // namespace

void (*fill_cuda_bytes)(const Tensor& t, int byte) = nullptr;
int cuda_runtime_version = 0;

Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  const bool floating = dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16;
  return new_empty_of_code(like, shape, code_of(dtype), floating);
}

Tensor new_empty_of_same_dtype(const Tensor& like, const Shape& shape) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  return new_empty_of_code(like, shape, code, false);
}

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : copied(t, t.scalar_type());
}

OptionalTensor with_contiguous_rows(const OptionalTensor& t) {
  OptionalTensor result;
  if (t) result = with_contiguous_rows(*t);
  return result;
}

Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype && t.is_contiguous() ? t : copied(t, dtype);
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
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {
      std::ostringstream text;
      text << dtype;
      return text.str();
    }
  }
}

std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

std::string shape_text(const Tensor& t) { return shape_text(t.sizes()); }

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (t.is_cuda() ? "cuda:" : "another device:") << t.get_device_index();
  return text.str();
}

}  // namespace tokenprune
