// SPDX-License-Identifier: Apache-2.0
// What launchers choose by of the current device. Asked once a device: the driver's answers never
// change, and three questions in front of every launch cost a part of it.
#pragma once
#include <cuda_runtime_api.h>

#include <mutex>

namespace klq::cuda {

constexpr int kMaxDevices = 64;

struct Device {
  int id = 0, sms = 0, shared = 0, major = 0;
};

inline cudaError_t this_device(Device* out) {
  static Device table[kMaxDevices];
  static std::mutex mutex;
  Device d;
  if (cudaError_t e = cudaGetDevice(&d.id)) return e;
  if (d.id >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (Device& known = table[d.id]; known.sms) {
    *out = known;
    return cudaSuccess;
  }
  constexpr auto kShared = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  constexpr auto kMajor = cudaDevAttrComputeCapabilityMajor;
  if (cudaError_t e = cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, d.id))
    return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&d.shared, kShared, d.id)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&d.major, kMajor, d.id)) return e;
  *out = table[d.id] = d;
  return cudaSuccess;
}

}  // namespace klq::cuda
