// The kernels for AVX2 without VNNI: bytes widened to 16 bits first, since its byte multiply saturates.

#include "kernels.h"

#ifdef FXQ_X86

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace fxq {
namespace {

using Left = int16_t;
using Right = int16_t;
constexpr int kMaxVectors = 1, kTileRows = 2, kWholeRows = 1, kInnerStep = 4, kRowBlock = 24;
constexpr int64_t kMostInner = FXQ_MAX_INNER;  // all inputs at once
constexpr bool kBegins = false;  // all sums begin at zero
constexpr int kRegisterBytes = 32;

struct Session {};

int vectors_for(int64_t) { return 1; }
int rows_for(int) { return 2; }

// A register holds 4 columns by 4 inputs; two neighbouring sums make one column's.
template <int rows>
void tile_of(const Left *left, int64_t left_stride, const Right *right, int64_t groups, int32_t *sums,
             int64_t sum_stride) {
    __m256i sum[rows][4];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
    for (int64_t g = 0; g < groups; ++g) {
        __m256i numbers[4];
        for (int v = 0; v < 4; ++v)
            numbers[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(right + g * 64 + v * 16));
        for (int r = 0; r < rows; ++r) {
            long long four;
            __builtin_memcpy(&four, left + r * left_stride + g * 4, 8);
            const __m256i codes = _mm256_set1_epi64x(four);
            for (int v = 0; v < 4; ++v)
                sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(codes, numbers[v]));
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < 4; v += 2) {
            const __m256i pairs = _mm256_hadd_epi32(sum[r][v], sum[r][v + 1]);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums + r * sum_stride + v * 4),
                                _mm256_permute4x64_epi64(pairs, 0xd8));
        }
}

template <class Work>
void tile(int rows, int, const Left *left, int64_t left_stride, const Right *right, int64_t, int64_t groups,
          const int32_t *, int64_t, int32_t *sums, int64_t sum_stride, Work &) {
    (rows == 2 ? tile_of<2> : tile_of<1>)(left, left_stride, right, groups, sums, sum_stride);
}

#include "portable.inl"
#include "elementwise.inl"
#include "epilogue.inl"
#include "linear.inl"
#include "attention.inl"

}  // namespace

const Kernels kAvx2 = {"avx2", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
