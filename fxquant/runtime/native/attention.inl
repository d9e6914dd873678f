// Products of two activations: the right one is packed like weights, per image (and head), and stays in cache.

struct Panel {
    const Right *data;
    const int32_t *column_sum;  // (units * 16,)
    int64_t units, groups, unit_elements;
};

// The right operand, packed; see `pack_units`.
static Panel pack_right(Slot slot, const uint8_t *source, int64_t stride, bool transposed, int64_t inner,
                        int64_t columns) {
    const int64_t units = (columns + 15) / 16, groups = round_up(inner, kInnerStep) / 4;
    const int64_t unit_elements = groups * kGroupBytes;
    const size_t sum_bytes = size_t(units) * 64;
    uint8_t *memory = static_cast<uint8_t *>(scratch(slot, sum_bytes + size_t(units * unit_elements) * sizeof(Right)));
    int32_t *column_sum = reinterpret_cast<int32_t *>(memory);
    Right *numbers = reinterpret_cast<Right *>(memory + sum_bytes);
    pack_units(source, stride, transposed, inner, columns, unit_elements, numbers, column_sum);
    return {numbers, column_sum, units, groups, unit_elements};
}

struct Nothing {
    static constexpr int count = 0;
    void some(int) {}
};

// sums (rows, units * 16) = left (rows, 4 groups) times panel.
static void multiply(const Left *left, int64_t rows, const Panel &panel, int32_t *sums) {
    const int64_t stride = panel.units * 16, padded = panel.groups * 4;
    Nothing nothing;
    for (int64_t u = 0; u < panel.units;) {
        const int vectors = vectors_for(panel.units - u), step = rows_for(vectors);
        for (int64_t r = 0; r < rows; r += step)
            tile(static_cast<int>(rows - r < step ? rows - r : step), vectors, left + r * padded, padded,
                 panel.data + u * panel.unit_elements, panel.unit_elements, panel.groups, nullptr, sums + r * stride + u * 16, stride,
                 nothing);
        u += vectors;
    }
}

static FXQ_INLINE int64_t sum_of(const Left *left, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += left[k];
    return sum;
}

struct Product {
    FxqLevels levels;
    Panel panel;
    int64_t inner, columns;
    int32_t right_zero;
    float scale;
    Sum kind;
    Product(const FxqLevels &l, const Panel &p, int64_t k, int64_t m, int32_t zero, float unit)
        : levels(l), panel(p), inner(k), columns(m), right_zero(zero), scale(unit), kind(sum_kind(l, k, 255)) {}
    int64_t padded() const { return panel.groups * 4; }
};

// Values of a block of rows: left holds one plane (rows, padded) a digit, sums as many (rows, columns of the panel).
// Zero-points are taken out: sum (a - a0)(b - b0) = sum ab - a0 sum b - b0 sum a + n a0 b0.
template <Sum kind>
static void values_with(const Product &p, const Left *left, int64_t rows, int32_t *sums, float *out, int64_t out_stride) {
    const int64_t stride = p.panel.units * 16, padded = p.padded(), plane = rows * stride;
    const int digits = p.levels.count;
    const int32_t *__restrict column_sum = p.panel.column_sum;
    for (int d = 0; d < digits; ++d) multiply(left + d * rows * padded, rows, p.panel, sums + d * plane);
    for (int64_t r = 0; r < rows; ++r, sums += stride) {
        float *__restrict to = out + r * out_stride;
        int64_t constant = 0;
        if (p.right_zero) {
            constant = p.inner * p.levels.zero;
            for (int d = 0; d < digits; ++d) constant -= sum_of(left + (d * rows + r) * padded, padded) << (8 * d);
            constant *= p.right_zero;
        }
        if (kind == kWide) {
            for (int64_t c = 0; c < p.columns; ++c) {
                double value = double(sums[c]) + 256.0 * double(sums[plane + c]);
                if (digits == 3) value += 65536.0 * double(sums[2 * plane + c]);
                to[c] = float(value - double(p.levels.zero) * double(column_sum[c]) + double(constant)) * p.scale;
            }
            continue;
        }
        for (int64_t c = 0; c < p.columns; c += kLanes) {
            const int64_t left_over = stride - c;
            Whole value = load(sums + c, left_over) + splat(static_cast<uint32_t>(constant));
            if (kind == kNarrow) value = value + (load(sums + plane + c, left_over) << 8);
            if (kind == kNarrow && digits == 3) value = value + (load(sums + 2 * plane + c, left_over) << 16);
            if (p.levels.zero)
                value = value - load(column_sum + c, left_over) * splat(static_cast<uint32_t>(p.levels.zero));
            store(to_float(value) * splat(p.scale), to + c, p.columns - c);
        }
    }
}

static void values_of(const Product &p, const Left *left, int64_t rows, int32_t *sums, float *out, int64_t out_stride) {
    const auto with = p.kind == kOneDigit ? values_with<kOneDigit> : p.kind == kNarrow ? values_with<kNarrow> : values_with<kWide>;
    with(p, left, rows, sums, out, out_stride);
}

static void expand_all(const FxqLevels &levels, const uint8_t *codes, int64_t stride, int64_t rows, int64_t inner,
                       int64_t padded, Left *out) {
    for (int d = 0; d < levels.count; ++d) expand(levels, d, codes, stride, rows, inner, padded, out + d * rows * padded);
}

