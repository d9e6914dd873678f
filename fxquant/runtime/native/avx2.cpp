// The kernels for AVX2 without VNNI. Its byte multiply adds two products in 16 bits, and saturates; so how large codes and
// weights are decides how many of its results 16 bits hold, and how often these are widened to 32:
//
//     depth = floor(32767 / (2 most |left| most |right|)) groups of 4 inputs,
//
// 8 with weights of 4 bits and codes of 8, 136 with 4 and 4. At 0 (8 bits and 8) both are widened to 16 bits first.

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

constexpr int kMaxVectors = 2, kTileRows = 12, kWholeRows = 1, kInnerStep = 4, kRowBlock = 24;
constexpr int64_t kMostInner = 768;  // of a panel in the first-level cache, with the rows that it meets
constexpr bool kBegins = true, kChooses = true;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }

#include "avx2.inl"

// Groups of a panel of 16 columns that hold what was taken out of it. group: which inputs these are.
struct Extra {
    int64_t count = 0;
    const int8_t *numbers = nullptr;
    const int32_t *group = nullptr;
};

// Bytes times bytes, `depth` groups of inputs summed in 16 bits. limit: what weights of a sum may add up to, above zero or
// below, where they are looked at; see split.inl. 0: they are not.
struct DeepLoop {
    using Left = uint8_t;
    using Right = int8_t;
    int64_t depth, limit = 0;
    bool is_chosen = false, takes_pairs = false;  // by the first panel
    Extra extra[kMaxVectors];
    explicit DeepLoop(int64_t most) : depth(most) {}
    void split(int vector, int8_t *panel, int64_t groups);
};

// 16 bits times 16 bits: exact for all bytes. In a group of 4 inputs the even ones come first.
struct WideLoop {
    using Left = int16_t;
    using Right = int16_t;
    explicit WideLoop(int64_t) {}
};

// Of numbers from 0 to most_left times numbers of most_right in size.
constexpr int64_t kMostSum = 32767;
int64_t depth_of(int64_t most_left, int64_t most_right) {
    const int64_t pair = 2 * most_left * most_right;
    return pair ? kMostSum / pair : kMostInner;
}

// Calls task(loop) with the fastest that is exact.
template <class Task>
void choose_loop(int64_t depth, const Task &task) {
    if (depth) task(DeepLoop(depth));
    else task(WideLoop(depth));
}

// For weights, which are looked at where that pays: so few rows take no longer than looking does.
constexpr int64_t kDeep = 8, kFewRows = 48;
DeepLoop loop_for_weights(int64_t most_left, int64_t most_weight, int64_t rows) {
    const int64_t sure = depth_of(most_left, most_weight);
    DeepLoop loop(sure);
    if (sure == 0 || (sure < kDeep && rows >= kFewRows)) loop.limit = kMostSum / most_left;
    return loop;
}

// Calls task(i) for i below `count`, each a constant: only so do compilers keep arrays of registers in registers.
template <class Task, int... i>
FXQ_INLINE void each_of(const Task &task, std::integer_sequence<int, i...>) {
    (task(std::integral_constant<int, i>()), ...);
}
template <int count, class Task>
FXQ_INLINE void each(const Task &task) {
    each_of(task, std::make_integer_sequence<int, count>());
}

