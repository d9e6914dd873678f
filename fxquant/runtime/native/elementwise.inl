// Element by element: floats to bytes, exp, GELU, layer norm. Written once for the including file's `Vec`. Fused
// multiply-adds are written out and contraction is off, so all sets agree bit for bit.

// Plus this, a float below 2^22 is rounded to the nearest integer, which the last bits of the sum then hold.
constexpr float kRounding = 12582912.0f;

static FXQ_INLINE Vec clamp(Vec x, Vec low, Vec high) { return smaller(larger(x, low), high); }

// Byte = clamp(round(x) + zero), UniformQuantizer; x is in units of the scale, low and high are less the zero.
static FXQ_INLINE Whole uniform_byte(Vec x, Vec low, Vec high, Whole zero) {
    return bits_of(clamp(x, low, high) + splat(kRounding)) + zero;
}

struct UniformBytes {
    Vec inverse, low, high;
    Whole zero;
    explicit UniformBytes(const FxqQuantizer &q)
        : inverse(splat(1.0f / q.scale)), low(splat(float(q.low - q.zero))), high(splat(float(q.high - q.zero))),
          zero(splat(static_cast<uint32_t>(q.zero))) {}
    FXQ_INLINE void multiply_inputs(Vec gain) { inverse = inverse * gain; }
    FXQ_INLINE Whole operator()(Vec x) const { return of_units(x * inverse); }
    FXQ_INLINE Whole of_units(Vec x) const { return uniform_byte(x, low, high, zero); }
};

// Index of the level: negatives, zero and small ones, then large ones from zero on; ShiftedRegionsQuantizer.
template <bool has_negative>
struct RegionBytes {
    Vec inverse, small_inverse, large_inverse, small_max, large_max, boundary, next, least;
    Whole base;
    explicit RegionBytes(const FxqQuantizer &q) {
        const int32_t small = (1 << (q.negative ? q.bits - 2 : q.bits - 1)) - 1;
        const double small_step = double(1 << q.shift_small), large_step = double(1 << q.shift_large);
        const double small_top = small * small_step;
        const double large_first = (double(int64_t(small_top / large_step)) + 1) * large_step;
        inverse = splat(1.0f / q.scale);
        small_inverse = splat(float(1 / small_step)), large_inverse = splat(float(1 / large_step));
        small_max = splat(float(small)), large_max = splat(float((1 << (q.bits - 1)) - 1));
        boundary = splat(float((small_top + large_first) / 2));
        next = splat(float(small + 1)), least = splat(has_negative ? float(-small) : 0.0f);
        base = splat(has_negative ? static_cast<uint32_t>(small) : 0u);
    }
    FXQ_INLINE void multiply_inputs(Vec gain) { inverse = inverse * gain; }
    FXQ_INLINE Whole operator()(Vec x) const { return of_units(x * inverse); }
    FXQ_INLINE Whole of_units(Vec units) const {
        const Vec zero = splat(0.0f);
        Vec step = if_less(units, boundary, small_inverse, large_inverse);
        if (has_negative) step = if_less(units, zero, splat(1.0f), step);
        const Vec most = if_less(units, boundary, small_max, large_max);
        return bits_of(clamp(units * step, least, most) + splat(kRounding) + if_less(units, boundary, zero, next)) + base;
    }
};

// Exponent k of x = scale 2^-k, rounded; the last one is zero; Log2Quantizer.
struct Log2Bytes {
    Vec inverse, least;
    explicit Log2Bytes(const FxqQuantizer &q)
        : inverse(splat(1.0f / q.scale)), least(splat(1.0f / float(1 << ((1 << q.bits) - 1)))) {}
    FXQ_INLINE void multiply_inputs(Vec gain) { inverse = inverse * gain; }
    FXQ_INLINE Whole operator()(Vec x) const { return of_units(x * inverse); }
    FXQ_INLINE Whole of_units(Vec x) const {
        // The sum carries into the exponent where the significand is above that of sqrt 2, 0x3504f3.
        const Whole bits = bits_of(clamp(x, least, splat(1.0f)));
        return splat(127u) - ((bits + splat(0x800000u - 0x3504f4u)) >> 23);
    }
};

// Calls task(bytes) with what makes bytes as the quantizer says; those of a codebook are of its grid, until `snap`.
template <class Task>
static void with_bytes(const FxqQuantizer &q, const Task &task) {
    if (q.kind == FXQ_UNIFORM || q.kind == FXQ_CODEBOOK) task(UniformBytes(q));
    else if (q.kind == FXQ_LOG2) task(Log2Bytes(q));
    else if (q.negative) task(RegionBytes<true>(q));
    else task(RegionBytes<false>(q));
}