static void matmul(const MatmulCall &call, int64_t batch) {
    [[maybe_unused]] const Session session;
    const Panel panel = pack_right(kPanel, call.right + batch * call.k * call.m, call.transposed ? call.k : call.m,
                                   call.transposed != 0, call.k, call.m);
    const Product product(*call.left_levels, panel, call.k, call.m, call.right_zero - 128, call.scale);
    const size_t digits = size_t(call.left_levels->count);
    const int64_t padded = product.padded();
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(kRowBlock * padded) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * size_t(kRowBlock * panel.units) * 64));
    for (int64_t r = 0; r < call.n; r += kRowBlock) {
        const int64_t rows = call.n - r < kRowBlock ? call.n - r : kRowBlock;
        expand_all(*call.left_levels, call.left + (batch * call.n + r) * call.k, call.k, rows, call.k, padded, left);
        values_of(product, left, rows, sums, call.out + (batch * call.n + r) * call.m, call.m);
    }
}

constexpr int kParts = 32;  // partial sums of a softmax, in every set

// Row becomes e^(x - top); returns the sum. Whole vectors of kParts are computed, padding must hold minus infinity.
static FXQ_INLINE float exponentials(float *__restrict row, int64_t whole, float top) {
    Vec sums[kParts / kLanes];
    for (int i = 0; i < kParts / kLanes; ++i) sums[i] = splat(0.0f);
    for (int64_t c = 0; c < whole; c += kParts)
        for (int i = 0; i < kParts / kLanes; ++i) {
            const Vec e = exponential(load(row + c + i * kLanes, kLanes) - splat(top));
            store(e, row + c + i * kLanes, kLanes);
            sums[i] = sums[i] + e;
        }
    return sum_of(sums);
}

// Bytes of the softmax of rows, which are spoilt; in passes over all of them, since what ends a pass of one row takes
// long. stride: a multiple of kParts, at least `count`.
static void softmax(const FxqQuantizer &quantizer, float *scores, int64_t stride, int64_t rows, int64_t count,
                    uint8_t *out) {
    float most[kRowBlock], gains[kRowBlock];
    for (int64_t r = 0; r < rows; ++r) most[r] = largest(scores + r * stride, count);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = count; c < stride; ++c) scores[r * stride + c] = -__builtin_inff();
        gains[r] = 1.0f / exponentials(scores + r * stride, stride, most[r]);
    }
    with_bytes(quantizer, [&](const auto &bytes) {
        for (int64_t r = 0; r < rows; ++r) {
            const float *__restrict row = scores + r * stride;
            uint8_t *__restrict to = out + r * count;
            const Vec gain = splat(gains[r]);
            for (int64_t c = 0; c < count; c += kLanes)
                store_bytes(bytes(load(row + c, kLanes) * gain), to + c, count - c);
        }
    });
}

static void attention(const AttentionCall &call, int64_t batch, int64_t head) {
    [[maybe_unused]] const Session session;
    const FxqAttention &spec = *call.spec;
    const int64_t tokens = call.tokens, size = spec.head_size, channels = spec.heads * size, stride = 3 * channels;
    const uint8_t *query = call.qkv + batch * tokens * stride + head * size;
    FxqLevels levels;
    levels.count = levels.identity = 1;
    levels.zero = spec.zero[0];
    const Panel keys = pack_right(kPanel, query + channels, stride, true, size, tokens);
    const Panel values = pack_right(kSecondPanel, query + 2 * channels, stride, false, tokens, size);
    const Product first(levels, keys, size, tokens, spec.zero[1] - 128, spec.score_scale);
    const Product second(spec.softmax_levels, values, tokens, size, spec.zero[2] - 128, spec.value_scale);
    const int64_t whole = round_up(tokens, kParts), columns = round_up(whole > size ? whole : size, kParts);
    const int64_t widest = first.padded() > second.padded() ? first.padded() : second.padded();
    const size_t digits = size_t(spec.softmax_levels.count), float_bytes = size_t(kRowBlock * columns) * 4;
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(kRowBlock * widest) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * float_bytes));
    float *scores = static_cast<float *>(scratch(kScores, float_bytes + size_t(kRowBlock * columns)));
    uint8_t *bytes = reinterpret_cast<uint8_t *>(scores) + float_bytes;
    const float *bias = call.bias;
    if (bias) bias += (batch % call.bias_groups * spec.heads + head) * tokens * tokens;
    for (int64_t r = 0; r < tokens; r += kRowBlock) {
        const int64_t rows = tokens - r < kRowBlock ? tokens - r : kRowBlock;
        expand_all(levels, query + r * stride, stride, rows, size, first.padded(), left);
        values_of(first, left, rows, sums, scores, whole);
        for (int64_t i = 0; i < rows && bias; ++i)
            for (int64_t c = 0; c < tokens; ++c) scores[i * whole + c] += bias[(r + i) * tokens + c];
        softmax(spec.softmax, scores, whole, rows, tokens, bytes);
        expand_all(spec.softmax_levels, bytes, tokens, rows, tokens, second.padded(), left);
        values_of(second, left, rows, sums, scores, size);
        for (int64_t i = 0; i < rows; ++i)
            quantize(spec.output, scores + i * size, size, call.out + (batch * tokens + r + i) * channels + head * size);
    }
}
