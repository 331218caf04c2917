// The calls that -fsanitize=thread puts in front of every load and store of a kernel (GCC's tsan.def). Hidden, so that the
// linker binds the kernels to these and not to a sanitizer that happens to be loaded.
#include "runtime.h"

using gmk_simt::access;
using gmk_simt::Kind;

#define GMK_HOOK extern "C" __attribute__((visibility("hidden"), used)) void
#define GMK_READ(name, bytes) \
  GMK_HOOK name(void* p) { access(uintptr_t(p), bytes, Kind::read, __builtin_return_address(0)); }
#define GMK_WRITE(name, bytes) \
  GMK_HOOK name(void* p) { access(uintptr_t(p), bytes, Kind::write, __builtin_return_address(0)); }
#define GMK_HOOKS(n)                    \
  GMK_READ(__tsan_read##n, n)           \
  GMK_WRITE(__tsan_write##n, n)         \
  GMK_READ(__tsan_volatile_read##n, n)  \
  GMK_WRITE(__tsan_volatile_write##n, n)
GMK_HOOKS(1)
GMK_HOOKS(2)
GMK_HOOKS(4)
GMK_HOOKS(8)
GMK_HOOKS(16)
GMK_HOOK __tsan_read_range(void* p, size_t bytes) { access(uintptr_t(p), bytes, Kind::read, __builtin_return_address(0)); }
GMK_HOOK __tsan_write_range(void* p, size_t bytes) { access(uintptr_t(p), bytes, Kind::write, __builtin_return_address(0)); }
GMK_HOOK __tsan_init() {}
GMK_HOOK __tsan_func_entry(void*) {}
GMK_HOOK __tsan_func_exit() {}
GMK_HOOK __tsan_vptr_update(void**, void*) {}
GMK_HOOK __tsan_vptr_read(void**) {}
