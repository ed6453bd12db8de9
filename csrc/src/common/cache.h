// What the processor's caches hold. Compiled once, not for each instruction set.
#pragma once

#include <cstdint>

// Bytes of a core's L2, as the system says when the library is loaded; where it says nothing, a size that is common.
extern const int64_t l2_cache_bytes;

// Whether most of the pages of an output were never written: the system then clears each of them, into the caches, just
// before the first store to it. False where the system does not tell.
bool is_fresh(const void* output, int64_t bytes);
