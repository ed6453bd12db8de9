// The table of one instruction set. This file is compiled once for each.
#include "kernel_table.h"

#include "norm/kernels.h"
#include "rnn/kernels.h"

namespace NW_ISA {

extern const KernelTable table = {
    .rows_forward = rows_forward,
    .rows_near_zero = rows_near_zero,
    .rows_backward = rows_backward,
    .groups_forward = groups_forward,
    .groups_backward = groups_backward,
    .channels_forward = channels_forward,
    .channels_backward = channels_backward,
    .recurrent_saves = recurrent_saves,
    .recurrent_forward = recurrent_forward,
    .recurrent_backward = recurrent_backward,
    .amx_available = amx_available,
};

}  // namespace NW_ISA
