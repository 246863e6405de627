// The C interface. Threads are those of torch: GOMP_parallel is left for the loader to find in the OpenMP that torch
// brought, so that there is one pool of threads and torch.set_num_threads holds.
#include "rows.h"

using namespace xmoe;

namespace {
const Kernels* table(int32_t path) {
    switch (path) {
        case 1: return &avx2_kernels;
        case 2: return &avx512_vnni_kernels;
        default: return nullptr;
    }
}
}  // namespace

extern "C" {

// Bit 0: AVX2 and FMA; bit 1: AVX-512 (F, BW, DQ, VL) and VNNI.
int32_t xmoe_supported() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    return (avx2 ? 1 : 0) | (vnni ? 2 : 0);
}

void xmoe_quantise(int32_t path, const float* x_RI, int64_t rows, int64_t width, int8_t* q_RI, float* scale_R,
                   int32_t* shift_R, int32_t* sum_R, int32_t threads) {
    table(path)->quantise(x_RI, rows, width, q_RI, scale_R, shift_R, sum_R, threads);
}

void xmoe_int8_linear(int32_t path, const int8_t* q_RI, const float* scale_R, const int32_t* shift_R,
                      const int32_t* sum_R, const int64_t* row_A, const int64_t* start_E, int64_t num_experts,
                      const int8_t* w_EOI, const float* scale_EO, const int32_t* sum_EO, const float* bias_EO,
                      int64_t in_width, int64_t out_width, float* out_AO, int32_t threads) {
    const Int8Rows rows{q_RI, scale_R, shift_R, sum_R};
    const Int8Weights weights{w_EOI, scale_EO, sum_EO, bias_EO};
    const Rows layout{row_A, start_E, num_experts, in_width, out_width, threads};
    table(path)->int8_linear(rows, weights, layout, out_AO);
}

// Quantises the rows into `scratch`, num_rows * (in_width + 12) bytes and 64 more, then multiplies.
void xmoe_int8_linear_of_floats(int32_t path, const float* x_RI, int64_t num_rows, uint8_t* scratch,
                                const int64_t* row_A, const int64_t* start_E, int64_t num_experts,
                                const int8_t* w_EOI, const float* scale_EO, const int32_t* sum_EO,
                                const float* bias_EO, int64_t in_width, int64_t out_width, float* out_AO,
                                int32_t threads) {
    int8_t* q_RI = reinterpret_cast<int8_t*>(scratch);
    float* scale_R = reinterpret_cast<float*>(scratch + (num_rows * in_width + 63) / 64 * 64);
    int32_t* shift_R = reinterpret_cast<int32_t*>(scale_R + num_rows);
    int32_t* sum_R = shift_R + num_rows;
    table(path)->quantise(x_RI, num_rows, in_width, q_RI, scale_R, shift_R, sum_R, threads);
    xmoe_int8_linear(path, q_RI, scale_R, shift_R, sum_R, row_A, start_E, num_experts, w_EOI, scale_EO, sum_EO,
                     bias_EO, in_width, out_width, out_AO, threads);
}

void xmoe_float_linear(int32_t path, const float* x_RI, const int64_t* row_A, const int64_t* start_E,
                       int64_t num_experts, const void* w_EIO, int32_t is_bfloat16, const float* bias_EO,
                       int64_t in_width, int64_t out_width, float* out_AO, int32_t threads) {
    const Rows layout{row_A, start_E, num_experts, in_width, out_width, threads};
    table(path)->float_linear(x_RI, w_EIO, is_bfloat16 != 0, bias_EO, layout, out_AO);
}

void xmoe_combine(int32_t path, const float* out_AD, const float* weight_A, const int64_t* token_A,
                  int64_t assignments, int64_t tokens, int64_t width, float* y_TD, int32_t threads) {
    table(path)->combine(out_AD, weight_A, token_A, assignments, tokens, width, y_TD, threads);
}
}
