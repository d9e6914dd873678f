// Products of two activations: the right one is packed like weights, per image (and head), and stays in cache.

struct Panel {
    const Right *data;
    const int32_t *column_sum;  // (units * 16,)
    int64_t units, groups, unit_elements;
};

// Bytes less 128 as units of 16 columns: element (k, column) lies at source[column * stride + k] where `transposed`,
// else at source[k * stride + column]. Padding is zero.
static Panel pack_right(Slot slot, const uint8_t *source, int64_t stride, bool transposed, int64_t inner,
                        int64_t columns) {
    const int64_t units = (columns + 15) / 16, groups = round_up(inner, kInnerStep) / 4, unit_bytes = groups * kGroupBytes;
    const int64_t elements = units * unit_bytes;
    const size_t sum_bytes = size_t(units) * 64;
    // Sums, numbers, and (where numbers are wider than bytes) the bytes they come from.
    uint8_t *memory = static_cast<uint8_t *>(scratch(slot, sum_bytes + size_t(elements) * (sizeof(Right) + 1)));
    int32_t *__restrict column_sum = reinterpret_cast<int32_t *>(memory);
    Right *numbers = reinterpret_cast<Right *>(memory + sum_bytes);
    uint8_t *bytes = sizeof(Right) == 1 ? reinterpret_cast<uint8_t *>(numbers) : memory + sum_bytes + elements * sizeof(Right);
    if (inner % kInnerStep || columns % 16) __builtin_memset(bytes, 128, size_t(elements));
    if (transposed) {
        for (int64_t c = 0; c < columns; ++c) {
            uint8_t *to = bytes + c / 16 * unit_bytes + c % 16 * 4;
            const uint8_t *from = source + c * stride;
            for (int64_t g = 0; g < inner / 4; ++g) __builtin_memcpy(to + g * kGroupBytes, from + g * 4, 4);
            for (int64_t k = inner / 4 * 4; k < inner; ++k) to[k / 4 * kGroupBytes + k % 4] = from[k];
        }
    } else {
        for (int64_t g = 0; g < (inner + 3) / 4; ++g) {
            const int rows = static_cast<int>(inner - g * 4 < 4 ? inner - g * 4 : 4);
            const uint8_t *from = source + g * 4 * stride;
            for (int64_t u = 0; u < units; ++u) {
                uint8_t *__restrict to = bytes + u * unit_bytes + g * kGroupBytes;
                const uint8_t *__restrict part = from + u * 16;
                const int width = static_cast<int>(columns - u * 16 < 16 ? columns - u * 16 : 16);
                if (rows == 4 && width == 16)
                    for (int c = 0; c < 16; ++c) {
                        to[c * 4] = part[c];
                        to[c * 4 + 1] = part[stride + c];
                        to[c * 4 + 2] = part[2 * stride + c];
                        to[c * 4 + 3] = part[3 * stride + c];
                    }
                else
                    for (int r = 0; r < rows; ++r)
                        for (int c = 0; c < width; ++c) to[c * 4 + r] = part[r * stride + c];
            }
        }
    }
    for (int64_t i = 0; i < elements; ++i) numbers[i] = static_cast<int8_t>(bytes[i] ^ 128);
    for (int64_t u = 0; u < units; ++u) {
        int32_t sums[16] = {};
        for (int64_t g = 0; g < groups; ++g) {
            const Right *__restrict group = numbers + u * unit_bytes + g * kGroupBytes;
            for (int c = 0; c < 16; ++c) sums[c] += group[c * 4] + group[c * 4 + 1] + group[c * 4 + 2] + group[c * 4 + 3];
        }
        for (int c = 0; c < 16; ++c) column_sum[u * 16 + c] = sums[c];
    }
    return {numbers, column_sum, units, groups, unit_bytes};
}

