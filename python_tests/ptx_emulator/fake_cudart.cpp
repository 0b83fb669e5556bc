// The CUDA runtime as far as nvcc's host code and our launch functions use it, without a device: a launch goes to a
// callback, which Python sets, and device memory is the process's own. What is missing here fails at link time, by
// name. Of the driver there is what makes tensor maps.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

extern "C" {
struct EmulatedLaunch {
  const char* kernel;
  uint32_t grid[3];
  uint32_t block[3];
  void** arguments;
  uint64_t dynamic_shared;
  int64_t most_dynamic_shared;  // as set by cudaFuncSetAttribute, -1 when not set
};
using LaunchCallback = int (*)(const EmulatedLaunch*);
using MemoryCallback = int (*)(void* target, const void* source, int value, uint64_t bytes);  // no source: a fill

LaunchCallback emulator_launch = nullptr;
MemoryCallback emulator_memory = nullptr;
int emulator_attributes[256] = {};  // cudaDeviceGetAttribute, indexed by cudaDeviceAttr
int emulator_blocks_per_multiprocessor = 1;
int emulator_device = 0;  // the current one: host code may remember what a device is like
}

namespace {

struct Function {
  std::string name;
  int64_t most_dynamic_shared = -1;
};

// Kernels register themselves from constructors, which may run before those of this file.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> registered;
  return registered;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const Function& function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  if (emulator_launch == nullptr) return failed(cudaErrorInitializationError);
  EmulatedLaunch request{
      function.name.c_str(),       {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments, shared,
      function.most_dynamic_shared};
  return failed(static_cast<cudaError_t>(emulator_launch(&request)));
}

#pragma pack(push, 1)
struct TensorMapRecord {
  char magic[4];
  uint8_t type, rank, swizzle, interleave;
  uint64_t address;
  uint32_t last[5];  // extents less one
  uint64_t strides[4];
  uint16_t box[5];
  uint8_t steps[5];
};
#pragma pack(pop)
static_assert(sizeof(TensorMapRecord) <= sizeof(CUtensorMap));

uint64_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 0;
  }
}

cudaError_t memory(void* target, const void* source, int value, size_t bytes) {
  if (emulator_memory == nullptr) return failed(cudaErrorInitializationError);
  return failed(static_cast<cudaError_t>(emulator_memory(target, source, value, bytes)));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  auto found = functions().find(host);
  if (found == functions().end()) return failed(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(&found->second);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(*reinterpret_cast<Function*>(kernel), grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  auto found = functions().find(host);
  return found == functions().end() ? failed(cudaErrorInvalidDeviceFunction)
                                    : launch(found->second, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  auto found = functions().find(host);
  if (found == functions().end()) return failed(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > emulator_attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin]) return failed(cudaErrorInvalidValue);
    found->second.most_dynamic_shared = value;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = emulator_blocks_per_multiprocessor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = emulator_blocks_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  return memory(target, nullptr, value, bytes);
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memory(target, source, 0, bytes);
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulator_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator_device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulator_attributes[attribute];
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  if (result != nullptr) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Readable by tensor_map.py, and as strict as the documentation.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint64_t width = element_bytes(type), lines[] = {1u << 30, 32, 64, 128};
  const uint64_t start = reinterpret_cast<uint64_t>(address);
  if (width == 0 || rank < 1 || rank > 5 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || start == 0 || start % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * width % 16 != 0 || box[0] * width > lines[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  TensorMapRecord record{{'V', 'M', 'A', 'P'},
                         static_cast<uint8_t>(type),
                         static_cast<uint8_t>(rank),
                         static_cast<uint8_t>(swizzle),
                         0,
                         start,
                         {},
                         {},
                         {},
                         {}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    const bool sound = extents[i] >= 1 && extents[i] <= (uint64_t{1} << 32) && box[i] >= 1 && box[i] <= 256 &&
                       steps[i] >= 1 && steps[i] <= 8;
    if (!sound) return CUDA_ERROR_INVALID_VALUE;
    record.last[i] = static_cast<uint32_t>(extents[i] - 1);
    record.box[i] = static_cast<uint16_t>(box[i]);
    record.steps[i] = static_cast<uint8_t>(steps[i]);
    if (i + 1 == rank) continue;
    if (strides[i] % 16 != 0 || strides[i] >= (uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    if (i == 0 && strides[i] < extents[0] * width) return CUDA_ERROR_INVALID_VALUE;
    record.strides[i] = strides[i];
  }
  std::memcpy(map, &record, sizeof record);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "error of the emulated runtime"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "error of the emulated runtime";
}

}  // extern "C"
