// The recurrent kernels of one instruction set; normwise.h says what each does.
#pragma once

#include "normwise.h"

namespace NW_ISA {

int recurrent_saves(const nw_recurrent*, int64_t widths[4]);
// `use_amx`: matrices may be multiplied in the processor's tile registers.
int recurrent_forward(const nw_recurrent_forward_args*, bool use_amx);
int recurrent_backward(const nw_recurrent_backward_args*, bool use_amx);
// The same of layers whose statistics are over samples, of arguments that were found to be in order.
int batch_forward(const nw_recurrent_forward_args*, bool use_amx);
int batch_backward(const nw_recurrent_backward_args*, bool use_amx);
// Whether this library and this processor have tile registers, and the system lets this process use them.
bool amx_available();

}  // namespace NW_ISA
