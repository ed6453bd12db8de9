// The normalization kernels of one instruction set; normwise.h says what each does.
#pragma once

#include "normwise.h"

namespace NW_ISA {

int rows_forward(const nw_rows_forward_args*);
int rows_near_zero(const float* x, int64_t rows, int64_t cols, double eps, double limit);
int rows_backward(const nw_rows_backward_args*);
int groups_forward(const nw_groups_forward_args*);
int groups_backward(const nw_groups_backward_args*);
int channels_forward(const nw_channels_forward_args*);
int channels_backward(const nw_channels_backward_args*);

}  // namespace NW_ISA
