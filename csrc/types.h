// Words every operator's argument struct is made of.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rf {

enum class DType : int { f32 = 0, bf16 = 1 };

inline size_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

}  // namespace rf
