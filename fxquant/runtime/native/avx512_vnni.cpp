// The kernels for AVX512 with VNNI: four products of bytes and their sum in one instruction, which does not saturate.

#include "kernels.h"

#ifdef FXQ_AVX512

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,fma,prefer-vector-width=512")
#endif

namespace fxq {
namespace {

#include "one_loop.inl"

constexpr int kMaxVectors = 4, kTileRows = 8, kWholeRows = 1, kInnerStep = 4, kRowBlock = 24;
constexpr int64_t kMostInner = FXQ_MAX_INNER;  // all inputs at once
constexpr bool kBegins = false;  // all sums begin at zero
constexpr int32_t kShift = 0;

struct Session {};

// 24 of the 32 registers hold sums: 6 rows by 4 vectors, which fill whole cache lines of bytes.
int vectors_for(int64_t units) { return units < 4 ? static_cast<int>(units) : 4; }
int rows_for(int vectors) { return vectors == 4 ? 6 : 8; }

template <int rows, int vectors>
void tile_of(const Left *left, int64_t left_stride, const Right *right, int64_t unit_elements, int64_t groups,
             int32_t *sums, int64_t sum_stride) {
    // Unrolled explicitly: only then does the compiler keep all sums in registers.
    __m512i sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; ++g) {
        __m512i numbers[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) numbers[v] = _mm512_loadu_si512(right + v * unit_elements + g * 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, left + r * left_stride + g * 4, 4);
            const __m512i bytes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], bytes, numbers[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) _mm512_storeu_si512(sums + r * sum_stride + v * 16, sum[r][v]);
}

typedef void (*TileOf)(const Left *, int64_t, const Right *, int64_t, int64_t, int32_t *, int64_t);

template <int vectors>
TileOf tile_for(int rows) {
    static constexpr TileOf table[8] = {tile_of<1, vectors>, tile_of<2, vectors>, tile_of<3, vectors>, tile_of<4, vectors>,
                                        tile_of<5, vectors>, tile_of<6, vectors>, tile_of<7, vectors>, tile_of<8, vectors>};
    return table[rows - 1];
}

template <class Work>
void tile(const ByteLoop &, int rows, int vectors, const Left *left, int64_t left_stride, const Right *right, int64_t unit_elements,
          int64_t groups, const int32_t *, int64_t, int32_t *sums, int64_t sum_stride, Work &) {
    const TileOf run = vectors == 1   ? tile_for<1>(rows)
                       : vectors == 2 ? tile_for<2>(rows)
                       : vectors == 3 ? tile_for<3>(rows)
                                      : tile_for<4>(rows);
    run(left, left_stride, right, unit_elements, groups, sums, sum_stride);
}

#include "avx512.inl"
#include "layers.inl"

}  // namespace

const Kernels kAvx512Vnni = {"avx512-vnni", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
