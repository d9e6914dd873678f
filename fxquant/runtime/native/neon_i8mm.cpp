// The kernels for ARM with USMMLA: a product of 2 rows of 8 unsigned bytes and 2 columns of 8 signed ones, added to 2 x 2
// sums, in one instruction. Panels are rearranged for it: of two groups of inputs, each column's eight lie side by side.

#include "kernels.h"

#ifdef FXQ_NEON_EXTENSIONS

#include <arm_neon.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

namespace fxq {
namespace {

constexpr int kMaxVectors = 2, kTileRows = 12, kWholeRows = 1, kInnerStep = 16, kRowBlock = 24;
constexpr int64_t kMostInner = 768;  // of a panel in the first-level cache, with the rows that it meets
constexpr bool kBegins = true, kChooses = false;
constexpr int32_t kShift = 0;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }

// Two groups of [16 columns][4 inputs] become one of [16 columns][8 inputs].
void arrange(int8_t *panel, int64_t groups) {
    for (int64_t g = 0; g < groups; g += 2, panel += 2 * kGroupBytes) {
        int32x4_t first[4], second[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            first[i] = vreinterpretq_s32_s8(vld1q_s8(panel + i * 16));
            second[i] = vreinterpretq_s32_s8(vld1q_s8(panel + kGroupBytes + i * 16));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            vst1q_s8(panel + i * 32, vreinterpretq_s8_s32(vzip1q_s32(first[i], second[i])));
            vst1q_s8(panel + i * 32 + 16, vreinterpretq_s8_s32(vzip2q_s32(first[i], second[i])));
        }
    }
}

#include "neon.inl"
#include "neon_pack.inl"
#include "pieces.inl"

// One loop for all bytes, whose panels have an order of their own.
struct PairLoop {
    using Left = uint8_t;
    using Right = int8_t;
    explicit PairLoop(int64_t) {}
    static constexpr bool prepares() { return true; }
    static void prepare(int, int8_t *panel, int64_t groups) { arrange(panel, groups); }
};
using Right = PairLoop::Right;

constexpr int64_t depth_of(int64_t, int64_t) { return 1; }
template <class Panel, class Task>
void choose_for_weights(int64_t, int64_t, int64_t, const Panel &, const Task &task) {
    task(PairLoop(1));
}
template <class Task>
void choose_loop(int64_t depth, const Task &task) {
    task(PairLoop(depth));
}

// In assembly, as compilers that are given the intrinsic move sums from one register to another in every loop.
FXQ_INLINE void add_products(int32x4_t &sum, uint8x16_t codes, int8x16_t numbers) {
    asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(numbers));
}

// 24 of the 32 registers hold sums, each 2 rows and 2 columns; 6 the bytes of 16 inputs of three pairs of rows. Where the
// number of rows is odd, the last one is taken twice.
template <int rows>
void piece(const PairLoop &, int, const uint8_t *left, const int8_t *right, const Place &place) {
    constexpr int pairs = (rows + 1) / 2;
    int32x4_t sum[8 * pairs];
    each<8 * pairs>([&](int i) FXQ_ALWAYS { sum[i] = vdupq_n_s32(0); });
    const uint8_t *row_at[rows];
    each<rows>([&](int r) FXQ_ALWAYS { row_at[r] = left + r * place.left_stride; });
    const int64_t inputs = place.groups * 4;
    for (int64_t k = 0; k < inputs; k += 16, right += 4 * kGroupBytes) {
        uint8x16_t codes[2][pairs];
        each<pairs>([&](int p) FXQ_ALWAYS {
            const auto row = [&](int r) FXQ_ALWAYS { return vreinterpretq_u64_u8(vld1q_u8(row_at[r] + k)); };
            const uint64x2_t a = row(2 * p), b = 2 * p + 1 < rows ? row(2 * p + 1) : a;
            codes[0][p] = vreinterpretq_u8_u64(vzip1q_u64(a, b)), codes[1][p] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
        });
        each<16>([&](int i) FXQ_ALWAYS {
            if (i % 2 == 0) keep_order();
            const int8x16_t numbers = vld1q_s8(right + i * 16);
            each<pairs>([&](int p) FXQ_ALWAYS { add_products(sum[8 * p + i % 8], codes[i / 8][p], numbers); });
        });
    }
    each<4 * rows>([&](int i) FXQ_ALWAYS {
        const int row = i / 4, column = i % 4 * 4;
        const int64x2_t a = vreinterpretq_s64_s32(sum[row / 2 * 8 + column / 2]), b = vreinterpretq_s64_s32(sum[row / 2 * 8 + column / 2 + 1]);
        const int32x4_t found = vreinterpretq_s32_s64(row % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
        vst1q_s32(place.at(row, column), place.begin ? vaddq_s32(vld1q_s32(place.begin_at(row, column)), found) : found);
    });
}

#include "six_pieces.inl"
#include "lanes.inl"
#include "layers.inl"

}  // namespace

const Kernels kNeonI8mm = {"neon-i8mm", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