// The same four bytes everywhere.
FXQ_INLINE __m256i four_bytes(const void *from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

// Where a tile of 16 columns reads and writes. begin: what sums begin at, or null.
struct Tile {
    int64_t left_stride, groups, depth;
    Extra extra;
    const int32_t *begin;
    int64_t begin_stride;
    int32_t *sums;
    int64_t sum_stride;
    FXQ_INLINE __m256i first(int row, int half) const {
        return begin ? load_bytes(begin + row * begin_stride + half * 8) : _mm256_setzero_si256();
    }
    FXQ_INLINE int32_t *at(int row, int half) const { return sums + row * sum_stride + half * 8; }
};

// Keeps what was computed in a register, and computes it here: compilers that move all loads to the front run out of
// registers.
FXQ_INLINE void keep(__m256i &a, __m256i &b) { asm volatile("" : "+x"(a), "+x"(b)); }

// `at_once` groups of inputs from `from` on, whose sums 16 bits hold, row by row.
template <int rows, int at_once>
FXQ_INLINE void few_groups(const uint8_t *left, int64_t stride, const int8_t *right, __m256i *sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i numbers[2 * at_once];
    each<2 * at_once>([&](int i) FXQ_ALWAYS { numbers[i] = load_bytes(right + i * 32); });
    each<rows>([&](int r) FXQ_ALWAYS {
        __m256i pairs[2];
        each<at_once>([&](int g) FXQ_ALWAYS {
            const __m256i codes = four_bytes(left + r * stride + g * 4);
            each<2>([&](int v) FXQ_ALWAYS {
                const __m256i found = _mm256_maddubs_epi16(codes, numbers[2 * g + v]);
                pairs[v] = g ? _mm256_add_epi16(pairs[v], found) : found;
            });
        });
        each<2>([&](int v) FXQ_ALWAYS {
            sum[2 * r + v] = _mm256_add_epi32(sum[2 * r + v], _mm256_madd_epi16(pairs[v], ones));
        });
        keep(sum[2 * r], sum[2 * r + 1]);
    });
}

// What sums begin at, and the groups beside the panel.
template <int rows>
FXQ_INLINE void begin_sums(const uint8_t *left, const Tile &tile, __m256i *sum) {
    each<2 * rows>([&](int i) FXQ_ALWAYS { sum[i] = tile.first(i / 2, i % 2); });
    for (int64_t e = 0; e < tile.extra.count; ++e)
        few_groups<rows, 1>(left + tile.extra.group[e] * 4, tile.left_stride, tile.extra.numbers + e * 64, sum);
}

// Sums in 16 bits last for one to three groups: all sums are in registers.
template <int rows, int at_once>
void shallow_tile(const uint8_t *left, const int8_t *right, const Tile &tile) {
    __m256i sum[2 * rows];
    begin_sums<rows>(left, tile, sum);
    int64_t g = 0;
    for (; g + at_once <= tile.groups; g += at_once)
        few_groups<rows, at_once>(left + g * 4, tile.left_stride, right + g * 64, sum);
    for (; g < tile.groups; ++g) few_groups<rows, 1>(left + g * 4, tile.left_stride, right + g * 64, sum);
    each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], tile.at(i / 2, i % 2)); });
}

// They last for more: only these are in registers, or these and the sums in 32 bits where there are few rows.
template <int rows, bool in_memory>
void deep_tile(const uint8_t *left, const int8_t *right, const Tile &tile) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[2 * rows];
    begin_sums<rows>(left, tile, sum);
    if (in_memory) each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], tile.at(i / 2, i % 2)); });
    for (int64_t g = 0; g < tile.groups;) {
        const int64_t end = g + tile.depth < tile.groups ? g + tile.depth : tile.groups;
        __m256i pairs[2 * rows];
        const auto multiply = [&](bool is_first) FXQ_ALWAYS {
            const __m256i low = load_bytes(right + g * 64), high = load_bytes(right + g * 64 + 32);
            each<rows>([&](int r) FXQ_ALWAYS {
                const __m256i codes = four_bytes(left + r * tile.left_stride + g * 4);
                const __m256i a = _mm256_maddubs_epi16(codes, low), b = _mm256_maddubs_epi16(codes, high);
                pairs[2 * r] = is_first ? a : _mm256_add_epi16(pairs[2 * r], a);
                pairs[2 * r + 1] = is_first ? b : _mm256_add_epi16(pairs[2 * r + 1], b);
            });
        };
        multiply(true);
        while (++g < end) multiply(false);
        each<2 * rows>([&](int i) FXQ_ALWAYS {
            const __m256i found = _mm256_madd_epi16(pairs[i], ones);
            int32_t *const at = tile.at(i / 2, i % 2);
            if (in_memory) store_bytes(_mm256_add_epi32(load_bytes(at), found), at);
            else sum[i] = _mm256_add_epi32(sum[i], found);
        });
    }
    if (!in_memory) each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], tile.at(i / 2, i % 2)); });
}

template <int rows>
void wide_tile(const int16_t *left, const int16_t *right, const Tile &tile) {
    __m256i sum[2 * rows];
    each<2 * rows>([&](int i) FXQ_ALWAYS { sum[i] = tile.first(i / 2, i % 2); });
    for (int64_t pair = 0; pair < 2 * tile.groups; ++pair) {
        const __m256i low = load_bytes(right + pair * 32), high = load_bytes(right + pair * 32 + 16);
        each<rows>([&](int r) FXQ_ALWAYS {
            const __m256i codes = four_bytes(left + r * tile.left_stride + pair * 2);
            sum[2 * r] = _mm256_add_epi32(sum[2 * r], _mm256_madd_epi16(codes, low));
            sum[2 * r + 1] = _mm256_add_epi32(sum[2 * r + 1], _mm256_madd_epi16(codes, high));
            keep(sum[2 * r], sum[2 * r + 1]);
        });
    }
    each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], tile.at(i / 2, i % 2)); });
}

