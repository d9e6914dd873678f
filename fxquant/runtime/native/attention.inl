// Products of two activations: the right one is packed like weights, per image (and head), and stays in cache.

struct Panel {
    const Right *data;
    int32_t *column_sum;  // (units * 16,); of a Product: what zero-points add to each column
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

// Rows of something else that are done, some at a time, while tiles are multiplied.
template <class Task>
struct Meanwhile {
    const Task &task;
    int64_t next, end;
    FXQ_INLINE void some(const Task &one, int64_t most) {
        for (const int64_t stop = end - next < most ? end : next + most; next < stop; ++next) one(next);
    }
};

// What one tile does of it.
template <class Task>
struct Share {
    Meanwhile<Task> *all;
    int count;
    FXQ_INLINE Task task() const { return all->task; }
    FXQ_INLINE void some(const Task &one, int most) {
        const int now = most < count ? most : count;
        all->some(one, now), count -= now;
    }
};

// A block of rows that multiplies a panel, one plane for each digit.
struct Block {
    const Left *data;
    int64_t count, stride;
    const Left *plane(int digit) const { return data + digit * count * stride; }
};

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
    Sum kind;
    Product(const FxqLevels &l, const Panel &p, int64_t k, int64_t m, int32_t zero)
        : levels(l), panel(p), inner(k), columns(m), right_zero(zero), kind(sum_kind(l, k, 255)) {
        if (kind == kWide) return;
        for (int64_t c = 0; c < panel.units * 16; ++c)
            panel.column_sum[c] = static_cast<int32_t>(0u - static_cast<uint32_t>(panel.column_sum[c]) * static_cast<uint32_t>(l.zero));
    }
    int64_t padded() const { return panel.groups * 4; }
    int64_t stride() const { return panel.units * 16; }
};

// sums (digits, rows, stride) = left times right; and task(row) for `others` rows.
template <class Task>
static FXQ_INLINE void multiply(const Block &left, const Product &product, int32_t *sums, int64_t others, const Task &task) {
    const Panel &panel = product.panel;
    const int64_t stride = product.stride();
    const int digits = product.levels.count;
    const int units = vectors_for(panel.units), step = rows_for(units);
    int64_t tiles = digits * ((panel.units + units - 1) / units) * ((left.count + step - 1) / step);
    Meanwhile<Task> meanwhile{task, 0, others};
    for (int d = 0; d < digits; ++d, sums += left.count * stride)
        for (int64_t u = 0; u < panel.units;) {
            const int vectors = vectors_for(panel.units - u), rows = rows_for(vectors);
            for (int64_t r = 0; r < left.count; r += rows, --tiles) {
                const bool begins = d == 0 && product.levels.zero && product.kind != kWide;
                Share<Task> share{&meanwhile, static_cast<int>((others - meanwhile.next) / (tiles > 1 ? tiles : 1))};
                tile(static_cast<int>(left.count - r < rows ? left.count - r : rows), vectors, left.plane(d) + r * left.stride,
                     left.stride, panel.data + u * panel.unit_elements, panel.unit_elements, panel.groups,
                     begins ? panel.column_sum + u * 16 : nullptr, 0, sums + r * stride + u * 16, stride, share);
                share.some(task, share.count);
            }
            u += vectors;
        }
    meanwhile.some(task, others);
}

// One row's values, kLanes columns from c on. sums: what `multiply` gave. Zero-points are taken out:
// sum (a - a0)(b - b0) = sum ab - a0 sum b - b0 sum a + n a0 b0.
template <Sum kind>
struct RowValues {
    const Product &p;
    const int32_t *sums;
    int64_t plane, constant = 0;
    FXQ_INLINE RowValues(const Product &product, const Block &left, const int32_t *all_sums, int64_t row)
        : p(product), sums(all_sums + row * product.stride()), plane(left.count * product.stride()) {
        if (!p.right_zero) return;
        constant = p.inner * p.levels.zero;
        for (int d = 0; d < p.levels.count; ++d) constant -= sum_of(left.plane(d) + row * left.stride, p.inner) << (8 * d);
        constant *= p.right_zero;
    }
    FXQ_INLINE Vec operator()(int64_t c) const {
        const int64_t count = p.stride() - c;
        Whole correction = splat(static_cast<uint32_t>(constant));
        if (kind != kWide && !kBegins) correction = correction + load(p.panel.column_sum + c, count);
        return total_of<kind>(p.levels, sums + c, plane, correction, p.panel.column_sum + c, double(constant), count);
    }
};

