// Sums of floats, in the order that all sets keep.

// Sixteen partial sums, and their sum in the order that all sets keep.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

static FXQ_INLINE float sum_of(const Lanes &lanes) {
    float total[8];
    for (int i = 0; i < 8; ++i) total[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) total[i] += total[i + 4];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// Sum of (x - center)^power.
template <int power>
static float sum(const float *x, int64_t count, float center) {
    Lanes sums[4] = {};
    int64_t i = 0;
    const auto add = [&](Lanes *to, int64_t at) {
        const Lanes difference = *reinterpret_cast<const Lanes *>(x + at) - center;
        *to += power == 2 ? difference * difference : difference;
    };
    for (; i + 64 <= count; i += 64)
        for (int part = 0; part < 4; ++part) add(sums + part, i + part * 16);
    for (; i + 16 <= count; i += 16) add(sums, i);
    if (i < count) {
        float rest[16];
        for (int lane = 0; lane < 16; ++lane) rest[lane] = i + lane < count ? x[i + lane] : center;
        x = rest, add(sums, 0);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
