// What the instruction sets have to offer, and the arguments they take. No standard header with inline functions
// is included: one compiled for AVX-512 could end up in the program of a machine without it.
#pragma once
#include <stdint.h>

namespace xmoe {

// Rows by expert: assignment a of expert e has start_E[e] <= a < start_E[e + 1].
struct Rows {
    const int64_t* row_A;    // input row of each assignment; null: its own number
    const int64_t* start_E;  // E + 1 numbers
    int64_t num_experts;
    int64_t in_width, out_width;
    int32_t threads;
};

struct Int8Rows {
    const int8_t* q_RI;      // x is scale * (q + shift)
    const float* scale_R;
    const int32_t* shift_R;
    const int32_t* sum_R;    // of q
};

struct Int8Weights {
    const int8_t* w_EOI;
    const float* scale_EO;
    const int32_t* sum_EO;   // of w
    const float* bias_EO;    // null: none
};

// One table per instruction set.
struct Kernels {
    void (*quantise)(const float* x_RI, int64_t rows, int64_t width, int8_t* q_RI, float* scale_R, int32_t* shift_R,
                     int32_t* sum_R, int32_t threads);
    void (*int8_linear)(const Int8Rows&, const Int8Weights&, const Rows&, float* out_AO);
    // w_EIO: float32, or bfloat16 if is_bfloat16
    void (*float_linear)(const float* x_RI, const void* w_EIO, bool is_bfloat16, const float* bias_EO, const Rows&,
                         float* out_AO);
    void (*combine)(const float* out_AD, const float* weight_A, const int64_t* token_A, int64_t assignments,
                    int64_t tokens, int64_t width, float* y_TD, int32_t threads);
};

extern const Kernels avx2_kernels;
extern const Kernels avx512_vnni_kernels;

}  // namespace xmoe
