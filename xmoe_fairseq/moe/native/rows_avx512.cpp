// AVX-512 with VNNI. vpdpbusd multiplies unsigned with signed bytes: weights become unsigned by adding 128, and the
// epilogue takes 128 * (sum of the row) off again. All exact.
#include <immintrin.h>

#include "rows.h"

namespace xmoe {
namespace {

struct Simd {
    using Float = __m512;
    static constexpr int kFloats = 16, kChannels = 4, kRows = 4;
    static constexpr int32_t kWeightOffset = 128;

    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    static Float load(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
    static Float multiply_add(float a, Float b, Float c) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c); }

    static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

    static void range(const float* x, int64_t width, float* low, float* high, bool* is_number) {
        __m512 lows = _mm512_setzero_ps(), highs = _mm512_setzero_ps();
        __mmask16 strange = 0;
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 v = _mm512_maskz_loadu_ps(first(width - i), x + i);
            lows = _mm512_min_ps(lows, v);
            highs = _mm512_max_ps(highs, v);
            // NaN and infinity: x - x is not 0
            strange |= _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        }
        *low = _mm512_reduce_min_ps(lows);
        *high = _mm512_reduce_max_ps(highs);
        *is_number = strange == 0;
    }

    static int32_t quantise(const float* x, int64_t width, float inverse, float zero, int8_t* q) {
        const __m512 factor = _mm512_set1_ps(inverse), centre = _mm512_set1_ps(zero);
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = 0; i < width; i += 16) {
            const __mmask16 mask = first(width - i);
            __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
            v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            __m512i n = _mm512_cvtps_epi32(_mm512_add_ps(v, centre));
            n = _mm512_min_epi32(_mm512_max_epi32(n, _mm512_set1_epi32(-128)), _mm512_set1_epi32(127));
            n = _mm512_maskz_mov_epi32(mask, n);
            sums = _mm512_add_epi32(sums, n);
            _mm512_mask_cvtepi32_storeu_epi8(q + i, mask, n);
        }
        return _mm512_reduce_add_epi32(sums);
    }

    // Four sums of 16 lanes at once.
    static __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }

    template <int R>
    static void dot_rows(const int8_t* const* q, const int8_t* const* w, int64_t width, int32_t* total) {
        __m512i sum[R][kChannels];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kChannels; ++c) sum[r][c] = _mm512_setzero_si512();
        const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
        int64_t i = 0;
        for (; i + 64 <= width; i += 64) {
            __m512i unsigned_w[kChannels];
            for (int c = 0; c < kChannels; ++c) unsigned_w[c] = _mm512_xor_si512(_mm512_loadu_si512(w[c] + i), flip);
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_loadu_si512(q[r] + i);
                for (int c = 0; c < kChannels; ++c) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], unsigned_w[c], x);
            }
        }
        if (i < width) {
            const __mmask64 mask = (1ull << (width - i)) - 1;
            __m512i unsigned_w[kChannels];
            for (int c = 0; c < kChannels; ++c)
                unsigned_w[c] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[c] + i), flip);
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_maskz_loadu_epi8(mask, q[r] + i);  // 0 where there is nothing
                for (int c = 0; c < kChannels; ++c) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], unsigned_w[c], x);
            }
        }
        for (int r = 0; r < R; ++r)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(total + r * kChannels),
                             sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    }

    static void dot(const int8_t* const* q, int rows, const int8_t* const* w, int64_t width, int32_t* total) {
        switch (rows) {
            case 1: return dot_rows<1>(q, w, width, total);
            case 2: return dot_rows<2>(q, w, width, total);
            case 3: return dot_rows<3>(q, w, width, total);
            default: return dot_rows<4>(q, w, width, total);
        }
    }
};

}  // namespace
}  // namespace xmoe

#include "rows_body.h"

const xmoe::Kernels xmoe::avx512_vnni_kernels = {quantise, int8_linear, float_linear, combine};
