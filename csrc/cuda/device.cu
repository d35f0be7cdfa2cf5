// Devices, errors and the launch hook: the host side every launcher shares.
#include <mutex>
#include <vector>

#include "launch.cuh"

namespace rf::cuda {

namespace {
std::function<void(const Launch&)> hook;
Device hook_card;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
}  // namespace

void set_hook(std::function<void(const Launch&)> new_hook, const Device& card) {
  hook = std::move(new_hook);
  hook_card = card;
}
bool hooked() { return bool(hook); }
void call_hook(const Launch& launch) { hook(launch); }

void fail_cuda(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // a sticky copy would be blamed on the next launch
  throw std::runtime_error("resnet_fast: CUDA error " + std::string(cudaGetErrorName(error)) + " (" +
                           cudaGetErrorString(error) + ") in " + what);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "no CUDA device";
}

DeviceGuard::DeviceGuard(const Target& target) {
  if (hooked() || target.device < 0) return;
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == target.device) return;
  check(cudaSetDevice(target.device), "cudaSetDevice");
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

const Device& current_device() {
  if (hooked()) return hook_card;
  static std::mutex mutex;
  static std::vector<Device> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.empty()) known.reserve(1024);  // references stay valid
  while (int(known.size()) <= device) {
    const int i = int(known.size());
    known.push_back({attribute(cudaDevAttrMultiProcessorCount, i),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, i)});
  }
  return known[device];
}

}  // namespace rf::cuda
