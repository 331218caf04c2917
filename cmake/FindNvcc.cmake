# Enables CUDA where GMKERNELS_CUDA and this machine allow it. Before any target: a target takes its GPU generations from
# CMAKE_CUDA_ARCHITECTURES when it is made. (CheckLanguage is no help: it caches an empty CMAKE_CUDA_ARCHITECTURES.)
#   GMK_NVCC          true when CUDA is enabled
#   GMK_CUDA_MISSING  else the reason, which `doctor` repeats
set(GMK_NVCC FALSE)
set(GMK_CUDA_MISSING "")
if(NOT GMKERNELS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GMKERNELS_CUDA must be AUTO, ON or OFF, got '${GMKERNELS_CUDA}'")
endif()
if(GMKERNELS_CUDA STREQUAL "OFF")
  set(GMK_CUDA_MISSING "built with GMKERNELS_CUDA=OFF")
  return()
endif()

unset(gmk_nvcc CACHE)  # this machine may have changed since the last configuration
if(CMAKE_CUDA_COMPILER)
  set(gmk_nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(gmk_nvcc "$ENV{CUDACXX}")
else()
  find_program(gmk_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
endif()

# -DCMAKE_CUDA_ARCHITECTURES, else CUDAARCHS, else all. enable_language caches whatever it finds, so the list that we
# chose is remembered: where the cache holds just that, CUDAARCHS is read again, and no build folder keeps an old list.
if("${CMAKE_CUDA_ARCHITECTURES}" STREQUAL "" OR "${CMAKE_CUDA_ARCHITECTURES}" STREQUAL "${GMK_CHOSEN_ARCHS}")
  unset(CMAKE_CUDA_ARCHITECTURES CACHE)
  set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90-real 100-real 120)  # the last one as PTX too
  endif()
  set(GMK_CHOSEN_ARCHS "${CMAKE_CUDA_ARCHITECTURES}" CACHE INTERNAL "")
endif()

if(NOT gmk_nvcc)
  set(GMK_CUDA_MISSING "no nvcc was found when it was built")
else()  # nvcc may be there and not work, e.g. with a host compiler that is too new for it
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/nvcc_works.cu "__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n")
  set(gmk_host "")
  if(DEFINED ENV{CUDAHOSTCXX})
    set(gmk_host -ccbin $ENV{CUDAHOSTCXX})
  endif()
  execute_process(COMMAND ${gmk_nvcc} ${gmk_host} -c nvcc_works.cu -o nvcc_works.o WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
                  RESULT_VARIABLE gmk_failed OUTPUT_VARIABLE gmk_said ERROR_VARIABLE gmk_said)
  if(gmk_failed)
    set(GMK_CUDA_MISSING "nvcc did not work when it was built (${gmk_nvcc})")
    message(WARNING "gmkernels: ${gmk_nvcc} cannot compile:\n${gmk_said}")
  endif()
endif()

if(GMK_CUDA_MISSING)
  if(GMKERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GMKERNELS_CUDA=ON, but ${GMK_CUDA_MISSING}. Put a working nvcc on PATH, or set CUDACXX to it.")
  endif()
  return()
endif()
set(CMAKE_CUDA_COMPILER "${gmk_nvcc}")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(GMK_NVCC TRUE)
