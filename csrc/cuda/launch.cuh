// From arguments to a running kernel: dtype dispatch, the device guard, errors as exceptions, the tests' hook.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <typeinfo>
#include <utility>

#include "kernels.h"
#include "tiles.h"
#include "vec.cuh"

namespace rf::cuda {

[[noreturn]] void fail_cuda(cudaError_t error, const std::string& what);
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail_cuda(error, what);
}

// Makes the target's device current and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Target& target);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

const Device& current_device();  // the hook's card while a hook is set
bool hooked();
void call_hook(const Launch& launch);

template <auto kKernel>
struct Kernel {};  // a type whose name holds the kernel's

struct Geometry {
  int64_t grid;
  unsigned shared = 0;
  bool cooperative = false;
};

// Blocks of a kernel that are resident on the whole card at once. Under the hook there is no card to ask: `assumed`.
// Static and dynamic shared memory count together against the 48 kB a kernel gets unasked, so the most is asked for.
template <auto kKernel>
int64_t resident_blocks(unsigned shared, int assumed_per_sm) {
  const Device& card = current_device();
  if (hooked()) return int64_t(assumed_per_sm) * card.sms;
  thread_local std::map<std::pair<const Device*, unsigned>, int> known;  // the driver's answer takes microseconds
  const auto found = known.find({&card, shared});
  if (found != known.end()) return int64_t(found->second) * card.sms;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kKernel), "cudaFuncGetAttributes");
  const int most = card.shared_per_block - int(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "asking for shared memory");
  int per_sm = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, kThreads, shared), "asking for the occupancy");
  known[{&card, shared}] = per_sm;
  return int64_t(per_sm) * card.sms;
}

template <auto kKernel, class Args>
void launch(const Target& target, const Geometry& g, const Args& args) {
  const char* name = typeid(Kernel<kKernel>).name();
  RF_CHECK(g.grid >= 1 && g.grid <= 0x7fffffff, "a grid of ", g.grid, " blocks, wanted 1 to 2^31 - 1");
  if (hooked()) {
    call_hook({name, unsigned(g.grid), kThreads, g.shared, g.cooperative, &args, sizeof(Args)});
    return;
  }
  const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
  void* pointers[] = {const_cast<Args*>(&args)};
  const void* function = reinterpret_cast<const void*>(kKernel);
  const cudaError_t error =
      g.cooperative
          ? cudaLaunchCooperativeKernel(function, dim3(unsigned(g.grid)), dim3(kThreads), pointers, g.shared, stream)
          : cudaLaunchKernel(function, dim3(unsigned(g.grid)), dim3(kThreads), pointers, g.shared, stream);
  if (error != cudaSuccess) {
    fail_cuda(error,
              std::string(name) + ", grid " + std::to_string(g.grid) + ", shared bytes " + std::to_string(g.shared));
  }
}

// Calls body(T{}) with the storage type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
  }
  RF_CHECK(false, "dtype ", int(dtype), ", wanted 0 (float32), 1 (bfloat16) or 2 (float16)");
}

template <class... Pointers>
void check_aligned(const char* op, const Pointers*... pointers) {
  const bool aligned[] = {reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0 ...};
  for (const bool a : aligned) RF_CHECK(a, op, ": wanted tensors aligned to ", kPackBytes, " bytes");
}

// Whole packs of a row, or single elements where the channels do not divide.
template <class T>
bool vectorizes(int channels) {
  return channels % kVec<T> == 0;
}

}  // namespace rf::cuda
