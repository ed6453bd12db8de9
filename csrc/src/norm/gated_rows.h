// LayerNorm and RMSNorm with a gate, which rows.cpp hands over.
#pragma once

#include "normwise.h"

namespace NW_ISA {

int gated_rows_forward(const nw_rows_forward_args& a);
int gated_rows_backward(const nw_rows_backward_args& a);

}  // namespace NW_ISA
