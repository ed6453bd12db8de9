// The public functions of normwise.h: each calls the kernel of the instruction set in use.
#include <cstring>

#include "common/openmp.h"
#include "kernel_table.h"

#define NW_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef NW_HAVE_AVX512
namespace avx512 {
extern const KernelTable table;
}
#endif
#ifdef NW_HAVE_AVX2
namespace avx2 {
extern const KernelTable table;
}
#endif
#ifdef NW_HAVE_BASELINE
namespace baseline {
extern const KernelTable table;
}
#endif

namespace {

struct Level {
  const char* name;
  const KernelTable* table;
  bool use_amx;
  bool (*runs_here)();
};

// Best first. The features tested are those of the x86-64-v4 and x86-64-v3 levels that the kernels are compiled for.
#ifdef NW_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma");
}
#endif

const Level levels[] = {
#ifdef NW_HAVE_AVX512
    {.name = "avx512_amx",
     .table = &avx512::table,
     .use_amx = true,
     .runs_here = [] { return has_avx512() && avx512::table.amx_available(); }},
    {.name = "avx512", .table = &avx512::table, .use_amx = false, .runs_here = has_avx512},
#endif
#ifdef NW_HAVE_AVX2
    {.name = "avx2",
     .table = &avx2::table,
     .use_amx = false,
     .runs_here =
         [] {
           return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
         }},
#endif
#ifdef NW_HAVE_BASELINE
    {.name = "baseline", .table = &baseline::table, .use_amx = false, .runs_here = [] { return true; }},
#endif
};

const Level* best() {
  for (const Level& level : levels) {
    if (level.runs_here()) return &level;
  }
  return nullptr;
}

const Level* active = best();

}  // namespace

NW_EXPORT int nw_abi(void) { return NW_ABI; }
NW_EXPORT const char* nw_isa(void) { return active ? active->name : nullptr; }

NW_EXPORT int nw_use_isa(const char* name) {
  for (const Level& level : levels) {
    if (std::strcmp(level.name, name) == 0 && level.runs_here()) {
      active = &level;
      return NW_OK;
    }
  }
  return NW_BAD_ARGUMENT;
}

NW_EXPORT int nw_threads(int threads) {
  int found = 1;
  parallel_region(threads, [&](int thread, int count) {
    if (thread == 0) found = count;
  });
  return found;
}

NW_EXPORT int nw_rows_near_zero(const float* x, int64_t rows, int64_t cols, double eps, double limit) {
  return active->table->rows_near_zero(x, rows, cols, eps, limit);
}

NW_EXPORT int64_t nw_count_valid(const uint8_t* mask, int64_t n, int64_t enough) {
  int64_t count = 0;
  for (int64_t i = 0; i < n && count < enough; ++i) count += mask[i] != 0;
  return count;
}

NW_EXPORT int64_t nw_struct_size(int which) {
  const int64_t sizes[] = {sizeof(nw_rows_forward_args),      sizeof(nw_rows_backward_args),
                           sizeof(nw_groups_forward_args),    sizeof(nw_groups_backward_args),
                           sizeof(nw_channels_forward_args),  sizeof(nw_channels_backward_args),
                           sizeof(nw_recurrent_forward_args), sizeof(nw_recurrent_backward_args)};
  return which >= 0 && which < int(sizeof sizes / sizeof *sizes) ? sizes[which] : -1;
}

NW_EXPORT int nw_rows_forward(const nw_rows_forward_args* a) { return active->table->rows_forward(a); }
NW_EXPORT int nw_rows_backward(const nw_rows_backward_args* a) { return active->table->rows_backward(a); }
NW_EXPORT int nw_groups_forward(const nw_groups_forward_args* a) { return active->table->groups_forward(a); }
NW_EXPORT int nw_groups_backward(const nw_groups_backward_args* a) { return active->table->groups_backward(a); }
NW_EXPORT int nw_channels_forward(const nw_channels_forward_args* a) { return active->table->channels_forward(a); }
NW_EXPORT int nw_channels_backward(const nw_channels_backward_args* a) { return active->table->channels_backward(a); }
NW_EXPORT int nw_recurrent_saves(const nw_recurrent* a, int64_t widths[4]) {
  return active->table->recurrent_saves(a, widths);
}
NW_EXPORT int nw_recurrent_forward(const nw_recurrent_forward_args* a) {
  return active->table->recurrent_forward(a, active->use_amx);
}
NW_EXPORT int nw_recurrent_backward(const nw_recurrent_backward_args* a) {
  return active->table->recurrent_backward(a, active->use_amx);
}
