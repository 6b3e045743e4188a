// libcuda.so.1 without a GPU: the driver calls that Triton makes, answered as an H100's driver would.
//
// A launch is recorded and does nothing else. Functions and attributes that are not here do not exist: Triton
// fails to find them, or is told that they are not supported.
#include <stdatomic.h>
#include <string.h>

#include "cuda.h"

enum { MOST_KERNELS = 4096, MOST_LAUNCHES = 1 << 16, SHARED_MEMORY = 227 * 1024, SHARED_MEMORY_BY_DEFAULT = 48 * 1024 };

struct Kernel {
  char name[128];
  int shared_memory;  // that a launch may ask for, as cuFuncSetAttribute says
};

struct Launch {
  const char *kernel;
  unsigned programs, threads, shared_memory, captured;
};

struct TensorMap {
  unsigned long long address, columns, rows, row_bytes;
  unsigned box_columns, box_rows;
};

static struct Kernel kernels[MOST_KERNELS];
static atomic_int count_kernels;

// What the Python side reads, and the flag that it sets.
struct Launch fake_launches[MOST_LAUNCHES];
atomic_int fake_count_launches;
struct TensorMap fake_tensor_maps[MOST_LAUNCHES];
atomic_int fake_count_tensor_maps;
int fake_capturing;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
  case CUDA_SUCCESS: *text = "no error"; break;
  case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
  case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
  case CUDA_ERROR_NOT_SUPPORTED: *text = "operation not supported by the fake driver"; break;
  case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
  default: *text = "unknown error";
  }
  return CUDA_SUCCESS;
}

// ---- one device, one context -----------------------------------------------------------------------------

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_MEMORY; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:  // Triton asks, and only its own benchmarks use the answers
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
  default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = fake_capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// Linked against, not emulated.
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }

// All memory is the host's, and counts as the device's.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// Matrices only. What is refused is refused by the driver too: CUDA driver API, "Tensor Map Object Management".
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  if (rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_NOT_SUPPORTED;
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    return CUDA_ERROR_NOT_SUPPORTED;
  if ((size_t)map % 64 || (size_t)address % 16 || strides[0] % 16 || strides[0] >= 1ull << 40)
    return CUDA_ERROR_INVALID_VALUE;
  unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
  if (box[0] * 2 % 16 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && box[0] * 2 > span)) return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] < sizes[0] * 2) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; i++)
    if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  int index = atomic_fetch_add(&fake_count_tensor_maps, 1) % MOST_LAUNCHES;  // whoever only takes time makes many
  fake_tensor_maps[index] =
      (struct TensorMap){(unsigned long long)address, sizes[0], sizes[1], strides[0], box[0], box[1]};
  return CUDA_SUCCESS;
}

// ---- kernels ---------------------------------------------------------------------------------------------

// Loading allocates memory: not while a graph is captured.
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return fake_capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  int index = atomic_fetch_add(&count_kernels, 1);
  if (index >= MOST_KERNELS || strlen(name) >= sizeof kernels[0].name) return CUDA_ERROR_OUT_OF_MEMORY;
  strcpy(kernels[index].name, name);
  kernels[index].shared_memory = SHARED_MEMORY_BY_DEFAULT;
  *function = (CUfunction)&kernels[index];
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 128; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_NOT_SUPPORTED;
  if (value > SHARED_MEMORY) return CUDA_ERROR_INVALID_VALUE;
  ((struct Kernel *)function)->shared_memory = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  struct Kernel *kernel = (struct Kernel *)function;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!config->gridDimX || config->gridDimX > 0x7fffffff || config->gridDimY != 1 || config->gridDimZ != 1)
    return CUDA_ERROR_INVALID_VALUE;
  if (!threads || threads > 1024 || config->sharedMemBytes > (unsigned)kernel->shared_memory)
    return CUDA_ERROR_INVALID_VALUE;
  int index = atomic_fetch_add(&fake_count_launches, 1);
  if (index >= MOST_LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
  fake_launches[index] =
      (struct Launch){kernel->name, config->gridDimX, threads, config->sharedMemBytes, fake_capturing};
  return CUDA_SUCCESS;
}
