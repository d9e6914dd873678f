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
constexpr int32_t kShift = 0;

struct Session {};

int vectors_for(int64_t units) { return units < 2 ? 1 : 2; }
int rows_for(int) { return kTileRows; }

#include "avx2.inl"
#include "tile256.inl"

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
    bool prepares() const { return limit != 0; }
    void prepare(int vector, int8_t *panel, int64_t groups);
};

// 16 bits times 16 bits: exact for all bytes. In a group of 4 inputs the even ones come first.
struct WideLoop {
    using Left = int16_t;
    using Right = int16_t;
    explicit WideLoop(int64_t) {}
    static constexpr bool prepares() { return false; }
    void prepare(int, int16_t *, int64_t) {}
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

constexpr int64_t kDeep = 8, kFewRows = 48;  // so few take no longer than looking at weights does

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
FXQ_INLINE void begin_sums(const Extra &extra, const uint8_t *left, const Place &place, __m256i *sum) {
    each<2 * rows>([&](int i) FXQ_ALWAYS { sum[i] = first_of(place, i / 2, i % 2); });
    for (int64_t e = 0; e < extra.count; ++e)
        few_groups<rows, 1>(left + extra.group[e] * 4, place.left_stride, extra.numbers + e * 64, sum);
}

template <int rows>
FXQ_INLINE void store_sums(const __m256i *sum, const Place &place) {
    each<2 * rows>([&](int i) FXQ_ALWAYS { store_bytes(sum[i], place.at(i / 2, i % 2 * 8)); });
}

// Sums in 16 bits last for one to three groups: all sums are in registers.
template <int rows, int at_once>
void shallow(const DeepLoop &loop, int vector, const uint8_t *left, const int8_t *right, const Place &place) {
    __m256i sum[2 * rows];
    begin_sums<rows>(loop.extra[vector], left, place, sum);
    int64_t g = 0;
    for (; g + at_once <= place.groups; g += at_once)
        few_groups<rows, at_once>(left + g * 4, place.left_stride, right + g * 64, sum);
    for (; g < place.groups; ++g) few_groups<rows, 1>(left + g * 4, place.left_stride, right + g * 64, sum);
    store_sums<rows>(sum, place);
}

// They last for more: only these are in registers, or these and the sums in 32 bits where there are few rows.
template <int rows, bool in_memory>
void deep(const DeepLoop &loop, int vector, const uint8_t *left, const int8_t *right, const Place &place) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int64_t stride = place.left_stride, groups = place.groups, depth = loop.depth;
    __m256i sum[2 * rows];
    begin_sums<rows>(loop.extra[vector], left, place, sum);
    if (in_memory) store_sums<rows>(sum, place);
    for (int64_t g = 0; g < groups;) {
        const int64_t end = g + depth < groups ? g + depth : groups;
        __m256i pairs[2 * rows];
        const auto multiply = [&](bool is_first) FXQ_ALWAYS {
            const __m256i low = load_bytes(right + g * 64), high = load_bytes(right + g * 64 + 32);
            each<rows>([&](int r) FXQ_ALWAYS {
                const __m256i codes = four_bytes(left + r * stride + g * 4);
                const __m256i a = _mm256_maddubs_epi16(codes, low), b = _mm256_maddubs_epi16(codes, high);
                pairs[2 * r] = is_first ? a : _mm256_add_epi16(pairs[2 * r], a);
                pairs[2 * r + 1] = is_first ? b : _mm256_add_epi16(pairs[2 * r + 1], b);
            });
        };
        multiply(true);
        while (++g < end) multiply(false);
        each<2 * rows>([&](int i) FXQ_ALWAYS {
            const __m256i found = _mm256_madd_epi16(pairs[i], ones);
            int32_t *const at = place.at(i / 2, i % 2 * 8);
            if (in_memory) store_bytes(_mm256_add_epi32(load_bytes(at), found), at);
            else sum[i] = _mm256_add_epi32(sum[i], found);
        });
    }
    if (!in_memory) store_sums<rows>(sum, place);
}

template <int rows>
void wide(const WideLoop &, int, const int16_t *left, const int16_t *right, const Place &place) {
    __m256i sum[2 * rows];
    each<2 * rows>([&](int i) FXQ_ALWAYS { sum[i] = first_of(place, i / 2, i % 2); });
    for (int64_t pair = 0; pair < 2 * place.groups; ++pair) {
        const __m256i low = load_bytes(right + pair * 32), high = load_bytes(right + pair * 32 + 16);
        each<rows>([&](int r) FXQ_ALWAYS {
            const __m256i codes = four_bytes(left + r * place.left_stride + pair * 2);
            sum[2 * r] = _mm256_add_epi32(sum[2 * r], _mm256_madd_epi16(codes, low));
            sum[2 * r + 1] = _mm256_add_epi32(sum[2 * r + 1], _mm256_madd_epi16(codes, high));
            keep(sum[2 * r], sum[2 * r + 1]);
        });
    }
    store_sums<rows>(sum, place);
}

FXQ_INLINE const Pieces16<DeepLoop> &pieces_for(const DeepLoop &loop) {
    static constexpr Pieces16<DeepLoop> one = {4, {shallow<1, 1>, shallow<2, 1>, shallow<3, 1>, shallow<4, 1>}},
                                        two = {4, {shallow<1, 2>, shallow<2, 2>, shallow<3, 2>, shallow<4, 2>}},
                                        some = {3, {deep<1, false>, deep<2, false>, deep<3, false>}},
                                        many = {4, {deep<1, true>, deep<2, true>, deep<3, true>, deep<4, true>}};
    return loop.depth < 2 ? one : loop.depth < 4 ? two : loop.depth < kDeep ? some : many;
}
FXQ_INLINE const Pieces16<WideLoop> &pieces_for(const WideLoop &) {
    static constexpr Pieces16<WideLoop> all = {6, {wide<1>, wide<2>, wide<3>, wide<4>, wide<5>, wide<6>}};
    return all;
}

template <class Loop, class Work>
void tile(const Loop &loop, int rows, int vectors, const typename Loop::Left *left, int64_t left_stride,
          const typename Loop::Right *right, int64_t unit_elements, int64_t groups, const int32_t *begin,
          int64_t begin_stride, int32_t *sums, int64_t sum_stride, Work &) {
    run_pieces(pieces_for(loop), loop, rows, vectors, left, right, unit_elements,
               {left_stride, groups, begin, begin_stride, sums, sum_stride});
}

#include "split.inl"

// Calls task(loop) for weights, which are looked at where that pays; first_panel(groups): the first 16 columns of them.
template <class Panel, class Task>
void choose_for_weights(int64_t most_left, int64_t most_weight, int64_t rows, const Panel &first_panel, const Task &task) {
    const int64_t sure = depth_of(most_left, most_weight);
    DeepLoop loop(sure);
    if (sure == 0 || (sure < kDeep && rows >= kFewRows)) loop.limit = kMostSum / most_left;
    if (sure == 0 && rows >= kFewRows) {
        int64_t groups = 0;
        const int8_t *const panel = first_panel(&groups);
        if (is_better_wide(panel, groups, loop.limit)) return task(WideLoop(0));
    }
    task(loop);
}

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

#include "layers.inl"

}  // namespace

const Kernels kAvx2 = {"avx2", linear, matmul, attention, layer_norm, quantize};

}  // namespace fxq

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
