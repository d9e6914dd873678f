// Element by element: floats to bytes, exp, GELU, layer norm. Written once for the including file's `Vec`. Fused
// multiply-adds are written out and contraction is off, so all sets agree bit for bit.

// Plus this, a float below 2^22 is rounded to the nearest integer, which the last bits of the sum then hold.
constexpr float kRounding = 12582912.0f;

static inline Vec clamp(Vec x, Vec low, Vec high) { return smaller(larger(x, low), high); }

// Byte = clamp(round(x) + zero), UniformQuantizer; x is in units of the scale, low and high are less the zero.
static inline Whole uniform_byte(Vec x, Vec low, Vec high, Whole zero) {
    return bits_of(clamp(x, low, high) + kRounding) + zero;
}

struct UniformBytes {
    Vec inverse, low, high;
    uint32_t zero;
    explicit UniformBytes(const FxqQuantizer &q)
        : inverse(splat(1.0f / q.scale)), low(splat(float(q.low - q.zero))), high(splat(float(q.high - q.zero))),
          zero(static_cast<uint32_t>(q.zero)) {}
    inline Whole operator()(Vec x) const { return uniform_byte(x * inverse, low, high, Whole{} + zero); }
};

// Index of the level: negatives, zero and small ones, then large ones from zero on; ShiftedRegionsQuantizer.
struct RegionBytes {
    Vec inverse, small_inverse, large_inverse, small_max, large_max, boundary, next, least;
    uint32_t base;
    explicit RegionBytes(const FxqQuantizer &q) {
        const int32_t small = (1 << (q.negative ? q.bits - 2 : q.bits - 1)) - 1;
        const double small_step = double(1 << q.shift_small), large_step = double(1 << q.shift_large);
        const double small_top = small * small_step;
        const double large_first = (double(int64_t(small_top / large_step)) + 1) * large_step;
        inverse = splat(1.0f / q.scale);
        small_inverse = splat(float(1 / small_step)), large_inverse = splat(float(1 / large_step));
        small_max = splat(float(small)), large_max = splat(float((1 << (q.bits - 1)) - 1));
        boundary = splat(float((small_top + large_first) / 2));
        next = small_max + 1.0f;
        base = q.negative ? static_cast<uint32_t>(small) : 0;
        least = splat(-float(base));
    }
    inline Whole operator()(Vec x) const {
        const Vec zero = splat(0.0f), units = x * inverse;
        const Vec steps = units * if_less(units, boundary, small_inverse, large_inverse);
        const Vec most = if_less(units, boundary, small_max, large_max);
        const Vec positive = clamp(steps, zero, most) + kRounding + if_less(units, boundary, zero, next);
        return bits_of(positive) + bits_of(clamp(units, least, zero) + kRounding) + base;
    }
};

// Exponent k of x = scale 2^-k, rounded; the last one is zero; Log2Quantizer.
struct Log2Bytes {
    Vec inverse, least;
    explicit Log2Bytes(const FxqQuantizer &q)
        : inverse(splat(1.0f / q.scale)), least(splat(1.0f / float(1 << ((1 << q.bits) - 1)))) {}
    inline Whole operator()(Vec x) const {
        // The sum carries into the exponent where the significand is above that of sqrt 2, 0x3504f3.
        const Whole bits = bits_of(clamp(x * inverse, least, splat(1.0f)));
        return 127u - ((bits + (0x800000u - 0x3504f4u)) >> 23);
    }
};

// e^x for x <= 0; below -87 as e^-87. Cody-Waite reduction, a polynomial of degree 5: relative error 2^-22.
static inline Vec exponential(Vec x) {
    x = larger(x, splat(-87.0f));
    const Vec sum = x * 1.44269504f + kRounding, n = sum - kRounding;
    Vec r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    Vec p = splat(8.31252057e-3f);
    p = fused(p, r, splat(4.18901555e-2f));
    p = fused(p, r, splat(1.66671142e-1f));
    p = fused(p, r, splat(4.99992311e-1f));
    p = fused(p, r, splat(1.0f));
    p = fused(p, r, splat(1.0f));
    return float_of(bits_of(p) + (bits_of(sum) << 23));
}

