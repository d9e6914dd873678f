// Activations to the right of a product, as panels. Each set for ARM includes it behind its `arrange`.

// A group of 16 columns and 4 inputs: a register has four columns.
struct Group {
    uint8x16_t part[4];
};

// Its bytes less `middle`, stored, and what they add to the columns' sums.
static FXQ_INLINE void put_group(const Group &group, uint8x16_t middle, int8_t *to, int32x4_t *sums) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const int8x16_t numbers = vreinterpretq_s8_u8(vsubq_u8(group.part[i], middle));
        vst1q_s8(to + i * 16, numbers);
        sums[i] = vpadalq_s16(sums[i], vpaddlq_s8(numbers));
    }
}

// Any part of a group; what is missing is `middle`.
static FXQ_INLINE Group some_of(const uint8_t *source, int64_t to_column, int64_t to_input, int64_t width, int64_t depth, int32_t middle) {
    alignas(16) uint8_t bytes[kGroupBytes];
    __builtin_memset(bytes, middle, sizeof bytes);
    for (int64_t i = 0; i < width; ++i)
        for (int64_t k = 0; k < depth; ++k) bytes[i * 4 + k] = source[i * to_column + k * to_input];
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}

// Four groups of columns that lie in rows of `stride` bytes.
static FXQ_INLINE void put_four(const uint8_t *source, int64_t stride, uint8x16_t middle, int8_t *to, int32x4_t *sums) {
    uint32x4_t word[4][4];  // [four columns][column, then group]
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) word[i][k] = vreinterpretq_u32_u8(vld1q_u8(source + (i * 4 + k) * stride));
        transpose(word[i]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        Group group;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) group.part[i] = vreinterpretq_u8_u32(word[i][g]);
        put_group(group, middle, to + g * kGroupBytes, sums);
    }
}

// A group whose inputs lie in rows of `stride` bytes.
static FXQ_INLINE Group across(const uint8_t *source, int64_t stride) {
    const uint8x16_t a = vld1q_u8(source), b = vld1q_u8(source + stride), c = vld1q_u8(source + 2 * stride);
    const uint8x16_t d = vld1q_u8(source + 3 * stride);
    const uint16x8_t e = vreinterpretq_u16_u8(vzip1q_u8(a, b)), f = vreinterpretq_u16_u8(vzip2q_u8(a, b));
    const uint16x8_t g = vreinterpretq_u16_u8(vzip1q_u8(c, d)), h = vreinterpretq_u16_u8(vzip2q_u8(c, d));
    return {{vreinterpretq_u8_u16(vzip1q_u16(e, g)), vreinterpretq_u8_u16(vzip2q_u16(e, g)),
             vreinterpretq_u8_u16(vzip1q_u16(f, h)), vreinterpretq_u8_u16(vzip2q_u16(f, h))}};
}

// Bytes less `middle` as units of 16 columns, and their sums; padding is zero. Element (k, column) lies at
// source[column * stride + k] where `transposed`, else at source[k * stride + column].
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int32_t middle, int64_t unit_elements, int8_t *numbers, int32_t *column_sum) {
    const uint8x16_t minus = vdupq_n_u8(static_cast<uint8_t>(middle));
    const int64_t to_column = transposed ? stride : 1, to_input = transposed ? 1 : stride;
    for (int64_t c = 0; c < columns; c += 16, numbers += unit_elements) {
        const int64_t width = columns - c < 16 ? columns - c : 16, groups = unit_elements / kGroupBytes;
        int32x4_t sums[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (int64_t g = 0; g < groups;) {
            const int64_t depth = inner - g * 4 < 4 ? inner - g * 4 : 4;
            const uint8_t *const from = source + c * to_column + g * 4 * to_input;
            int8_t *const to = numbers + g * kGroupBytes;
            if (transposed && width == 16 && g * 4 + 16 <= inner) {
                put_four(from, stride, minus, to, sums);
                g += 4;
                continue;
            }
            const bool is_whole = !transposed && width == 16 && depth == 4;
            put_group(is_whole ? across(from, stride) : some_of(from, to_column, to_input, width, depth, middle), minus, to, sums);
            ++g;
        }
        for (int i = 0; i < 4; ++i) vst1q_s32(column_sum + c + i * 4, sums[i]);
        arrange(numbers, groups);
    }
}