// Calls task(row, values) for the rows of a product.
template <Sum kind, class Task>
static FXQ_INLINE void rows_with(const Product &p, const Block &left, const int32_t *sums, const Task &task) {
    for (int64_t r = 0; r < left.count; ++r) task(r, RowValues<kind>(p, left, sums, r));
}

template <class Task>
static FXQ_INLINE void for_rows(const Product &p, const Block &left, const int32_t *sums, const Task &task) {
    if (p.kind == kOneDigit) rows_with<kOneDigit>(p, left, sums, task);
    else if (p.kind == kNarrow) rows_with<kNarrow>(p, left, sums, task);
    else rows_with<kWide>(p, left, sums, task);
}

// Codes as a block: where they lie if they are digits and whole tiles already, each row with `zeros` behind it; else
// copied to `memory`.
static Block block_of(const FxqLevels &levels, const uint8_t *codes, int64_t stride, int64_t rows, int64_t inner,
                      int64_t zeros, int64_t padded, Left *memory) {
    if (sizeof(Left) == 1 && levels.identity && inner + zeros == padded && rows % kWholeRows == 0)
        return {reinterpret_cast<const Left *>(codes), rows, stride};
    for (int d = 0; d < levels.count; ++d) expand(levels, d, codes, stride, rows, inner, padded, memory + d * rows * padded);
    return {memory, rows, padded};
}

static void matmul(const MatmulCall &call, int64_t batch) {
    [[maybe_unused]] const Session session;
    const Panel panel = pack_right(kPanel, call.right + batch * call.k * call.m, call.transposed ? call.k : call.m,
                                   call.transposed != 0, call.k, call.m);
    const Product product(*call.left_levels, panel, call.k, call.m, call.right_zero - 128);
    const size_t digits = size_t(call.left_levels->count);
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(kRowBlock * product.padded()) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * size_t(kRowBlock * product.stride()) * 4));
    const Vec scale = splat(call.scale);
    for (int64_t r = 0; r < call.n; r += kRowBlock) {
        const int64_t rows = call.n - r < kRowBlock ? call.n - r : kRowBlock;
        const uint8_t *codes = call.left + (batch * call.n + r) * call.k;
        float *out = call.out + (batch * call.n + r) * call.m;
        const Block block = block_of(*call.left_levels, codes, call.k, rows, call.k, 0, product.padded(), left);
        multiply(block, product, sums, 0, [](int64_t) {});
        for_rows(product, block, sums, [&](int64_t row, const auto &values) {
            for (int64_t c = 0; c < call.m; c += kLanes) store(values(c) * scale, out + row * call.m + c, call.m - c);
        });
    }
}

constexpr int kParts = 32;  // partial sums of a softmax, in every set
static_assert(kParts % kLanes == 0, "parts are whole vectors");

