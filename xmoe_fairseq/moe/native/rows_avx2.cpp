// AVX2 and FMA. Bytes are widened to 16 bits, whose products and sums of two vpmaddwd keeps whole: vpmaddubsw, which
// takes bytes as they are, would cut large sums off.
#include <immintrin.h>

#include "rows.h"

namespace xmoe {
namespace {

struct Simd {
    using Float = __m256;
    static constexpr int kFloats = 8, kChannels = 4, kRows = 2;
    static constexpr int32_t kWeightOffset = 0;

    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static Float load(const uint16_t* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
    static Float multiply_add(float a, Float b, Float c) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c); }

    static void range(const float* x, int64_t width, float* low, float* high, bool* is_number) {
        __m256 lows = _mm256_setzero_ps(), highs = _mm256_setzero_ps(), strange = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 8 <= width; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            lows = _mm256_min_ps(lows, v);
            highs = _mm256_max_ps(highs, v);
            // NaN and infinity: x - x is not 0
            strange = _mm256_or_ps(strange, _mm256_cmp_ps(_mm256_sub_ps(v, v), _mm256_setzero_ps(), _CMP_NEQ_UQ));
        }
        float lowest[8], highest[8];
        _mm256_storeu_ps(lowest, lows);
        _mm256_storeu_ps(highest, highs);
        *is_number = _mm256_movemask_ps(strange) == 0;
        for (int n = 0; n < 8; ++n) {
            *low = lowest[n] < *low ? lowest[n] : *low;
            *high = highest[n] > *high ? highest[n] : *high;
        }
        for (; i < width; ++i) {
            *low = x[i] < *low ? x[i] : *low;
            *high = x[i] > *high ? x[i] : *high;
            *is_number = *is_number && x[i] - x[i] == 0.0f;
        }
    }

    static int32_t quantise(const float* x, int64_t width, float inverse, float zero, int8_t* q) {
        int32_t sum = 0;
        for (int64_t i = 0; i < width; ++i) {
            const float value = __builtin_rintf(x[i] * inverse) + zero;
            const float kept = value < -128.0f ? -128.0f : value > 127.0f ? 127.0f : value;
            q[i] = static_cast<int8_t>(static_cast<int32_t>(kept));
            sum += q[i];
        }
        return sum;
    }

    static int32_t sum8(__m256i v) {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        half = _mm_hadd_epi32(half, half);
        return _mm_cvtsi128_si32(_mm_hadd_epi32(half, half));
    }

    static __m256i widened(const int8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    template <int R>
    static void dot_rows(const int8_t* const* q, const int8_t* const* w, int64_t width, int32_t* total) {
        __m256i sum[R][kChannels];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kChannels; ++c) sum[r][c] = _mm256_setzero_si256();
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) {
            __m256i x[R];
            for (int r = 0; r < R; ++r) x[r] = widened(q[r] + i);
            for (int c = 0; c < kChannels; ++c) {
                const __m256i wide = widened(w[c] + i);
                for (int r = 0; r < R; ++r) sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(wide, x[r]));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kChannels; ++c) {
                int32_t value = sum8(sum[r][c]);
                for (int64_t n = i; n < width; ++n) value += static_cast<int32_t>(q[r][n]) * w[c][n];
                total[r * kChannels + c] = value;
            }
    }

    static void dot(const int8_t* const* q, int rows, const int8_t* const* w, int64_t width, int32_t* total) {
        if (rows == 1) return dot_rows<1>(q, w, width, total);
        dot_rows<2>(q, w, width, total);
    }
};

}  // namespace
}  // namespace xmoe

#include "rows_body.h"

const xmoe::Kernels xmoe::avx2_kernels = {quantise, int8_linear, float_linear, combine};
