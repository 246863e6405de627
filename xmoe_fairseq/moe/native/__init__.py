"""A small C++ library for few rows on a CPU, and what stands in for it where it was not built."""