// x Phi(x) = x / 2 + |x| (Phi(|x|) - 1 / 2); the second term by polynomials of degree 4 around multiples of 3 / 16.
static inline Vec gelu(Vec x) {
    const Vec size = larger(x, -x);
    const Vec sum = smaller(size * (1 / kGeluStep), splat(kGeluPieces - 1)) + kRounding;
    const Vec t = fused(sum - kRounding, splat(-kGeluStep), size);
    const Whole piece = bits_of(sum) & (kGeluPieces - 1);
    Vec p = entry(gelu_table[4], piece);
    p = fused(p, t, entry(gelu_table[3], piece));
    p = fused(p, t, entry(gelu_table[2], piece));
    p = fused(p, t, entry(gelu_table[1], piece));
    p = fused(p, t, entry(gelu_table[0], piece));
    return fused(x, splat(0.5f), p);
}

template <class Bytes>
static void quantize_with(const Bytes &bytes, const float *__restrict x, int64_t count, uint8_t *__restrict out) {
    for (int64_t i = 0; i < count; i += kLanes) store_bytes(bytes(load(x + i, count - i)), out + i, count - i);
}

static void quantize(const FxqQuantizer &quantizer, const float *x, int64_t count, uint8_t *out) {
    if (quantizer.kind == FXQ_UNIFORM) quantize_with(UniformBytes(quantizer), x, count, out);
    else if (quantizer.kind == FXQ_REGIONS) quantize_with(RegionBytes(quantizer), x, count, out);
    else quantize_with(Log2Bytes(quantizer), x, count, out);
}

// Sixteen partial sums or maxima, the same in every instruction set.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

static inline float sum_of(const Lanes &lanes) {
    float total[8];
    for (int i = 0; i < 8; ++i) total[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) total[i] += total[i + 4];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

static inline Lanes lanes_at(const float *x) { return *reinterpret_cast<const Lanes *>(x); }

// Sum of (x - center)^power.
template <int power>
static float sum(const float *x, int64_t count, float center) {
    const auto term = [center](auto value) {
        const auto difference = value - center;
        return power == 2 ? difference * difference : difference;
    };
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int part = 0; part < 4; ++part) sums[part] += term(lanes_at(x + i + part * 16));
    for (; i + 16 <= count; i += 16) sums[0] += term(lanes_at(x + i));
    float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < count; ++i) total += term(x[i]);
    return total;
}

template <class Bytes>
static void layer_norm_with(const Bytes &bytes, const LayerNormCall &call, int64_t row) {
    const int64_t channels = call.channels;
    const float *__restrict x = call.x + row * channels, *__restrict weight = call.weight, *__restrict bias = call.bias;
    uint8_t *__restrict out = call.out + row * channels;
    const float mean = sum<1>(x, channels, 0.0f) / float(channels);
    const float gain = 1.0f / __builtin_sqrtf(sum<2>(x, channels, mean) / float(channels) + call.epsilon);
    for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t left = channels - c;
        Vec y = (load(x + c, left) - mean) * gain;
        if (weight) y = y * load(weight + c, left);
        if (bias) y = y + load(bias + c, left);
        store_bytes(bytes(y), out + c, left);
    }
}

static void layer_norm(const LayerNormCall &call, int64_t row, int64_t rows) {
    const FxqQuantizer &q = *call.quantizer;
    for (int64_t r = row; r < row + rows; ++r) {
        if (q.kind == FXQ_UNIFORM) layer_norm_with(UniformBytes(q), call, r);
        else if (q.kind == FXQ_REGIONS) layer_norm_with(RegionBytes(q), call, r);
        else layer_norm_with(Log2Bytes(q), call, r);
    }
}
