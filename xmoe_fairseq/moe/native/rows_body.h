// The kernels, written once over a struct `Simd` that rows_avx2.cpp and rows_avx512.cpp define before including this.
// Every number comes from the same operations in the same order on every instruction set: integer sums are exact,
// float sums run over the input width with one fused multiply-add each, and nothing else is fused
// (-ffp-contract=off). So a row's result depends neither on the machine nor on the rows beside it.

namespace xmoe {
namespace {

constexpr int64_t kChannelsPerTask = 256;
constexpr int64_t kColumnsPerTask = 512;
constexpr float kLeastSpan = 1e-30f;  // a row of smaller numbers counts as zeros: 255 / span must be a number
constexpr int64_t kAhead = 4;  // blocks of a matrix that are fetched before they are needed: twice as fast
constexpr int kDepth = 8;  // input rows of a float matrix that are read together

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// float32 of a weight of either kind; uint16_t holds a bfloat16.
inline float number(const float* p) { return *p; }
inline float number(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Calls body(expert, first, last) for pieces of the output width of every expert that has rows.
template <class Body>
void for_each_piece(const Rows& rows, int64_t piece, const Body& body) {
    const int64_t pieces = (rows.out_width + piece - 1) / piece;
    const int64_t tasks = rows.num_experts * pieces;
    // waking threads costs more than this many products
    const bool is_small = rows.start_E[rows.num_experts] * rows.in_width * rows.out_width < 1 << 20;
    const int32_t wanted = is_small ? 1 : rows.threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(wanted) if (wanted > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t expert = task / pieces, first = task % pieces * piece;
        if (rows.start_E[expert] < rows.start_E[expert + 1])
            body(expert, first, smaller(first + piece, rows.out_width));
    }
}

// Each row's own scale and zero: 255 steps from min(x, 0) to max(x, 0), so that 0 is exact.
void quantise_row(const float* x, int64_t width, int8_t* q, float* scale, int32_t* shift, int32_t* sum) {
    float low = 0.0f, high = 0.0f;
    bool is_number = true;
    Simd::range(x, width, &low, &high, &is_number);
    const float span = high - low;
    const float inverse = span >= kLeastSpan ? 255.0f / span : 0.0f;
    const float zero = __builtin_rintf((0.0f - low) * inverse);  // 0 .. 255
    *scale = is_number ? span / 255.0f : __builtin_nanf("");
    *shift = 128 - static_cast<int32_t>(is_number ? zero : 0.0f);
    *sum = Simd::quantise(x, width, inverse, zero - 128.0f, q);
}

void quantise(const float* x_RI, int64_t rows, int64_t width, int8_t* q_RI, float* scale_R, int32_t* shift_R,
              int32_t* sum_R, int32_t threads) {
    const int32_t wanted = rows * width < 16384 ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(wanted) if (wanted > 1)
    for (int64_t row = 0; row < rows; ++row)
        quantise_row(x_RI + row * width, width, q_RI + row * width, scale_R + row, shift_R + row, sum_R + row);
}

// One expert's channels [first, last), a few at a time, on all of its rows: its weights are read once.
void int8_piece(const Int8Rows& x, const Int8Weights& w, const Rows& rows, float* out_AO, int64_t expert,
                int64_t first, int64_t last) {
    constexpr int kChannels = Simd::kChannels, kRows = Simd::kRows;
    const int64_t begin = rows.start_E[expert], end = rows.start_E[expert + 1];
    const int64_t width = rows.in_width, base = expert * rows.out_width;
    for (int64_t channel = first; channel < last; channel += kChannels) {
        const int channels = static_cast<int>(smaller(kChannels, last - channel));
        for (int64_t byte = 0; byte < kChannels * width; byte += 64)
            __builtin_prefetch(w.w_EOI + (base + channel + kAhead * kChannels) * width + byte);
        const int8_t* w_channel[kChannels];
        for (int c = 0; c < kChannels; ++c)
            w_channel[c] = w.w_EOI + (base + channel + (c < channels ? c : 0)) * width;
        for (int64_t a = begin; a < end; a += kRows) {
            const int taken = static_cast<int>(smaller(kRows, end - a));
            const int8_t* q_row[kRows];
            int64_t source[kRows];
            for (int r = 0; r < kRows; ++r) {
                const int64_t number = a + (r < taken ? r : 0);
                source[r] = rows.row_A ? rows.row_A[number] : number;
                q_row[r] = x.q_RI + source[r] * width;
            }
            int32_t total[kRows * kChannels];
            Simd::dot(q_row, taken, w_channel, width, total);
            for (int r = 0; r < taken; ++r) {
                float* out = out_AO + (a + r) * rows.out_width + channel;
                const float scale = x.scale_R[source[r]];
                const int32_t shift = x.shift_R[source[r]], offset = Simd::kWeightOffset * x.sum_R[source[r]];
                for (int c = 0; c < channels; ++c) {
                    const int64_t place = base + channel + c;
                    const int32_t exact = total[r * kChannels + c] - offset + shift * w.sum_EO[place];
                    const float value = static_cast<float>(exact) * (scale * w.scale_EO[place]);
                    out[c] = w.bias_EO ? value + w.bias_EO[place] : value;
                }
            }
        }
    }
}

void int8_linear(const Int8Rows& x, const Int8Weights& w, const Rows& rows, float* out_AO) {
    for_each_piece(rows, kChannelsPerTask, [&](int64_t expert, int64_t first, int64_t last) {
        int8_piece(x, w, rows, out_AO, expert, first, last);
    });
}

// kDepth rows of the matrix times the same kDepth inputs of each of the expert's rows, added to what out holds.
template <class Weight>
void float_piece(const float* x_RI, const Weight* w_EIO, const float* bias_EO, const Rows& rows, float* out_AO,
                 int64_t expert, int64_t first, int64_t last) {
    const int64_t begin = rows.start_E[expert], end = rows.start_E[expert + 1];
    const int64_t in = rows.in_width, out = rows.out_width;
    const Weight* w = w_EIO + expert * in * out;
    for (int64_t a = begin; a < end; ++a)
        for (int64_t o = first; o < last; ++o) out_AO[a * out + o] = bias_EO ? bias_EO[expert * out + o] : 0.0f;
    for (int64_t i = 0; i < in; i += kDepth) {
        const int depth = static_cast<int>(smaller(kDepth, in - i));
        int64_t o = first;
        for (; depth == kDepth && o + Simd::kFloats <= last; o += Simd::kFloats) {
            Simd::Float block[kDepth];
            for (int d = 0; d < kDepth; ++d) {
                block[d] = Simd::load(w + (i + d) * out + o);
                __builtin_prefetch(w + (i + kAhead * kDepth + d) * out + o);
            }
            for (int64_t a = begin; a < end; ++a) {
                const float* x = x_RI + (rows.row_A ? rows.row_A[a] : a) * in + i;
                float* y = out_AO + a * out + o;
                Simd::Float sum = Simd::load(y);
                for (int d = 0; d < kDepth; ++d) sum = Simd::multiply_add(x[d], block[d], sum);
                Simd::store(y, sum);
            }
        }
        for (; o < last; ++o)
            for (int64_t a = begin; a < end; ++a) {
                const float* x = x_RI + (rows.row_A ? rows.row_A[a] : a) * in + i;
                float sum = out_AO[a * out + o];
                for (int d = 0; d < depth; ++d) sum = __builtin_fmaf(x[d], number(w + (i + d) * out + o), sum);
                out_AO[a * out + o] = sum;
            }
    }
}

void float_linear(const float* x_RI, const void* w_EIO, bool is_bfloat16, const float* bias_EO, const Rows& rows,
                  float* out_AO) {
    for_each_piece(rows, kColumnsPerTask, [&](int64_t expert, int64_t first, int64_t last) {
        if (is_bfloat16)
            float_piece(x_RI, static_cast<const uint16_t*>(w_EIO), bias_EO, rows, out_AO, expert, first, last);
        else
            float_piece(x_RI, static_cast<const float*>(w_EIO), bias_EO, rows, out_AO, expert, first, last);
    });
}

// y[t] = the sum over t's assignments, in their order, of weight * out: a product and a sum, not fused.
void combine(const float* out_AD, const float* weight_A, const int64_t* token_A, int64_t assignments, int64_t tokens,
             int64_t width, float* y_TD, int32_t threads) {
    const int64_t piece = 128, pieces = (width + piece - 1) / piece;
    const int32_t wanted = assignments * width < 32768 ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(wanted) if (wanted > 1)
    for (int64_t part = 0; part < pieces; ++part) {
        const int64_t first = part * piece, last = smaller(first + piece, width);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t d = first; d < last; ++d) y_TD[t * width + d] = 0.0f;
        for (int64_t a = 0; a < assignments; ++a) {
            const float weight = weight_A[a];
            const float* from = out_AD + a * width;
            float* to = y_TD + token_A[a] * width;
            for (int64_t d = first; d < last; ++d) to[d] = to[d] + weight * from[d];
        }
    }
}

}  // namespace
}  // namespace xmoe
