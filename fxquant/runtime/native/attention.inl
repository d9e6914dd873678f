// The attention of one head: two products, and the softmax between them, in passes over blocks of rows.

constexpr int kParts = 32;  // partial sums of a softmax, in every set
static_assert(kParts % kLanes == 0, "parts are whole vectors");

// How far the operands of an attention's two products reach, and how deep they can be summed.
struct AttentionReach {
    LeftReach query, softmax;
    RightReach key, value;
    int64_t first_depth, second_depth;
};

// The attention of one head, of its queries from `begin` to `end`: blocks of rows, each in passes over all its rows, since
// what ends a pass of one row takes long. Products are multiplied while rows of the passes before and after them are done.
template <class Loop>
static void attention_with(const AttentionReach &reach, const AttentionCall &call, int64_t batch, int64_t head, int64_t begin,
                           int64_t end) {
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
        const int64_t rows = r >= end ? 0 : end - r < kRowBlock ? end - r : kRowBlock;
        return block_of(first, query + r * stride, stride, rows, 0, query_memory);
    };
    Block<Loop> queries = queries_of(begin);
    // Base-2 logarithms of a row, and the largest; behind them minus infinity.
    const auto scores_of = [&](int64_t row) {
        const RowValues<false, Loop> at(first, queries, sums, row);
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
    while (begin < end) {
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

static void attention(const AttentionCall &call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
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
    choose_loop(depth, [&](const auto &loop) { attention_with<std::decay_t<decltype(loop)>>(reach, call, batch, head, begin, end); });
}