// sums (rows, units * 16) = left (rows, 4 groups) times panel.
static void multiply(const Left *left, int64_t rows, const Panel &panel, int32_t *sums) {
    const int64_t stride = panel.units * 16, padded = panel.groups * 4;
    for (int64_t u = 0; u < panel.units;) {
        const int vectors = vectors_for(panel.units - u), step = rows_for(vectors);
        for (int64_t r = 0; r < rows; r += step)
            tile(static_cast<int>(rows - r < step ? rows - r : step), vectors, left + r * padded, padded,
                 panel.data + u * panel.unit_elements, panel.unit_elements, panel.groups, sums + r * stride + u * 16, stride);
        u += vectors;
    }
}

// Zero-points taken out: sum (a - a0)(b - b0) = sum ab - a0 sum b - b0 sum a + n a0 b0.
static inline int32_t right_constant(const Left *left, int64_t padded, int64_t inner, int32_t left_zero,
                                     int32_t right_zero) {
    int32_t sum = 0;
    if (right_zero != 0)
        for (int64_t k = 0; k < padded; ++k) sum += left[k];
    return right_zero * (static_cast<int32_t>(inner) * left_zero - sum);
}

// Values of a block of rows: left holds `digits` planes (rows, padded), sums as many (rows, columns of the panel).
static void values_of(const FxqLevels &levels, const Left *left, int64_t rows, int64_t inner, const Panel &panel,
                      int32_t right_zero, float scale, int64_t columns, int32_t *sums, float *out, int64_t out_stride) {
    const int64_t stride = panel.units * 16, padded = panel.groups * 4;
    const int digits = levels.count;
    for (int d = 0; d < digits; ++d) multiply(left + d * rows * padded, rows, panel, sums + d * rows * stride);
    const int32_t *__restrict column_sum = panel.column_sum;
    for (int64_t r = 0; r < rows; ++r) {
        float *__restrict to = out + r * out_stride;
        const int32_t *__restrict low = sums + r * stride;
        if (digits == 1) {
            const int32_t constant = right_constant(left + r * padded, padded, inner, levels.zero, right_zero);
            for (int64_t c = 0; c < columns; ++c) to[c] = float(low[c] - levels.zero * column_sum[c] + constant) * scale;
            continue;
        }
        double constant = double(right_zero) * double(levels.zero) * double(inner), weight = 1.0;
        for (int d = 0; d < digits; ++d, weight *= 256.0)
            constant += weight * right_constant(left + (d * rows + r) * padded, padded, inner, 0, right_zero);
        const int32_t *__restrict middle = low + rows * stride, *__restrict high = low + (digits - 1) * rows * stride;
        const double high_weight = digits == 3 ? 65536.0 : 0.0;
        for (int64_t c = 0; c < columns; ++c) {
            const double value = double(low[c]) + 256.0 * double(middle[c]) + high_weight * double(high[c]);
            to[c] = float(value - double(levels.zero) * double(column_sum[c]) + constant) * scale;
        }
    }
}

static void expand_all(const FxqLevels &levels, const uint8_t *codes, int64_t stride, int64_t rows, int64_t inner,
                       int64_t padded, Left *out) {
    for (int d = 0; d < levels.count; ++d) expand(levels, d, codes, stride, rows, inner, padded, out + d * rows * padded);
}

static void matmul(const MatmulCall &call, int64_t batch) {
    [[maybe_unused]] const Session session;
    const int64_t padded = round_up(call.k, kInnerStep), rows_at_once = kRowBlock;
    const Panel panel = pack_right(kPanel, call.right + batch * call.k * call.m, call.transposed ? call.k : call.m,
                                   call.transposed != 0, call.k, call.m);
    const size_t digits = size_t(call.left_levels->count);
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(rows_at_once * padded) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * size_t(rows_at_once * panel.units) * 64));
    for (int64_t r = 0; r < call.n; r += rows_at_once) {
        const int64_t rows = call.n - r < rows_at_once ? call.n - r : rows_at_once;
        expand_all(*call.left_levels, call.left + (batch * call.n + r) * call.k, call.k, rows, call.k, padded, left);
        values_of(*call.left_levels, left, rows, call.k, panel, call.right_zero - 128, call.scale, call.m, sums,
                  call.out + (batch * call.n + r) * call.m, call.m);
    }
}