// The attention of one head: blocks of rows, each in passes over all its rows, since what ends a pass of one row takes
// long. Products are multiplied while rows of the passes before and after them are done.
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
    const Product first(levels, keys, size, tokens, spec.zero[1] - 128);
    const Product second(spec.softmax_levels, values, tokens, size, spec.zero[2] - 128);
    const int64_t whole = round_up(tokens, kParts), first_padded = first.padded(), second_padded = second.padded();
    const size_t digits = size_t(spec.softmax_levels.count), block_floats = size_t(kRowBlock * whole);
    Left *query_memory = static_cast<Left *>(scratch(kLeft, size_t(kRowBlock) * (size_t(first_padded) + digits * size_t(second_padded)) * sizeof(Left)));
    Left *weight_memory = query_memory + kRowBlock * first_padded;
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, size_t(kRowBlock) * (size_t(first.stride()) + digits * size_t(second.stride())) * 4));
    int32_t *second_sums = sums + kRowBlock * first.stride();
    float *scores = static_cast<float *>(scratch(kScores, block_floats * 4 + size_t(kRowBlock * second_padded)));
    uint8_t *bytes = reinterpret_cast<uint8_t *>(scores + block_floats);
    __builtin_memset(bytes, 0, size_t(kRowBlock * second_padded));
    float most[kRowBlock], gains[kRowBlock];
    constexpr float kLog2E = 1.44269504f;
    const float *bias = call.bias;
    if (bias) bias += ((call.first_group + batch) % call.bias_groups * spec.heads + head) * tokens * tokens;
    const Vec score_scale = splat(spec.score_scale * kLog2E), value_scale = splat(spec.value_scale);

    const auto queries_of = [&](int64_t r) {
        const int64_t rows = r >= tokens ? 0 : tokens - r < kRowBlock ? tokens - r : kRowBlock;
        return block_of(levels, query + r * stride, stride, rows, size, 0, first_padded, query_memory);
    };
    int64_t begin = 0;
    Block queries = queries_of(0);
    // Base-2 logarithms of a row, and the largest; behind them minus infinity.
    const auto scores_of = [&](int64_t row) {
        const RowValues<kOneDigit> at(first, queries, sums, row);
        Vec largest[kParts / kLanes];
        for (int i = 0; i < kParts / kLanes; ++i) largest[i] = splat(-__builtin_inff());
        float *__restrict to = scores + row * whole;
        const auto score_at = [&](int64_t c) {
            const Vec score = at(c) * score_scale;
            return bias ? fused(load(bias + (begin + row) * tokens + c, tokens - c), splat(kLog2E), score) : score;
        };
        int64_t c = 0;
        for (; c + kParts <= tokens; c += kParts)
            for (int i = 0; i < kParts / kLanes; ++i) {
                const Vec score = score_at(c + i * kLanes);
                store(score, to + c + i * kLanes, kLanes);
                largest[i] = larger(score, largest[i]);
            }
        for (; c < tokens; c += kLanes) {
            const Vec score = only(score_at(c), tokens - c, -__builtin_inff());
            store(score, to + c, kLanes);
            *largest = larger(score, *largest);
        }
        for (; c < whole; c += kLanes) store(splat(-__builtin_inff()), to + c, kLanes);
        most[row] = largest_of(largest);
    };
    // 2^(x - largest) of a row, and one over their sum.
    const auto powers_of = [&](int64_t row) {
        float *__restrict x = scores + row * whole;
        const Vec top = splat(most[row]);
        Vec sum[kParts / kLanes];
        for (int i = 0; i < kParts / kLanes; ++i) sum[i] = splat(0.0f);
        for (int64_t part = 0; part < whole; part += kParts)
            for (int i = 0; i < kParts / kLanes; ++i) {
                const int64_t c = part + i * kLanes;
                const Vec power = power_of_two(load(x + c, kLanes) - top);
                store(power, x + c, kLanes);
                sum[i] = sum[i] + power;
            }
        gains[row] = 1.0f / sum_of(sum);
    };
    // How far the scores of a row lie below the largest, as codes: softmax by its logarithms.
    const bool is_row_log = spec.softmax.kind == FXQ_ROW_LOG;
    const int32_t lowest = is_row_log ? (1 << spec.softmax.bits) - 1 : 0;
    const UniformBytes below({FXQ_UNIFORM, spec.softmax.scale, 0, 0, lowest, 8, 0, 0, 0});
    const auto codes_of = [&](int64_t row) {
        const float *__restrict x = scores + row * whole;
        const Vec top = splat(most[row]);
        for (int64_t c = 0; c < tokens; c += kLanes)
            store_bytes(below(top - load(x + c, kLanes)), bytes + row * second_padded + c, tokens - c);
    };
    const auto normalized_codes = [&](int64_t rows) {
        with_bytes(spec.softmax, [&](const auto &to_bytes) {
            for (int64_t r = 0; r < rows; ++r) {
                auto of_row = to_bytes;
                of_row.multiply_inputs(splat(gains[r]));
                const float *__restrict x = scores + r * whole;
                for (int64_t c = 0; c < tokens; c += kLanes)
                    store_bytes(of_row(load(x + c, kLanes)), bytes + r * second_padded + c, tokens - c);
            }
        });
    };
    multiply(queries, first, sums, 0, scores_of);
    for (int64_t r = 0; r < queries.count; ++r) scores_of(r);
    for (; begin < tokens; ) {
        const int64_t rows = queries.count, this_begin = begin;
        begin += rows;
        queries = queries_of(begin);
        if (is_row_log) {
            multiply(queries, first, sums, rows, codes_of);
        } else {
            multiply(queries, first, sums, rows, powers_of);
            normalized_codes(rows);
        }
        const Block weights = block_of(spec.softmax_levels, bytes, second_padded, rows, tokens, second_padded - tokens,
                                       second_padded, weight_memory);
        multiply(weights, second, second_sums, queries.count, scores_of);
        uint8_t *out = call.out + (batch * tokens + this_begin) * channels + head * size;
        with_bytes(spec.output, [&](const auto &to_bytes) {
            for_rows(second, weights, second_sums, [&](int64_t row, const auto &at) {
                Vec scale = value_scale;
                if (is_row_log) {
                    const int64_t total = sum_of(weights.plane(0) + row * weights.stride, tokens);
                    scale = splat(spec.value_scale / float(total > 0 ? total : 1));
                }
                for (int64_t c = 0; c < size; c += kLanes)
                    store_bytes(to_bytes(at(c) * scale), out + row * channels + c, size - c);
            });
        });
        snap(spec.output, out, rows, size, channels);
    }
}
