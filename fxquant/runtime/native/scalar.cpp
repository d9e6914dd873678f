// The kernels in plain C++: the reference for the others, and what runs where nothing better is known.

#include "kernels.h"

namespace fxq {
namespace {

#include "one_loop.inl"

constexpr int kMaxVectors = 1, kTileRows = 4, kWholeRows = 1, kInnerStep = 4, kRowBlock = 24;
constexpr int64_t kMostInner = FXQ_MAX_INNER;  // all inputs at once
constexpr bool kBegins = false;  // all sums begin at zero
constexpr int32_t kShift = 0;
constexpr int kRegisterBytes = 16;

struct Session {};

int vectors_for(int64_t) { return 1; }
int rows_for(int) { return 4; }

// sums[r][c] = sum over groups g and i < 4 of left[r][4 g + i] right[c / 16][g][c % 16][i].
template <class Work>
void tile(const ByteLoop &, int rows, int, const Left *left, int64_t left_stride, const Right *right, int64_t, int64_t groups,
          const int32_t *, int64_t, int32_t *sums, int64_t sum_stride, Work &) {
    for (int r = 0; r < rows; ++r) {
        int32_t row[16] = {};
        for (int64_t g = 0; g < groups; ++g)
            for (int c = 0; c < 16; ++c)
                for (int i = 0; i < 4; ++i) row[c] += left[r * left_stride + g * 4 + i] * right[g * 64 + c * 4 + i];
        for (int c = 0; c < 16; ++c) sums[r * sum_stride + c] = row[c];
    }
}

#include "portable.inl"
#include "lanes.inl"
#include "layers.inl"

}  // namespace

const Kernels kScalar = {"scalar", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq
