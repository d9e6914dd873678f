// Element by element: floats to bytes, exp, GELU. Plain code that the compiler turns into vectors of the including
// file's instruction set. Fused multiply-adds are written out and contraction is off, so all sets agree bit for bit.

static inline float larger(float a, float b) { return a > b ? a : b; }  // b where a is NaN
static inline float smaller(float a, float b) { return a < b ? a : b; }

static inline int32_t bits_of(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
static inline float float_of(int32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// Byte = clamp(round(x / scale) + zero), UniformQuantizer.
static inline uint8_t uniform_byte(float x, float inverse, float zero, float low, float high) {
    const float code = __builtin_rintf(x * inverse) + zero;
    return static_cast<uint8_t>(static_cast<int32_t>(smaller(larger(code, low), high)));
}

struct UniformBytes {
    float inverse, zero, low, high;
    explicit UniformBytes(const FxqQuantizer &q)
        : inverse(1.0f / q.scale), zero(float(q.zero)), low(float(q.low)), high(float(q.high)) {}
    inline uint8_t operator()(float x) const { return uniform_byte(x, inverse, zero, low, high); }
};

// Index of the level: negatives, zero and small ones, then large ones from zero on; ShiftedRegionsQuantizer.
struct RegionBytes {
    float inverse, small_inverse, large_inverse, small_max, large_max, boundary, base, least;
    explicit RegionBytes(const FxqQuantizer &q) {
        const int32_t small = (1 << (q.negative ? q.bits - 2 : q.bits - 1)) - 1;
        const double small_step = double(1 << q.shift_small), large_step = double(1 << q.shift_large);
        const double small_top = small * small_step;
        const double large_first = (double(int64_t(small_top / large_step)) + 1) * large_step;
        inverse = 1.0f / q.scale;
        small_inverse = float(1 / small_step), large_inverse = float(1 / large_step);
        small_max = float(small), large_max = float((1 << (q.bits - 1)) - 1);
        boundary = float((small_top + large_first) / 2);
        base = q.negative ? small_max : 0.0f;
        least = -base;
    }
    inline uint8_t operator()(float x) const {
        const float units = x * inverse;
        const float small = smaller(larger(__builtin_rintf(units * small_inverse), 0.0f), small_max);
        const float large = smaller(larger(__builtin_rintf(units * large_inverse), 0.0f), large_max) + small_max + 1.0f;
        const float negative = smaller(larger(__builtin_rintf(units), least), 0.0f);
        const float index = (units < boundary ? small : large) + negative + base;
        return static_cast<uint8_t>(static_cast<int32_t>(index));
    }
};

// Exponent k of x = scale 2^-k, rounded; the last one is zero; Log2Quantizer.
struct Log2Bytes {
    float scale, least;
    int32_t zero;
    explicit Log2Bytes(const FxqQuantizer &q)
        : scale(q.scale), least(1.0f / float(1 << (1 << q.bits))), zero((1 << q.bits) - 1) {}
    inline uint8_t operator()(float x) const {
        const int32_t bits = bits_of(larger(x / scale, least));
        // 0x3504f3: the significand of sqrt 2, where the logarithm rounds up.
        const int32_t exponent = (bits >> 23) - 127 + ((bits & 0x7fffff) > 0x3504f3 ? 1 : 0);
        const int32_t code = -exponent < 0 ? 0 : -exponent;
        return static_cast<uint8_t>(code > zero ? zero : code);
    }
};

// e^x for x <= 0; below -87 as e^-87. Cody-Waite reduction, Taylor to degree 7: relative error below 2^-23.
static inline float exponential(float x) {
    x = larger(x, -87.0f);
    const float n = __builtin_rintf(x * 1.44269504f);
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.0f / 5040;
    p = __builtin_fmaf(p, r, 1.0f / 720);
    p = __builtin_fmaf(p, r, 1.0f / 120);
    p = __builtin_fmaf(p, r, 1.0f / 24);
    p = __builtin_fmaf(p, r, 1.0f / 6);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    return p * float_of((static_cast<int32_t>(n) + 127) << 23);
}

// x Phi(x), with erf as a ratio of polynomials fitted to it on [-3.92, 3.92]: absolute error below 4e-7 |x|.
static inline float gelu(float x) {
    const float z = smaller(larger(x * 0.707106781f, -3.92f), 3.92f), t = z * z;
    float p = 2.0345840066527763e-06f;
    p = __builtin_fmaf(p, t, 0.0002874771397382105f);
    p = __builtin_fmaf(p, t, 0.003868566410994008f);
    p = __builtin_fmaf(p, t, 0.05306119397846f);
    p = __builtin_fmaf(p, t, 0.1927706427880388f);
    p = __builtin_fmaf(p, t, 1.1283790223898715f);
    float q = 3.806896023447608e-05f;
    q = __builtin_fmaf(q, t, 0.001188158874400348f);
    q = __builtin_fmaf(q, t, 0.015172781187798105f);
    q = __builtin_fmaf(q, t, 0.11508719675630978f);
    q = __builtin_fmaf(q, t, 0.5041702006740568f);
    q = __builtin_fmaf(q, t, 1.0f);
    return x * 0.5f * (1.0f + z * p / q);
}

template <class Bytes>
static void quantize_with(const Bytes &bytes, const float *__restrict x, int64_t count, uint8_t *__restrict out) {
    for (int64_t i = 0; i < count; ++i) out[i] = bytes(x[i]);
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

static void layer_norm(const LayerNormCall &call, int64_t row, int64_t rows) {
    const int64_t channels = call.channels, whole = channels / 16 * 16;
    float *__restrict y = static_cast<float *>(scratch(kSums, size_t(channels) * 4));
    for (int64_t r = row; r < row + rows; ++r) {
        const float *__restrict x = call.x + r * channels;
        Lanes sums = {};
        for (int64_t c = 0; c < whole; c += 16) sums += *reinterpret_cast<const Lanes *>(x + c);
        float total = sum_of(sums);
        for (int64_t c = whole; c < channels; ++c) total += x[c];
        const float mean = total / float(channels);
        Lanes squares = {};
        for (int64_t c = 0; c < whole; c += 16) {
            const Lanes difference = *reinterpret_cast<const Lanes *>(x + c) - mean;
            squares += difference * difference;
        }
        float square = sum_of(squares);
        for (int64_t c = whole; c < channels; ++c) square += (x[c] - mean) * (x[c] - mean);
        const float gain = 1.0f / __builtin_sqrtf(square / float(channels) + call.epsilon);
        for (int64_t c = 0; c < channels; ++c) y[c] = (x[c] - mean) * gain;
        if (call.weight) {
            const float *__restrict weight = call.weight;
            for (int64_t c = 0; c < channels; ++c) y[c] *= weight[c];
        }
        if (call.bias) {
            const float *__restrict bias = call.bias;
            for (int64_t c = 0; c < channels; ++c) y[c] += bias[c];
        }
        quantize(*call.quantizer, y, channels, call.out + r * channels);
    }
}
