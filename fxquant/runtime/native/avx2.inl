// What the sets of 256-bit registers share: vectors of 16 floats, tables, and the packing of activations.

// Two registers at a time: long chains of operations need a second one to wait for.
constexpr int kLanes = 16, kRegisterBytes = 32;

struct Vec {
    __m256 low, high;
};
struct Whole {
    __m256i low, high;
};

static FXQ_INLINE __m256i load_bytes(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
static FXQ_INLINE void store_bytes(__m256i x, void *to) { _mm256_storeu_si256(static_cast<__m256i *>(to), x); }

// The first `count` of eight lanes.
static FXQ_INLINE __m256i mask_of(int64_t count) {
    const int most = count > 8 ? 8 : count < 0 ? 0 : static_cast<int>(count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(most), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static FXQ_INLINE Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static FXQ_INLINE Whole splat(uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
static FXQ_INLINE Vec load(const float *from, int64_t count) {
    if (count >= kLanes) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    return {_mm256_maskload_ps(from, mask_of(count)), _mm256_maskload_ps(from + 8, mask_of(count - 8))};
}
static FXQ_INLINE Whole load(const int32_t *from, int64_t count) {
    if (count >= kLanes) return {load_bytes(from), load_bytes(from + 8)};
    return {_mm256_maskload_epi32(from, mask_of(count)), _mm256_maskload_epi32(from + 8, mask_of(count - 8))};
}
static FXQ_INLINE void store(Vec x, float *to, int64_t count) {
    if (count >= kLanes) {
        _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high);
    } else {
        _mm256_maskstore_ps(to, mask_of(count), x.low);
        _mm256_maskstore_ps(to + 8, mask_of(count - 8), x.high);
    }
}
// The last byte of every number.
static FXQ_INLINE void store_bytes(Whole x, uint8_t *to, int64_t count) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.low, byte), _mm256_and_si256(x.high, byte));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    if (count >= kLanes) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), bytes);
        return;
    }
    alignas(16) uint8_t some[kLanes];
    _mm_store_si128(reinterpret_cast<__m128i *>(some), bytes);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

