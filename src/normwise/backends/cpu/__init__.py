"""The C++ library of csrc/, called through ctypes."""
