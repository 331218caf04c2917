# -DGMKERNELS_SANITIZE=address (ASan and UBSan) or thread (TSan): the CPU code, instrumented. Built and run by
# tests/sanitize/run.py, which says how.
#   GMK_SANITIZE  compile options, after all others
set(GMKERNELS_SANITIZE "" CACHE STRING "address, thread, or empty; needs GMKERNELS_CUDA=OFF")
set(GMK_SANITIZE "")
if(GMKERNELS_SANITIZE STREQUAL "")
  return()
endif()
if(NOT GMKERNELS_SANITIZE MATCHES "^(address|thread)$")
  message(FATAL_ERROR "GMKERNELS_SANITIZE must be address or thread, got '${GMKERNELS_SANITIZE}'")
endif()
if(NOT GMKERNELS_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "GMKERNELS_SANITIZE needs GMKERNELS_CUDA=OFF")
endif()
set(GMK_SANITIZE -O1 -g -fno-omit-frame-pointer)
if(GMKERNELS_SANITIZE STREQUAL "address")
  # vptr needs RTTI. What UBSan finds ends the program, as ASan's finds do.
  list(APPEND GMK_SANITIZE -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
else()
  list(APPEND GMK_SANITIZE -fsanitize=thread -DGMK_ALWAYS_THREADS)
endif()
