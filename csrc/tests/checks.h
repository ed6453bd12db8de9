// What the files of the test driver share: a comparison that ends the run at the first difference.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "normwise.h"

inline int checks = 0;

inline void fail(const std::string& what, double got, double expected) {
  std::printf("FAILED on %s: %s is %.9g, expected %.9g\n", nw_isa(), what.c_str(), got, expected);
  std::exit(1);
}

// `unit` roundings of the dtype, of the number itself and of a scale where it nearly cancels.
inline void close(const std::string& what, int dtype, double got, double expected, double scale) {
  ++checks;
  const double unit = dtype == NW_BFLOAT16 ? 8e-3 : 2e-5;
  if (!(std::fabs(got - expected) <= unit * (std::fabs(expected) + scale))) fail(what, got, expected);
}

inline void check_status(const std::string& what, int status) {
  if (status != NW_OK) fail(what + " status", status, NW_OK);
}

void check_recurrent();  // rnn.cpp
