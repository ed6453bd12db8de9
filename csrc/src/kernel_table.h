// What each instruction set offers; the public functions of normwise.h call the table of the one in use.
#pragma once

#include "normwise.h"

struct KernelTable {
  int (*rows_forward)(const nw_rows_forward_args*);
  int (*rows_backward)(const nw_rows_backward_args*);
  int (*groups_forward)(const nw_groups_forward_args*);
  int (*groups_backward)(const nw_groups_backward_args*);
  int (*channels_forward)(const nw_channels_forward_args*);
  int (*channels_backward)(const nw_channels_backward_args*);
  int (*recurrent_saves)(const nw_recurrent*, int64_t*);
  int (*recurrent_forward)(const nw_recurrent_forward_args*, bool tiles);
  int (*recurrent_backward)(const nw_recurrent_backward_args*, bool tiles);
  bool (*has_tiles)();
};

#ifdef NW_ISA
namespace NW_ISA {
int rows_forward(const nw_rows_forward_args*);
int rows_backward(const nw_rows_backward_args*);
int recurrent_saves(const nw_recurrent*, int64_t*);
// `tiles`: matrices may be multiplied in the processor's tile registers.
int recurrent_forward(const nw_recurrent_forward_args*, bool tiles);
int recurrent_backward(const nw_recurrent_backward_args*, bool tiles);
// Whether this library and this processor have such, and the system lets this process use them.
bool has_tiles();
}  // namespace NW_ISA
#endif
