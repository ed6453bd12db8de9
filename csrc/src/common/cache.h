// What the processor's caches hold. Compiled once, not for each instruction set.
#pragma once

#include <cstdint>

// Bytes of a core's L2, as the system says when the library is loaded; where it says nothing, a size that is common.
extern const int64_t l2_cache_bytes;
