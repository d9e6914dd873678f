// Weights whose sums are sure to fit 16 bits only for few groups of inputs fit for more, but for rare ones: those are taken
// out of the panel into groups of their own, so that for every 16-bit lane of `depth` groups
//
//     most |left| max(sum of weights above zero, sum of those below) <= 32767,
//
// whatever the codes are, and all sums stay exact. Bell-shaped weights of 7 bits so last for 4 groups in the place of 1, and
// of 8 bits for one. Found from the weights that are there, while they are unpacked; how deep, from a layer's first panel.

// Walks through a panel; calls move(group, half, numbers, over) where lanes `over` of half a group go beyond the limit.
// Returns how many groups that were, or more than `most` where there are more.
template <class Move>
static FXQ_INLINE int64_t walk(const int8_t *panel, int64_t groups, int64_t depth, int64_t limit, int64_t most, const Move &move) {
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1), top = _mm256_set1_epi16(static_cast<int16_t>(limit));
    __m256i above[2] = {zero, zero}, below[2] = {zero, zero};
    int64_t count = 0;
    for (int64_t g = 0, left = 0; g < groups && count <= most; ++g, --left) {
        if (left == 0) above[0] = above[1] = below[0] = below[1] = zero, left = depth;
        bool is_over = false;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256i numbers = load_bytes(panel + g * 64 + half * 32);
            const __m256i up = _mm256_maddubs_epi16(one, _mm256_max_epi8(numbers, zero));
            const __m256i down = _mm256_sub_epi16(up, _mm256_maddubs_epi16(one, numbers));
            above[half] = _mm256_add_epi16(above[half], up), below[half] = _mm256_add_epi16(below[half], down);
            const __m256i over = _mm256_cmpgt_epi16(_mm256_max_epi16(above[half], below[half]), top);
            if (_mm256_testz_si256(over, over)) continue;
            above[half] = _mm256_sub_epi16(above[half], _mm256_and_si256(up, over));
            below[half] = _mm256_sub_epi16(below[half], _mm256_and_si256(down, over));
            if (!is_over) ++count;
            move(g, half, count - 1, numbers, over);
            is_over = true;
        }
    }
    return count;
}

// Times of a group, in each of the loops.
constexpr double kOne = 1.05, kTwo = 0.85, kFour = 0.79, kEight = 0.71, kWide16 = 1.3;

// The depth at which a panel takes the least time, with the groups that it would be without.
static int64_t best_depth(const int8_t *panel, int64_t groups, int64_t sure, int64_t limit) {
    struct Choice {
        int64_t depth;
        double time;
    };
    static constexpr Choice kChoices[] = {{8, kEight}, {4, kFour}, {2, kTwo}};
    int64_t best = sure;
    double least = sure >= 4 ? kFour : sure >= 2 ? kTwo : kOne;
    for (const Choice &choice : kChoices) {
        if (choice.depth <= sure || choice.time >= least) continue;
        const int64_t most = static_cast<int64_t>((least - choice.time) / kOne * double(groups));
        const int64_t count = walk(panel, groups, choice.depth, limit, most, [](int64_t, int, int64_t, __m256i, __m256i) {});
        const double time = choice.time + kOne * double(count) / double(groups);
        if (time < least) least = time, best = choice.depth;
    }
    return best;
}

// Whether so many pairs are beyond the limit by themselves that 16 bits times 16 bits takes less.
static bool is_better_wide(const int8_t *panel, int64_t groups, int64_t limit) {
    const int64_t most = static_cast<int64_t>((kWide16 - kOne) / kOne * double(groups));
    return walk(panel, groups, 1, limit, most, [](int64_t, int, int64_t, __m256i, __m256i) {}) > most;
}

// Pairs of weights go out whole, but where one is beyond the limit by itself: of that one only the odd weight.
inline void DeepLoop::prepare(int vector, int8_t *panel, int64_t groups) {
    if (!is_chosen) depth = depth ? best_depth(panel, groups, depth, limit) : 1, takes_pairs = depth > 1, is_chosen = true;
    const int64_t bytes = round_up(groups * 68, 64);
    int8_t *const numbers = static_cast<int8_t *>(scratch(kExtra, size_t(kMaxVectors * bytes))) + vector * bytes;
    int32_t *const group = reinterpret_cast<int32_t *>(numbers + groups * 64);
    const __m256i part = _mm256_set1_epi16(static_cast<int16_t>(takes_pairs ? 0xffff : 0xff00));
    const auto move = [&](int64_t g, int half, int64_t index, __m256i all, __m256i over) FXQ_ALWAYS {
        const __m256i moved = _mm256_and_si256(all, _mm256_and_si256(over, part));
        store_bytes(_mm256_sub_epi8(all, moved), panel + g * 64 + half * 32);
        if (index == extra[vector].count) {  // the first of this group
            store_bytes(_mm256_setzero_si256(), numbers + index * 64), store_bytes(_mm256_setzero_si256(), numbers + index * 64 + 32);
            group[index] = static_cast<int32_t>(g), ++extra[vector].count;
        }
        store_bytes(moved, numbers + index * 64 + half * 32);
    };
    extra[vector] = {0, numbers, group};
    walk(panel, groups, depth, limit, groups, move);
}