// Of bytes that are just written, (rows, width) with rows `stride` apart: those of a codebook's grid become its codes.
static void snap(const FxqQuantizer &q, uint8_t *bytes, int64_t rows, int64_t width, int64_t stride) {
    if (q.kind != FXQ_CODEBOOK) return;
    const Codebook book(q);
    if (width == stride) width *= rows, rows = 1;
    for (int64_t r = 0; r < rows; ++r) book.snap(bytes + r * stride, width);
}

// 2^x for x <= 0; below -115 as 2^-115, which no later product makes subnormal, and slow. Relative error 2^-22.
static FXQ_INLINE Vec power_of_two(Vec x) {
    x = larger(x, splat(-115.0f));
    const Vec sum = x + splat(kRounding), r = x - (sum - splat(kRounding));
    Vec p = splat(1.32647273e-3f);
    p = fused(p, r, splat(9.67151299e-3f));
    p = fused(p, r, splat(5.55073358e-2f));
    p = fused(p, r, splat(2.40222424e-1f));
    p = fused(p, r, splat(6.93147004e-1f));
    p = fused(p, r, splat(1.0f));
    return float_of(bits_of(p) + (bits_of(sum) << 23));
}

// GELU of kGeluStep x, times a factor: y Phi(y) = y / 2 + |y| (Phi(|y|) - 1 / 2), the second term by polynomials of
// degree 3 around whole x.
struct ScaledGelu {
    Pieces pieces;
    Vec half;
    explicit ScaledGelu(float factor) : pieces(factor), half(splat(kGeluStep / 2 * factor)) {}
    FXQ_INLINE Vec operator()(Vec x) const {
        const Vec size = size_of(x);
        const Vec sum = smaller(size, splat(float(kGeluPieces - 1))) + splat(kRounding);
        const Vec t = size - (sum - splat(kRounding));
        Vec coefficients[kGeluDegree + 1];
        pieces.take(piece_of(sum), coefficients);
        Vec p = coefficients[kGeluDegree];
#pragma GCC unroll 8
        for (int k = kGeluDegree - 1; k >= 0; --k) p = fused(p, t, coefficients[k]);
        return fused(x, half, p);
    }
};

static void quantize(const FxqQuantizer &quantizer, const float *x, int64_t count, uint8_t *out) {
    with_bytes(quantizer, [=](const auto &bytes) {
        const float *__restrict from = x;
        uint8_t *__restrict to = out;
        for (int64_t i = 0; i < count; i += kLanes) store_bytes(bytes(load(from + i, count - i)), to + i, count - i);
    });
    snap(quantizer, out, 1, count, count);
}

constexpr int64_t kNormRows = 16;

// In three passes over a few rows, since what ends a pass of one row takes long.
static void means_and_gains(const LayerNormCall &call, int64_t row, int64_t rows, float *means, float *gains) {
    const int64_t channels = call.channels;
    const float *__restrict first = call.x + row * channels;
    for (int64_t r = 0; r < rows; ++r) means[r] = sum<1>(first + r * channels, channels, 0.0f) / float(channels);
    for (int64_t r = 0; r < rows; ++r) {
        const float variance = sum<2>(first + r * channels, channels, means[r]) / float(channels);
        gains[r] = 1.0f / __builtin_sqrtf(variance + call.epsilon);
    }
}

template <class Bytes>
static void layer_norm_with(const Bytes &bytes, const LayerNormCall &call, int64_t row, int64_t rows, const float *means,
                            const float *gains) {
    const int64_t channels = call.channels;
    const float *__restrict first = call.x + row * channels, *__restrict weight = call.weight, *__restrict bias = call.bias;
    uint8_t *__restrict out = call.out + row * channels;
    for (int64_t r = 0; r < rows; ++r) {
        const Vec mean = splat(means[r]), gain = splat(gains[r]);
        for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t left = channels - c;
            Vec y = (load(first + r * channels + c, left) - mean) * gain;
            if (weight) y = y * load(weight + c, left);
            if (bias) y = y + load(bias + c, left);
            store_bytes(bytes(y), out + r * channels + c, left);
        }
    }
}

static void layer_norm(const LayerNormCall &call, int64_t row, int64_t rows) {
    float means[kNormRows], gains[kNormRows];
    for (int64_t r = row; r < row + rows; r += kNormRows) {
        const int64_t count = row + rows - r < kNormRows ? row + rows - r : kNormRows;
        means_and_gains(call, r, count, means, gains);
        with_bytes(*call.quantizer, [&](const auto &bytes) { layer_norm_with(bytes, call, r, count, means, gains); });
        snap(*call.quantizer, call.out + r * call.channels, count, call.channels, call.channels);
    }
}