// In place; the row has room for whole vectors of 16.
static void softmax(float *__restrict row, int64_t count) {
    const int64_t whole = round_up(count, 16);
    for (int64_t c = count; c < whole; ++c) row[c] = -__builtin_inff();
    Lanes most = *reinterpret_cast<const Lanes *>(row);
    for (int64_t c = 16; c < whole; c += 16) {
        const Lanes next = *reinterpret_cast<const Lanes *>(row + c);
        most = next > most ? next : most;
    }
    float largest = most[0];
    for (int i = 1; i < 16; ++i) largest = larger(most[i], largest);
    for (int64_t c = 0; c < whole; ++c) row[c] = exponential(row[c] - largest);
    for (int64_t c = count; c < whole; ++c) row[c] = 0.0f;
    Lanes sums = {};
    for (int64_t c = 0; c < whole; c += 16) sums += *reinterpret_cast<const Lanes *>(row + c);
    const float sum = sum_of(sums);
    for (int64_t c = 0; c < count; ++c) row[c] = row[c] / sum;
}

static void attention(const AttentionCall &call, int64_t batch, int64_t head) {
    [[maybe_unused]] const Session session;
    const FxqAttention &spec = *call.spec;
    const int64_t tokens = call.tokens, size = spec.head_size, channels = spec.heads * size, stride = 3 * channels;
    const uint8_t *query = call.qkv + batch * tokens * stride + head * size;
    const Panel keys = pack_right(kPanel, query + channels, stride, true, size, tokens);
    const Panel values = pack_right(kSecondPanel, query + 2 * channels, stride, false, tokens, size);
    FxqLevels query_levels;
    query_levels.count = query_levels.identity = 1;
    query_levels.zero = spec.zero[0];
    const FxqLevels &levels = spec.softmax_levels;
    const int64_t padded_size = keys.groups * 4, padded_tokens = values.groups * 4, whole = keys.units * 16;
    const int64_t widest = padded_size > padded_tokens ? padded_size : padded_tokens;
    Left *left = static_cast<Left *>(scratch(kLeft, size_t(levels.count * kRowBlock * widest) * sizeof(Left)));
    const int64_t columns = whole > values.units * 16 ? whole : values.units * 16;
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, size_t(levels.count * kRowBlock * columns) * 4));
    const size_t float_bytes = size_t(kRowBlock * columns) * 4;
    float *scores = static_cast<float *>(scratch(kScores, float_bytes + size_t(kRowBlock * columns)));
    uint8_t *bytes = reinterpret_cast<uint8_t *>(scores) + float_bytes;
    const float *bias = call.bias;
    if (bias) bias += (batch % call.bias_groups * spec.heads + head) * tokens * tokens;
    for (int64_t r = 0; r < tokens; r += kRowBlock) {
        const int64_t rows = tokens - r < kRowBlock ? tokens - r : kRowBlock;
        expand_all(query_levels, query + r * stride, stride, rows, size, padded_size, left);
        values_of(query_levels, left, rows, size, keys, spec.zero[1] - 128, spec.score_scale, tokens, sums, scores, whole);
        for (int64_t i = 0; i < rows; ++i) {
            float *row = scores + i * whole;
            if (bias)
                for (int64_t c = 0; c < tokens; ++c) row[c] += bias[(r + i) * tokens + c];
            softmax(row, tokens);
            quantize(spec.softmax, row, tokens, bytes + i * tokens);
        }
        expand_all(levels, bytes, tokens, rows, tokens, padded_tokens, left);
        values_of(levels, left, rows, tokens, values, spec.zero[2] - 128, spec.value_scale, size, sums, scores, size);
        for (int64_t i = 0; i < rows; ++i)
            quantize(spec.output, scores + i * size, size, call.out + (batch * tokens + r + i) * channels + head * size);
    }
}
