// Products of two activations: the right one is packed like weights, per image (and head), and stays in cache.

template <class Loop>
struct Panel {
    const typename Loop::Right *data;
    int32_t *column_sum;  // (units * 16,); of a Product: what zero-points add to each column
    int64_t units, groups, unit_elements;
};

// The right operand less `middle`, packed; see `pack_units`.
template <class Loop>
static Panel<Loop> pack_right(Slot slot, const uint8_t *source, int64_t stride, bool transposed, int64_t inner,
                              int64_t columns, int32_t middle) {
    using Right = typename Loop::Right;
    const int64_t units = (columns + 15) / 16, groups = round_up(inner, kInnerStep) / 4;
    const int64_t unit_elements = groups * kGroupBytes;
    const size_t sum_bytes = size_t(units) * 64;
    uint8_t *memory = static_cast<uint8_t *>(scratch(slot, sum_bytes + size_t(units * unit_elements) * sizeof(Right)));
    int32_t *column_sum = reinterpret_cast<int32_t *>(memory);
    Right *numbers = reinterpret_cast<Right *>(memory + sum_bytes);
    if constexpr (sizeof(Right) == 1) {
        pack_units(source, stride, transposed, inner, columns, middle, unit_elements, numbers, column_sum);
    } else {
        int8_t *bytes = static_cast<int8_t *>(scratch(kWidened, size_t(units * unit_elements)));
        pack_units(source, stride, transposed, inner, columns, middle, unit_elements, bytes, column_sum);
        widen_right(bytes, units * groups, numbers);
    }
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
template <class Loop>
struct Block {
    const typename Loop::Left *data;
    int64_t count, stride;
    const typename Loop::Left *plane(int digit) const { return data + digit * count * stride; }
};

template <class Number>
static FXQ_INLINE int64_t sum_of(const Number *left, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += left[k];
    return sum;
}

// levels: those of the left operand; low: what the loop takes off its bytes.
template <class Loop>
struct Product {
    Loop loop;
    FxqLevels levels;
    int32_t low;
    Panel<Loop> panel;
    int64_t inner, columns;
    int32_t right_zero;
    Sum kind;
    Product(const Loop &a_loop, const FxqLevels &l, int32_t least, const Panel<Loop> &p, int64_t k, int64_t m, int32_t zero)
        : loop(a_loop), levels(l), low(least), panel(p), inner(k), columns(m), right_zero(zero), kind(sum_kind(l, k, 255)) {
        levels.zero -= low;
        if (kind == kWide) return;
        for (int64_t c = 0; c < panel.units * 16; ++c)
            panel.column_sum[c] = static_cast<int32_t>(0u - static_cast<uint32_t>(panel.column_sum[c]) * static_cast<uint32_t>(levels.zero));
    }
    int64_t padded() const { return panel.groups * 4; }
    int64_t stride() const { return panel.units * 16; }
};

// sums (digits, rows, stride) = left times right; and task(row) for `others` rows.
template <class Loop, class Task>
static FXQ_INLINE void multiply(const Block<Loop> &left, const Product<Loop> &product, int32_t *sums, int64_t others, const Task &task) {
    const Panel<Loop> &panel = product.panel;
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
                tile(product.loop, static_cast<int>(left.count - r < rows ? left.count - r : rows), vectors, left.plane(d) + r * left.stride,
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
template <Sum kind, class Loop>
struct RowValues {
    const Product<Loop> &p;
    const int32_t *sums;
    int64_t plane, constant = 0;
    FXQ_INLINE RowValues(const Product<Loop> &product, const Block<Loop> &left, const int32_t *all_sums, int64_t row)
        : p(product), sums(all_sums + row * product.stride()), plane(left.count * product.stride()) {
        if (!p.right_zero) return;
        constant = p.inner * p.levels.zero;
        for (int d = 0; d < p.levels.count; ++d) constant -= sum_of(left.plane(d) + row * left.stride, p.padded()) << (8 * d);
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
template <Sum kind, class Loop, class Task>
static FXQ_INLINE void rows_with(const Product<Loop> &p, const Block<Loop> &left, const int32_t *sums, const Task &task) {
    for (int64_t r = 0; r < left.count; ++r) task(r, RowValues<kind, Loop>(p, left, sums, r));
}

template <class Loop, class Task>
static FXQ_INLINE void for_rows(const Product<Loop> &p, const Block<Loop> &left, const int32_t *sums, const Task &task) {
    if (p.kind == kOneDigit) rows_with<kOneDigit>(p, left, sums, task);
    else if (p.kind == kNarrow) rows_with<kNarrow>(p, left, sums, task);
    else rows_with<kWide>(p, left, sums, task);
}

// Codes as a block: where they lie if they are digits and whole tiles already, each row with `zeros` behind it; else
// copied to `memory`.
template <class Loop>
static Block<Loop> block_of(const Product<Loop> &product, const uint8_t *codes, int64_t stride, int64_t rows, int64_t zeros,
                            typename Loop::Left *memory) {
    using Left = typename Loop::Left;
    const FxqLevels &levels = product.levels;
    const int64_t inner = product.inner, padded = product.padded();
    if (sizeof(Left) == 1 && levels.identity && product.low == 0 && inner + zeros == padded && rows % kWholeRows == 0)
        return {reinterpret_cast<const Left *>(codes), rows, stride};
    for (int d = 0; d < levels.count; ++d) expand(levels, d, product.low, codes, stride, rows, inner, padded, memory + d * rows * padded);
    return {memory, rows, padded};
}

template <class Loop>
static void matmul_with(const Loop &loop, int32_t low, int32_t middle, const MatmulCall &call, int64_t batch) {
    [[maybe_unused]] const Session session;
    using Left = typename Loop::Left;
    const Panel panel = pack_right<Loop>(kPanel, call.right + batch * call.k * call.m, call.transposed ? call.k : call.m,
                                         call.transposed != 0, call.k, call.m, middle);
    const Product<Loop> product(loop, *call.left_levels, low, panel, call.k, call.m, call.right_zero - middle);
    const size_t digits = size_t(call.left_levels->count);
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(kRowBlock * product.padded()) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * size_t(kRowBlock * product.stride()) * 4));
    const Vec scale = splat(call.scale);
    for (int64_t r = 0; r < call.n; r += kRowBlock) {
        const int64_t rows = call.n - r < kRowBlock ? call.n - r : kRowBlock;
        const uint8_t *codes = call.left + (batch * call.n + r) * call.k;
        float *out = call.out + (batch * call.n + r) * call.m;
        const Block<Loop> block = block_of(product, codes, call.k, rows, 0, left);
        multiply(block, product, sums, 0, [](int64_t) {});
        for_rows(product, block, sums, [&](int64_t row, const auto &values) {
            for (int64_t c = 0; c < call.m; c += kLanes) store(values(c) * scale, out + row * call.m + c, call.m - c);
        });
    }
}

static void matmul(const MatmulCall &call, int64_t batch) {
    const int64_t left_size = call.n * call.k, right_size = call.k * call.m;
    const LeftReach left = left_reach(*call.left_levels, call.left + batch * left_size, left_size, 1, left_size);
    const RightReach right = right_reach(call.right + batch * right_size, right_size, 1, right_size);
    choose_loop(depth_of(left.most, right.most),
                [&](const auto &loop) { matmul_with(loop, left.low, right.middle, call, batch); });
}

constexpr int kParts = 32;  // partial sums of a softmax, in every set
static_assert(kParts % kLanes == 0, "parts are whole vectors");

// How far the operands of an attention's two products reach, and how deep they can be summed.
struct AttentionReach {
    LeftReach query, softmax;
    RightReach key, value;
    int64_t first_depth, second_depth;
};

// The attention of one head: blocks of rows, each in passes over all its rows, since what ends a pass of one row takes
// long. Products are multiplied while rows of the passes before and after them are done.
template <class Loop>
static void attention_with(const AttentionReach &reach, const AttentionCall &call, int64_t batch, int64_t head) {
    [[maybe_unused]] const Session session;
    using Left = typename Loop::Left;
    const FxqAttention &spec = *call.spec;
    const int64_t tokens = call.tokens, size = spec.head_size, channels = spec.heads * size, stride = 3 * channels;
    const uint8_t *query = call.qkv + batch * tokens * stride + head * size;
    FxqLevels levels;
    levels.count = levels.identity = 1;
    levels.zero = spec.zero[0];
    const auto keys = pack_right<Loop>(kPanel, query + channels, stride, true, size, tokens, reach.key.middle);
    const auto values = pack_right<Loop>(kSecondPanel, query + 2 * channels, stride, false, tokens, size, reach.value.middle);
    const Product<Loop> first(Loop(reach.first_depth), levels, reach.query.low, keys, size, tokens, spec.zero[1] - reach.key.middle);
    const Product<Loop> second(Loop(reach.second_depth), spec.softmax_levels, 0, values, tokens, size, spec.zero[2] - reach.value.middle);
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
        return block_of(first, query + r * stride, stride, rows, 0, query_memory);
    };
    int64_t begin = 0;
    Block<Loop> queries = queries_of(0);
    // Base-2 logarithms of a row, and the largest; behind them minus infinity.
    const auto scores_of = [&](int64_t row) {
        const RowValues<kOneDigit, Loop> at(first, queries, sums, row);
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
        const Block<Loop> weights = block_of(second, bytes, second_padded, rows, second_padded - tokens, weight_memory);
        multiply(weights, second, second_sums, queries.count, scores_of);
        uint8_t *out = call.out + (batch * tokens + this_begin) * channels + head * size;
        with_bytes(spec.output, [&](const auto &to_bytes) {
            for_rows(second, weights, second_sums, [&](int64_t row, const auto &at) {
                Vec scale = value_scale;
                if (is_row_log) {
                    const int64_t total = sum_of(weights.plane(0) + row * weights.stride, second_padded);
                    scale = splat(spec.value_scale / float(total > 0 ? total : 1));
                }
                for (int64_t c = 0; c < size; c += kLanes)
                    store_bytes(to_bytes(at(c) * scale), out + row * channels + c, size - c);
            });
        });
        snap(spec.output, out, rows, size, channels);
    }
}

static void attention(const AttentionCall &call, int64_t batch, int64_t head) {
    const FxqAttention &spec = *call.spec;
    const int64_t tokens = call.tokens, size = spec.head_size, channels = spec.heads * size, stride = 3 * channels;
    const uint8_t *query = call.qkv + batch * tokens * stride + head * size;
    FxqLevels bytes;
    bytes.count = bytes.identity = 1;
    AttentionReach reach;
    reach.query = left_reach(bytes, query, stride, tokens, size);
    reach.key = right_reach(query + channels, stride, tokens, size);
    reach.value = right_reach(query + 2 * channels, stride, tokens, size);
    if (!spec.softmax_levels.identity) reach.softmax = left_reach(spec.softmax_levels, nullptr, 0, 0, 0);
    reach.first_depth = depth_of(reach.query.most, reach.key.most);
    reach.second_depth = depth_of(reach.softmax.most, reach.value.most);
    const int64_t depth = reach.first_depth < reach.second_depth ? reach.first_depth : reach.second_depth;
    choose_loop(depth, [&](const auto &loop) { attention_with<std::decay_t<decltype(loop)>>(reach, call, batch, head); });
}
