// The kernels for ARM with nothing but NEON: bytes times bytes are summed in 16 bits over as many groups of inputs as these
// are sure to hold, then added in pairs to sums in 32 bits. Codes are taken as signed by 128 less, as with SDOT, so
//
//     depth = floor(32767 / (128 most |weight|)) groups of 4 inputs, at most 4:
//
// 4 with weights of 6 bits and less, 2 of 7 bits, and of 8 bits where none is -128; else 1.

#include "kernels.h"

#ifdef FXQ_NEON

#include <arm_neon.h>

namespace fxq {
namespace {

constexpr int kMaxVectors = 2, kTileRows = 12, kWholeRows = 1, kInnerStep = 16, kRowBlock = 24;
constexpr int64_t kMostInner = 768;  // of a panel in the first-level cache, with the rows that it meets
constexpr bool kBegins = true, kChooses = false;
constexpr int32_t kShift = 128;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }
void arrange(int8_t *, int64_t) {}

#include "neon.inl"
#include "neon_pack.inl"
#include "pieces.inl"

// Bytes times bytes, `depth` groups of inputs summed in 16 bits; 0: each panel is looked at.
struct ChainLoop {
    using Left = uint8_t;
    using Right = int8_t;
    int64_t depth;
    int64_t found[kMaxVectors] = {};  // of panels that were looked at
    explicit ChainLoop(int64_t most) : depth(most) {}
    bool prepares() const { return depth == 0; }
    void prepare(int vector, const int8_t *panel, int64_t groups) {
        int8x16_t least = vdupq_n_s8(0);
        for (int64_t i = 0; i < groups * kGroupBytes; i += 16) least = vminq_s8(least, vld1q_s8(panel + i));
        found[vector] = vminvq_s8(least) == -128 ? 1 : 2;
    }
};
using Right = ChainLoop::Right;

// The codes' own reach is not looked at.
constexpr int64_t depth_of(int64_t, int64_t most_right) {
    const int64_t depth = 32767 / (kShift * most_right);
    return depth >= 4 ? 4 : depth >= 2 ? 2 : 1;
}
template <class Panel, class Task>
void choose_for_weights(int64_t most_left, int64_t most_weight, int64_t, const Panel &, const Task &task) {
    task(ChainLoop(most_weight == 128 ? 0 : depth_of(most_left, most_weight)));
}
template <class Task>
void choose_loop(int64_t depth, const Task &task) {
    task(ChainLoop(depth));
}

// Half a group's columns, `depth` groups: 16 of the registers hold sums, of two neighbours each, 8 the numbers.
template <int rows, int depth>
FXQ_INLINE void half_piece(int column, const uint8_t *left, const int8_t *right, const Place &place) {
    int32x4_t sum[4 * rows];
    each<4 * rows>([&](int i) FXQ_ALWAYS { sum[i] = vdupq_n_s32(0); });
    right += column * 4;
    const uint8_t *row_at[rows];
    each<rows>([&](int r) FXQ_ALWAYS { row_at[r] = left + r * place.left_stride; });
    const int64_t inputs = place.groups * 4;
    for (int64_t k = 0; k < inputs; k += 16) {
        int8x16_t codes[rows];
        each<rows>([&](int r) FXQ_ALWAYS {
            codes[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row_at[r] + k), vdupq_n_u8(kShift)));
        });
        each<4 / depth>([&](auto part) FXQ_ALWAYS {
            int8x16_t numbers[2 * depth];
            each<2 * depth>([&](int i) FXQ_ALWAYS { numbers[i] = vld1q_s8(right + i / 2 * kGroupBytes + i % 2 * 16); });
            right += depth * kGroupBytes;
            each<rows>([&](int r) FXQ_ALWAYS {
                keep_order();
                int16x8_t pairs[4];
                each<depth>([&](auto step) FXQ_ALWAYS {
                    constexpr int group = decltype(part)::value * depth + decltype(step)::value;
                    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(codes[r]), group));
                    each<2>([&](int i) FXQ_ALWAYS {
                        const int8x16_t eight = numbers[2 * step + i];
                        pairs[2 * i] = step ? vmlal_s8(pairs[2 * i], vget_low_s8(four), vget_low_s8(eight)) : vmull_s8(vget_low_s8(four), vget_low_s8(eight));
                        pairs[2 * i + 1] = step ? vmlal_high_s8(pairs[2 * i + 1], four, eight) : vmull_high_s8(four, eight);
                    });
                });
                each<4>([&](int i) FXQ_ALWAYS { sum[4 * r + i] = vpadalq_s16(sum[4 * r + i], pairs[i]); });
            });
        });
    }
    each<2 * rows>([&](int i) FXQ_ALWAYS {
        const int row = i / 2, at = column + i % 2 * 4;
        const int32x4_t found = vpaddq_s32(sum[2 * i], sum[2 * i + 1]);
        vst1q_s32(place.at(row, at), place.begin ? vaddq_s32(vld1q_s32(place.begin_at(row, at)), found) : found);
    });
}

template <int rows, int depth>
void piece(const ChainLoop &, int, const uint8_t *left, const int8_t *right, const Place &place) {
    half_piece<rows, depth>(0, left, right, place);
    half_piece<rows, depth>(8, left, right, place);
}

template <int rows>
void looked_at(const ChainLoop &loop, int vector, const uint8_t *left, const int8_t *right, const Place &place) {
    loop.found[vector] == 2 ? piece<rows, 2>(loop, vector, left, right, place) : piece<rows, 1>(loop, vector, left, right, place);
}

template <class Work>
void tile(const ChainLoop &loop, int rows, int vectors, const uint8_t *left, int64_t left_stride, const int8_t *right,
          int64_t unit_elements, int64_t groups, const int32_t *begin, int64_t begin_stride, int32_t *sums,
          int64_t sum_stride, Work &) {
    static constexpr Pieces16<ChainLoop> one = {4, {piece<1, 1>, piece<2, 1>, piece<3, 1>, piece<4, 1>}},
                                         two = {4, {piece<1, 2>, piece<2, 2>, piece<3, 2>, piece<4, 2>}},
                                         most = {4, {piece<1, 4>, piece<2, 4>, piece<3, 4>, piece<4, 4>}},
                                         any = {4, {looked_at<1>, looked_at<2>, looked_at<3>, looked_at<4>}};
    const auto &pieces = loop.depth == 0 ? any : loop.depth == 1 ? one : loop.depth == 2 ? two : most;
    run_pieces(pieces, loop, rows, vectors, left, right, unit_elements,
               {left_stride, groups, begin, begin_stride, sums, sum_stride});
}

#include "lanes.inl"
#include "layers.inl"

}  // namespace

const Kernels kNeon = {"neon", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#endif
