// The kernels for AVX-VNNI: four products of bytes and their sum in one instruction of 256 bits, which does not saturate, on
// processors without AVX512. The rest as for AVX2.
//
// To test them where that instruction is missing, FXQ_AVX_VNNI_AS says what takes its place: 1 that of AVX512VL, which
// computes the same, 2 some of AVX2.

#include "kernels.h"

#ifdef FXQ_AVX_VNNI

#include <immintrin.h>

#ifndef FXQ_AVX_VNNI_AS
#define FXQ_AVX_VNNI_AS 0
#endif
#if FXQ_AVX_VNNI_AS == 1
#define FXQ_TARGET "avx2,fma,avx512f,avx512vl,avx512vnni"
#elif FXQ_AVX_VNNI_AS == 2
#define FXQ_TARGET "avx2,fma"
#else
#define FXQ_TARGET "avx2,fma,avxvnni"
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target(FXQ_TARGET))), apply_to = function)
#else
#define FXQ_PRAGMA(text) _Pragma(#text)
#define FXQ_TARGET_PRAGMA(target_names) FXQ_PRAGMA(GCC target(target_names))
FXQ_TARGET_PRAGMA(FXQ_TARGET)
#endif

namespace fxq {
namespace {

#include "one_loop.inl"

constexpr int kMaxVectors = 2, kTileRows = 12, kWholeRows = 1, kInnerStep = 4, kRowBlock = 24;
constexpr int64_t kMostInner = 768;  // of a panel in the first-level cache, with the rows that it meets
constexpr bool kBegins = true;
constexpr int32_t kShift = 0;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }

#include "avx2.inl"
#include "tile256.inl"

FXQ_INLINE __m256i plus_products(__m256i sum, __m256i codes, __m256i numbers) {
#if FXQ_AVX_VNNI_AS == 1
    return _mm256_dpbusd_epi32(sum, codes, numbers);
#elif FXQ_AVX_VNNI_AS == 2
    const __m256i even_codes = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd_codes = _mm256_srli_epi16(codes, 8);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(numbers, 8), 8), odd = _mm256_srai_epi16(numbers, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even_codes, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd_codes, odd));
#else
    return _mm256_dpbusd_avx_epi32(sum, codes, numbers);
#endif
}

// 12 of the 16 registers hold sums.
template <int rows>
void piece(const ByteLoop &, int, const uint8_t *left, const int8_t *right, const Place &place) {
    __m256i sum[2 * rows];
    each<2 * rows>([&](int i) FXQ_ALWAYS { sum[i] = first_of(place, i / 2, i % 2); });
    for (int64_t g = 0; g < place.groups; ++g) {
        const __m256i low = load_bytes(right + g * 64), high = load_bytes(right + g * 64 + 32);
        each<rows>([&](int r) FXQ_ALWAYS {
            const __m256i codes = four_bytes(left + r * place.left_stride + g * 4);
            sum[2 * r] = plus_products(sum[2 * r], codes, low);
            sum[2 * r + 1] = plus_products(sum[2 * r + 1], codes, high);
            keep(sum[2 * r], sum[2 * r + 1]);
        });
    }
    each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], place.at(i / 2, i % 2 * 8)); });
}

#include "six_pieces.inl"
#include "layers.inl"

}  // namespace

const Kernels kAvxVnni = {"avx-vnni", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
