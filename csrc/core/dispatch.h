// Which instruction set runs: chosen once from the CPU, overridable by GMKERNELS_ISA (read in Python) or set_isa().
//
// Every *_cpu.cpp is compiled once per instruction set, in namespace gmk::isa_<name>, and exports one table of
// function pointers. A binding writes
//     GMK_ISA_TABLES(GmmKernels, gmm_kernels)
// at namespace gmk scope and calls gmm_kernels().log_prob(args, threads).
#pragma once

namespace gmk {

enum Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2, kIsaCount = 3 };

const char* isa_name(int isa);
bool isa_available(int isa);  // compiled in, and this CPU has it
int isa_current();
bool isa_set(const char* name);  // false: no such instruction set here

#ifdef GMK_HAVE_avx2
#define GMK_ISA_TABLES(Table, name)                                                                      \
  namespace isa_base {                                                                                   \
  extern const Table name;                                                                               \
  }                                                                                                      \
  namespace isa_avx2 {                                                                                   \
  extern const Table name;                                                                               \
  }                                                                                                      \
  namespace isa_avx512 {                                                                                 \
  extern const Table name;                                                                               \
  }                                                                                                      \
  static inline const Table& name() {                                                                    \
    static const Table* const tables[kIsaCount] = {&isa_base::name, &isa_avx2::name, &isa_avx512::name}; \
    return *tables[isa_current()];                                                                       \
  }
#else
#define GMK_ISA_TABLES(Table, name) \
  namespace isa_base {              \
  extern const Table name;          \
  }                                 \
  static inline const Table& name() { return isa_base::name; }
#endif

}  // namespace gmk
