// The kernels for ARM with SDOT: four products of signed bytes and their sum in one instruction, for four columns. Codes are
// taken as signed by 128 less, which zero-points lose too: sum (a - a0) b = sum (a - 128) b - (a0 - 128) sum b.

#include "kernels.h"

#ifdef FXQ_NEON_EXTENSIONS

#include <arm_neon.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace fxq {
namespace {

#include "one_loop.inl"

constexpr int kMaxVectors = 2, kTileRows = 12, kWholeRows = 1, kInnerStep = 16, kRowBlock = 24;
constexpr int64_t kMostInner = 768;  // of a panel in the first-level cache, with the rows that it meets
constexpr bool kBegins = true;
constexpr int32_t kShift = 128;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }
void arrange(int8_t *, int64_t) {}

#include "neon.inl"
#include "neon_pack.inl"
#include "pieces.inl"

// 24 of the 32 registers hold sums, 6 the bytes of 16 inputs of each row.
template <int rows>
void piece(const ByteLoop &, int, const uint8_t *left, const int8_t *right, const Place &place) {
    int32x4_t sum[4 * rows];
    each<4 * rows>([&](int i) FXQ_ALWAYS { sum[i] = place.begin ? vld1q_s32(place.begin_at(i / 4, i % 4 * 4)) : vdupq_n_s32(0); });
    const uint8_t *row_at[rows];
    each<rows>([&](int r) FXQ_ALWAYS { row_at[r] = left + r * place.left_stride; });
    const int64_t inputs = place.groups * 4;
    for (int64_t k = 0; k < inputs; k += 16, right += 4 * kGroupBytes) {
        int8x16_t codes[rows];
        each<rows>([&](int r) FXQ_ALWAYS {
            codes[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row_at[r] + k), vdupq_n_u8(kShift)));
        });
        each<16>([&](auto i) FXQ_ALWAYS {
            if (i % 2 == 0) keep_order();
            const int8x16_t numbers = vld1q_s8(right + i * 16);
            each<rows>([&](int r) FXQ_ALWAYS {
                int32x4_t &to = sum[4 * r + i % 4];
                to = vdotq_laneq_s32(to, numbers, codes[r], decltype(i)::value / 4);
            });
        });
    }
    each<4 * rows>([&](int i) FXQ_ALWAYS { vst1q_s32(place.at(i / 4, i % 4 * 4), sum[i]); });
}

#include "six_pieces.inl"
#include "lanes.inl"
#include "layers.inl"

}  // namespace

const Kernels kNeonDotprod = {"neon-dotprod", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
