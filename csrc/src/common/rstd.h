// The reciprocal deviation of every norm.
#pragma once

#include <cmath>
#include <limits>

#include "common/simd.h"

namespace NW_ISA {
namespace {

// 1 / sqrt(var + eps). A variance that overflowed its sum gives NaN, which shows that an input exploded; 1 over
// infinity would turn every output into zero.
template <class C> NW_INLINE C rstd_of(C var, C eps) {
  return var < std::numeric_limits<C>::infinity() ? C(1) / std::sqrt(var + eps) : std::numeric_limits<C>::quiet_NaN();
}

}  // namespace
}  // namespace NW_ISA