static FXQ_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static FXQ_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
static FXQ_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
static FXQ_INLINE Vec larger(Vec a, Vec b) {  // b where a is no number
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
static FXQ_INLINE Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
static FXQ_INLINE Vec size_of(Vec a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
static FXQ_INLINE Vec fused(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static FXQ_INLINE Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return {_mm256_blendv_ps(otherwise.low, then.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(otherwise.high, then.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
static FXQ_INLINE Vec only(Vec x, int64_t count, float rest) {  // the first `count` of x
    if (count >= kLanes) return x;
    const __m256 other = _mm256_set1_ps(rest);
    return {_mm256_blendv_ps(other, x.low, _mm256_castsi256_ps(mask_of(count))),
            _mm256_blendv_ps(other, x.high, _mm256_castsi256_ps(mask_of(count - 8)))};
}
static FXQ_INLINE Vec to_float(Whole x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
static FXQ_INLINE Whole bits_of(Vec x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
static FXQ_INLINE Vec float_of(Whole x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
static FXQ_INLINE Whole operator+(Whole a, Whole b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
static FXQ_INLINE Whole operator-(Whole a, Whole b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
static FXQ_INLINE Whole operator<<(Whole a, int by) { return {_mm256_slli_epi32(a.low, by), _mm256_slli_epi32(a.high, by)}; }
static FXQ_INLINE Whole operator>>(Whole a, int by) { return {_mm256_srli_epi32(a.low, by), _mm256_srli_epi32(a.high, by)}; }

// The integer that a float which was rounded by adding holds, below the pieces of GELU's table.
static FXQ_INLINE Whole piece_of(Vec sum) {
    const __m256i last = _mm256_set1_epi32(kGeluPieces - 1);
    const Whole bits = bits_of(sum);
    return {_mm256_and_si256(bits.low, last), _mm256_and_si256(bits.high, last)};
}

// The coefficients of GELU's pieces, times a factor. A piece's lie side by side: one load has them all, and eight pieces'
// are transposed in registers, in a quarter of the time that gathering them takes.
struct Pieces {
    static_assert(kGeluDegree == 3, "four coefficients fill half a register");
    alignas(16) float numbers[kGeluPieces][4];
    explicit Pieces(float factor) {
        for (int i = 0; i < kGeluPieces; ++i)
            for (int k = 0; k < 4; ++k) numbers[i][k] = gelu_table[k][i] * factor;
    }
    FXQ_INLINE void take_eight(__m256i piece, __m256 *to) const {
        alignas(32) uint32_t at[8];
        _mm256_store_si256(reinterpret_cast<__m256i *>(at), piece);
        const auto two = [&](int i) FXQ_ALWAYS {
            return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(numbers[at[i]])), _mm_load_ps(numbers[at[i + 4]]), 1);
        };
        const __m256 a = two(0), b = two(1), c = two(2), d = two(3);
        const __m256 e = _mm256_unpacklo_ps(a, b), f = _mm256_unpackhi_ps(a, b);
        const __m256 g = _mm256_unpacklo_ps(c, d), h = _mm256_unpackhi_ps(c, d);
        to[0] = _mm256_shuffle_ps(e, g, 0x44), to[1] = _mm256_shuffle_ps(e, g, 0xee);
        to[2] = _mm256_shuffle_ps(f, h, 0x44), to[3] = _mm256_shuffle_ps(f, h, 0xee);
    }
    FXQ_INLINE void take(Whole piece, Vec *coefficients) const {
        __m256 low[4], high[4];
        take_eight(piece.low, low), take_eight(piece.high, high);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) coefficients[k] = {low[k], high[k]};
    }
};

// Of 32 numbers.
static FXQ_INLINE float largest_of(const Vec *x) {
    const __m256 eight = _mm256_max_ps(_mm256_max_ps(x[0].low, x[0].high), _mm256_max_ps(x[1].low, x[1].high));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static FXQ_INLINE __m256i sixteen(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
}

// A table of 256 bytes is looked up in sixteenths, as far as it holds anything.
static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, uint8_t *out) {
    int parts = 16;
    while (parts > 1 && _mm_testz_si128(_mm256_castsi256_si128(sixteen(table + 16 * (parts - 1))),
                                        _mm_set1_epi8(-1)))
        --parts;
    const __m256i step = _mm256_set1_epi8(16), beyond = _mm256_set1_epi8(0x70);
    const auto looked_up = [&](__m256i code) FXQ_ALWAYS {
        __m256i found = _mm256_setzero_si256();
        for (int part = 0; part < parts; ++part) {  // a code beyond this sixteenth has its first bit set, and finds zero
            found = _mm256_or_si256(found, _mm256_shuffle_epi8(sixteen(table + 16 * part), _mm256_adds_epu8(code, beyond)));
            code = _mm256_sub_epi8(code, step);
        }
        return found;
    };
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) store_bytes(looked_up(load_bytes(codes + i)), out + i);
    for (; i < count; ++i) out[i] = table[codes[i]];
}

// As in portable.inl; what no int32 holds becomes the least one, and 0.
template <int count>
static FXQ_INLINE void table_bytes(const uint8_t *table, int steps, const Vec *x, uint8_t *out) {
    static_assert(count % 32 == 0, "whole registers of bytes");
    const __m256 most = _mm256_set1_ps(float(FXQ_TABLE_ENTRIES - 1));
    const auto whole = [most](__m256 y) FXQ_ALWAYS { return _mm256_cvtps_epi32(_mm256_min_ps(y, most)); };
    const __m256i low_byte = _mm256_set1_epi16(255);
    // Packing has put groups of four numbers of each half of a register side by side.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < count; i += 32, x += 2) {
        const __m256i a = _mm256_packus_epi32(whole(x[0].low), whole(x[0].high));
        const __m256i b = _mm256_packus_epi32(whole(x[1].low), whole(x[1].high));
        const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
        // Of the 64 entries of a row, bits 5 and 4 of the upper part say which sixteen; blending looks at the first bit.
        const __m256i fifth = _mm256_slli_epi16(high, 3), sixth = _mm256_slli_epi16(high, 2);
        const auto row = [&](int r) FXQ_ALWAYS {
            const uint8_t *at = table + r * kTableRow;
            const __m256i first = _mm256_blendv_epi8(_mm256_shuffle_epi8(sixteen(at), high), _mm256_shuffle_epi8(sixteen(at + 16), high), fifth);
            const __m256i second = _mm256_blendv_epi8(_mm256_shuffle_epi8(sixteen(at + 32), high), _mm256_shuffle_epi8(sixteen(at + 48), high), fifth);
            return _mm256_blendv_epi8(first, second, sixth);
        };
        __m256i bytes = row(0);
        for (int step = 0; step < steps; ++step) {
            const __m256i position = row(2 * step + 1), is_beyond = _mm256_cmpeq_epi8(_mm256_max_epu8(low, position), low);
            bytes = _mm256_blendv_epi8(bytes, row(2 * step + 2), is_beyond);
        }
        store_bytes(_mm256_permutevar8x32_epi32(bytes, order), out + i);
    }
}

// Sums of four bytes' neighbours of one column, added.
static FXQ_INLINE __m256i plus_row_sums(__m256i sums, __m256i numbers) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), numbers);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Bytes less `middle` as units of 16 columns, and their sums; padding is zero. Element (k, column) lies at
// source[column * stride + k] where `transposed`, else at source[k * stride + column].
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int32_t middle, int64_t unit_elements, int8_t *numbers, int32_t *column_sum) {
    const __m256i minus = _mm256_set1_epi8(static_cast<char>(middle));
    for (int64_t c = 0; c < columns; c += 16, numbers += unit_elements) {
        const int64_t width = columns - c < 16 ? columns - c : 16;
        __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t g = 0; g * kGroupBytes < unit_elements; ++g) {
            const int64_t depth = inner - g * 4 < 4 ? inner - g * 4 : 4;
            alignas(32) uint8_t group[kGroupBytes];
            if (width == 16 && depth == 4 && transposed) {
                for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(group + i * 4, source + (c + i) * stride + g * 4, 4);
            } else if (width == 16 && depth == 4) {
                const auto row = [&](int64_t k) FXQ_ALWAYS {
                    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + (g * 4 + k) * stride + c));
                };
                const __m128i a = row(0), b = row(1), d = row(2), e = row(3);
                const __m128i f = _mm_unpacklo_epi8(a, b), h = _mm_unpackhi_epi8(a, b);
                const __m128i i = _mm_unpacklo_epi8(d, e), j = _mm_unpackhi_epi8(d, e);
                __m128i *to = reinterpret_cast<__m128i *>(group);
                _mm_store_si128(to, _mm_unpacklo_epi16(f, i)), _mm_store_si128(to + 1, _mm_unpackhi_epi16(f, i));
                _mm_store_si128(to + 2, _mm_unpacklo_epi16(h, j)), _mm_store_si128(to + 3, _mm_unpackhi_epi16(h, j));
            } else {
                __builtin_memset(group, middle, sizeof group);
                for (int64_t i = 0; i < width; ++i)
                    for (int64_t k = 0; k < depth; ++k)
                        group[i * 4 + k] = transposed ? source[(c + i) * stride + g * 4 + k] : source[(g * 4 + k) * stride + c + i];
            }
            for (int half = 0; half < 2; ++half) {
                const __m256i found = _mm256_sub_epi8(load_bytes(group + half * 32), minus);
                store_bytes(found, numbers + g * kGroupBytes + half * 32);
                sums[half] = plus_row_sums(sums[half], found);
            }
        }
        store_bytes(sums[0], column_sum + c), store_bytes(sums[1], column_sum + c + 8);
    }
}

#include "lanes.inl"
