"""A small C++ library for few rows on a CPU, and torch's operators where it was not built."""