// The tiles of one loop by their rows.
template <class Loop>
struct Tiles {
    typedef void (*Run)(const typename Loop::Left *, const typename Loop::Right *, const Tile &);
    int most;
    Run run[6];
};
FXQ_INLINE const Tiles<DeepLoop> &tiles_for(const DeepLoop &loop) {
    static constexpr Tiles<DeepLoop> one = {4, {shallow_tile<1, 1>, shallow_tile<2, 1>, shallow_tile<3, 1>, shallow_tile<4, 1>}},
                                     two = {4, {shallow_tile<1, 2>, shallow_tile<2, 2>, shallow_tile<3, 2>, shallow_tile<4, 2>}},
                                     some = {3, {deep_tile<1, false>, deep_tile<2, false>, deep_tile<3, false>}},
                                     many = {4, {deep_tile<1, true>, deep_tile<2, true>, deep_tile<3, true>, deep_tile<4, true>}};
    return loop.depth < 2 ? one : loop.depth < 4 ? two : loop.depth < kDeep ? some : many;
}
FXQ_INLINE const Tiles<WideLoop> &tiles_for(const WideLoop &) {
    static constexpr Tiles<WideLoop> all = {6, {wide_tile<1>, wide_tile<2>, wide_tile<3>, wide_tile<4>, wide_tile<5>, wide_tile<6>}};
    return all;
}
FXQ_INLINE Tile tile_of(const DeepLoop &loop, int vector) { return {0, 0, loop.depth, loop.extra[vector], nullptr, 0, nullptr, 0}; }
FXQ_INLINE Tile tile_of(const WideLoop &, int) { return {0, 0, 0, {}, nullptr, 0, nullptr, 0}; }

template <class Loop, class Work>
void tile(const Loop &loop, int rows, int vectors, const typename Loop::Left *left, int64_t left_stride,
          const typename Loop::Right *right, int64_t unit_elements, int64_t groups, const int32_t *begin,
          int64_t begin_stride, int32_t *sums, int64_t sum_stride, Work &) {
    const Tiles<Loop> &tiles = tiles_for(loop);
    for (int pieces = (rows + tiles.most - 1) / tiles.most; rows > 0; --pieces) {  // of equal heights
        const int height = (rows + pieces - 1) / pieces;
        for (int v = 0; v < vectors; ++v) {
            Tile tile = tile_of(loop, v);
            tile.left_stride = left_stride, tile.groups = groups;
            tile.begin = begin ? begin + v * 16 : nullptr, tile.begin_stride = begin_stride;
            tile.sums = sums + v * 16, tile.sum_stride = sum_stride;
            tiles.run[height - 1](left, right + v * unit_elements, tile);
        }
        rows -= height, left += height * left_stride, sums += height * sum_stride;
        if (begin) begin += height * begin_stride;
    }
}

#include "split.inl"

// Bytes to the left of a product as 16 bits: in every four, the even ones first.
void widen_left(const uint8_t *bytes, int64_t count, int16_t *out) {
    const __m128i even_first = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + i));
        store_bytes(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(sixteen, even_first)), out + i);
    }
    for (; i < count; i += 4) out[i] = bytes[i], out[i + 1] = bytes[i + 2], out[i + 2] = bytes[i + 1], out[i + 3] = bytes[i + 3];
}

// Bytes to the right: of each group of [16 columns][4 inputs] the even inputs, then the odd ones.
void widen_right(const int8_t *bytes, int64_t groups, int16_t *out) {
    for (int64_t g = 0; g < groups; ++g, bytes += 64, out += 64)
        for (int half = 0; half < 2; ++half) {
            const __m256i columns = load_bytes(bytes + half * 32);
            store_bytes(_mm256_srai_epi16(_mm256_slli_epi16(columns, 8), 8), out + half * 16);
            store_bytes(_mm256_srai_epi16(columns, 8), out + 32 + half * 16);
        }
}

#include "elementwise.inl"
#include "epilogue.inl"
#include "reach.inl"
#include "linear.inl"
#include "attention.inl"

}  // namespace

const Kernels kAvx2 = {"avx2", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
