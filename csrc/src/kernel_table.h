// All kernels of one instruction set. The public functions of normwise.h call those of the instruction set in use.
#pragma once

#include "normwise.h"

struct KernelTable {
  int (*rows_forward)(const nw_rows_forward_args*);
  int (*rows_near_zero)(const float*, int64_t, int64_t, double, double);
  int (*rows_backward)(const nw_rows_backward_args*);
  int (*groups_forward)(const nw_groups_forward_args*);
  int (*groups_backward)(const nw_groups_backward_args*);
  int (*channels_forward)(const nw_channels_forward_args*);
  int (*channels_backward)(const nw_channels_backward_args*);
  int (*recurrent_saves)(const nw_recurrent*, int64_t*);
  int (*recurrent_forward)(const nw_recurrent_forward_args*, bool use_amx);
  int (*recurrent_backward)(const nw_recurrent_backward_args*, bool use_amx);
  bool (*amx_available)();
};
