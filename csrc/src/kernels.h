// What each instruction set offers; the public functions of normwise.h call the table of the one in use.
#pragma once

#include "../include/normwise.h"

struct KernelTable {
  int (*rows_forward)(const nw_rows_forward_args*);
  int (*rows_backward)(const nw_rows_backward_args*);
  int (*groups_forward)(const nw_groups_forward_args*);
  int (*groups_backward)(const nw_groups_backward_args*);
  int (*channels_forward)(const nw_channels_forward_args*);
  int (*channels_backward)(const nw_channels_backward_args*);
  int (*recurrent_saves)(const nw_recurrent*, int64_t*);
  int (*recurrent_forward)(const nw_recurrent_forward_args*);
  int (*recurrent_backward)(const nw_recurrent_backward_args*);
};

#ifdef NW_ISA
namespace NW_ISA {
int rows_forward(const nw_rows_forward_args*);
int rows_backward(const nw_rows_backward_args*);
int recurrent_saves(const nw_recurrent*, int64_t*);
int recurrent_forward(const nw_recurrent_forward_args*);
int recurrent_backward(const nw_recurrent_backward_args*);
}  // namespace NW_ISA
#endif
