// The kernels for AMX: products of 16 x 64 and 64 x 16 bytes in one instruction; the rest as for AVX512.

#include "kernels.h"

#ifdef FXQ_AMX

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,fma,prefer-vector-width=512")
#endif

namespace fxq {
namespace {

#include "one_loop.inl"

constexpr int kMaxVectors = 2, kTileRows = 32, kWholeRows = 16, kInnerStep = 64, kRowBlock = 32;
constexpr int64_t kMostInner = 512;
constexpr bool kBegins = true;
constexpr int32_t kShift = 0;

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }

// The tile registers of this thread, all of 16 rows of 64 bytes, for as long as a kernel runs.
struct Session {
    Session() {
        // Static: compilers that take only its first bytes for the instruction's input cannot leave out the others.
        static const struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } configuration = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&configuration);
    }
    ~Session() { _tile_release(); }
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;
};

// Registers 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns. Reads whole rows of 16 or 32, and writes as many, added to
// `begin` where there is one (one row for all with stride 0); meanwhile does some of `work`.
template <class Work>
void tile(const ByteLoop &, int rows, int vectors, const Left *left, int64_t left_stride, const Right *right, int64_t unit_elements,
          int64_t groups, const int32_t *begin, int64_t begin_stride, int32_t *sums, int64_t sum_stride, Work &work) {
    const bool is_tall = rows > 16, is_wide = vectors == 2;
    const int64_t steps = groups / 16;
    // Copies: stores of bytes may change whatever is in memory. Not const: only so do compilers keep them in registers.
    auto task = work.task();
    Work mine = work;
    const int portion = static_cast<int>((mine.count + 2 * steps - 1) / (2 * steps));
    asm volatile("" ::: "memory");  // compilers do not all know that loading a tile reads memory
    const int64_t bytes = sum_stride * 4, tall = 16 * sum_stride;
    if (begin) {
        const int64_t begin_bytes = begin_stride * 4, begin_tall = 16 * begin_stride;
        _tile_loadd(0, begin, begin_bytes);
        if (is_wide) _tile_loadd(1, begin + 16, begin_bytes);
        if (is_tall) _tile_loadd(2, begin + begin_tall, begin_bytes);
        if (is_tall && is_wide) _tile_loadd(3, begin + begin_tall + 16, begin_bytes);
    } else {
        _tile_zero(0);
        if (is_wide) _tile_zero(1);
        if (is_tall) _tile_zero(2);
        if (is_tall && is_wide) _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(6, right + s * 1024, 64);
        _tile_loadd(4, left + s * 64, left_stride);
        _tile_dpbusd(0, 4, 6);
        if (is_wide) {
            _tile_loadd(7, right + unit_elements + s * 1024, 64);
            _tile_dpbusd(1, 4, 7);
        }
        mine.some(task, portion);
        if (is_tall) {
            _tile_loadd(5, left + 16 * left_stride + s * 64, left_stride);
            _tile_dpbusd(2, 5, 6);
            if (is_wide) _tile_dpbusd(3, 5, 7);
        }
        mine.some(task, portion);
    }
    work = mine;
    _tile_stored(0, sums, bytes);
    if (is_wide) _tile_stored(1, sums + 16, bytes);
    if (is_tall) _tile_stored(2, sums + tall, bytes);
    if (is_tall && is_wide) _tile_stored(3, sums + tall + 16, bytes);
}

#include "avx512.inl"
#include "layers.inl"

}  // namespace

const Kernels kAmxInt8 = {"amx-int8", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
