# -DGMKERNELS_SANITIZE=address (ASan and UBSan) or thread (TSan): the CPU code, instrumented. Built and run by
# tests/sanitize/run.py, which says how.
#   GMK_SANITIZE           compile options, after all others
#   GMK_SANITIZE_ISAS      instruction sets to build; empty: all
#   GMK_SANITIZE_FULL      more of them, for the bindings and the base instruction set: UBSan. It doubles the time to compile
#                          a kernel, and the other instruction sets are the same source.
set(GMKERNELS_SANITIZE "" CACHE STRING "address, thread, or empty; needs GMKERNELS_CUDA=OFF")
set(GMK_SANITIZE "")
set(GMK_SANITIZE_FULL "")
set(GMK_SANITIZE_ISAS "")
if(GMKERNELS_SANITIZE STREQUAL "")
  return()
endif()
if(NOT GMKERNELS_SANITIZE MATCHES "^(address|thread)$")
  message(FATAL_ERROR "GMKERNELS_SANITIZE must be address or thread, got '${GMKERNELS_SANITIZE}'")
endif()
if(NOT GMKERNELS_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "GMKERNELS_SANITIZE needs GMKERNELS_CUDA=OFF")
endif()
set(GMK_SANITIZE -O1 -g1 -fno-omit-frame-pointer)
if(GMKERNELS_SANITIZE STREQUAL "address")
  # vptr needs RTTI. What UBSan finds ends the program, as ASan's finds do.
  list(APPEND GMK_SANITIZE -fsanitize=address)
  set(GMK_SANITIZE_FULL -fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
else()
  list(APPEND GMK_SANITIZE -fsanitize=thread -DGMK_ALWAYS_THREADS)
  set(GMK_SANITIZE_ISAS base)  # there TSan sees every access, and what is shared does not depend on the ISA
endif()
