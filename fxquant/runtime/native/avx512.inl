// What the sets for AVX512 share: vectors of 16 floats, tables, and the packing of activations.

// Two registers at a time: long chains of operations need a second one to wait for.
constexpr int kLanes = 32;

struct Vec {
    __m512 low, high;
};
struct Whole {
    __m512i low, high;
};

static FXQ_INLINE __mmask16 mask_of(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
static FXQ_INLINE __mmask64 mask64_of(int64_t count) { return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0); }

static FXQ_INLINE Vec splat(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }
static FXQ_INLINE Whole splat(uint32_t x) {
    return {_mm512_set1_epi32(static_cast<int>(x)), _mm512_set1_epi32(static_cast<int>(x))};
}
static FXQ_INLINE Vec load(const float *from, int64_t count) {
    if (count >= kLanes) return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    return {_mm512_maskz_loadu_ps(mask_of(count), from), _mm512_maskz_loadu_ps(mask_of(count - 16), from + 16)};
}
static FXQ_INLINE Whole load(const int32_t *from, int64_t count) {
    if (count >= kLanes) return {_mm512_loadu_si512(from), _mm512_loadu_si512(from + 16)};
    return {_mm512_maskz_loadu_epi32(mask_of(count), from), _mm512_maskz_loadu_epi32(mask_of(count - 16), from + 16)};
}
static FXQ_INLINE void store(Vec x, float *to, int64_t count) {
    if (count >= kLanes) {
        _mm512_storeu_ps(to, x.low), _mm512_storeu_ps(to + 16, x.high);
    } else {
        _mm512_mask_storeu_ps(to, mask_of(count), x.low);
        _mm512_mask_storeu_ps(to + 16, mask_of(count - 16), x.high);
    }
}
static FXQ_INLINE void store_bytes(Whole x, uint8_t *to, int64_t count) {
    const __m128i low = _mm512_cvtepi32_epi8(x.low), high = _mm512_cvtepi32_epi8(x.high);
    if (count >= kLanes) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), low);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 16), high);
    } else {
        _mm_mask_storeu_epi8(to, mask_of(count), low);
        _mm_mask_storeu_epi8(to + 16, mask_of(count - 16), high);
    }
}

static FXQ_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
static FXQ_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.low, b.low), _mm512_sub_ps(a.high, b.high)}; }
static FXQ_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)}; }
static FXQ_INLINE Vec larger(Vec a, Vec b) {  // b where a is no number
    return {_mm512_max_ps(a.low, b.low), _mm512_max_ps(a.high, b.high)};
}
static FXQ_INLINE Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.low, b.low), _mm512_min_ps(a.high, b.high)}; }
static FXQ_INLINE Vec size_of(Vec a) { return {_mm512_abs_ps(a.low), _mm512_abs_ps(a.high)}; }
static FXQ_INLINE Vec fused(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}
static FXQ_INLINE Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.low, b.low, _CMP_LT_OQ), otherwise.low, then.low),
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.high, b.high, _CMP_LT_OQ), otherwise.high, then.high)};
}
static FXQ_INLINE Vec only(Vec x, int64_t count, float rest) {  // the first `count` of x
    if (count >= kLanes) return x;
    const __m512 other = _mm512_set1_ps(rest);
    return {_mm512_mask_mov_ps(other, mask_of(count), x.low), _mm512_mask_mov_ps(other, mask_of(count - 16), x.high)};
}
static FXQ_INLINE Vec to_float(Whole x) { return {_mm512_cvtepi32_ps(x.low), _mm512_cvtepi32_ps(x.high)}; }
// The coefficients of GELU's pieces, times a factor: looked up in registers.
struct Pieces {
    __m512 first[kGeluDegree + 1], second[kGeluDegree + 1];
    explicit Pieces(float factor) {
        for (int k = 0; k <= kGeluDegree; ++k) {
            first[k] = _mm512_mul_ps(_mm512_loadu_ps(gelu_table[k]), _mm512_set1_ps(factor));
            second[k] = _mm512_mul_ps(_mm512_loadu_ps(gelu_table[k] + 16), _mm512_set1_ps(factor));
        }
    }
    FXQ_INLINE void take(Whole piece, Vec *coefficients) const {
#pragma GCC unroll 4
        for (int k = 0; k <= kGeluDegree; ++k)
            coefficients[k] = {_mm512_permutex2var_ps(first[k], piece.low, second[k]),
                               _mm512_permutex2var_ps(first[k], piece.high, second[k])};
    }
};
static FXQ_INLINE Whole bits_of(Vec x) { return {_mm512_castps_si512(x.low), _mm512_castps_si512(x.high)}; }
static FXQ_INLINE Vec float_of(Whole x) { return {_mm512_castsi512_ps(x.low), _mm512_castsi512_ps(x.high)}; }
static FXQ_INLINE Whole operator+(Whole a, Whole b) {
    return {_mm512_add_epi32(a.low, b.low), _mm512_add_epi32(a.high, b.high)};
}
static FXQ_INLINE Whole operator-(Whole a, Whole b) {
    return {_mm512_sub_epi32(a.low, b.low), _mm512_sub_epi32(a.high, b.high)};
}
static FXQ_INLINE Whole operator*(Whole a, Whole b) {
    return {_mm512_mullo_epi32(a.low, b.low), _mm512_mullo_epi32(a.high, b.high)};
}
static FXQ_INLINE Whole operator<<(Whole a, unsigned by) { return {_mm512_slli_epi32(a.low, by), _mm512_slli_epi32(a.high, by)}; }
static FXQ_INLINE Whole operator>>(Whole a, unsigned by) { return {_mm512_srli_epi32(a.low, by), _mm512_srli_epi32(a.high, by)}; }

// Of 16 partial sums, in the order that all sets keep.
static FXQ_INLINE float sum_of(__m512 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Looking up 32 entries ignores all bits but the last five.
static FXQ_INLINE Whole piece_of(Vec sum) { return bits_of(sum); }

// As in portable.inl.
template <int power>
static FXQ_INLINE float sum(const float *x, int64_t count, float center) {
    const __m512 middle = _mm512_set1_ps(center);
    __m512 sums[4] = {};
    const auto add = [middle](__m512 to, __m512 value) {
        const __m512 difference = _mm512_sub_ps(value, middle);
        return _mm512_add_ps(to, power == 2 ? _mm512_mul_ps(difference, difference) : difference);
    };
    int64_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int part = 0; part < 4; ++part) sums[part] = add(sums[part], _mm512_loadu_ps(x + i + part * 16));
    for (; i + 16 <= count; i += 16) sums[0] = add(sums[0], _mm512_loadu_ps(x + i));
    if (i < count) sums[0] = add(sums[0], _mm512_mask_loadu_ps(middle, mask_of(count - i), x + i));
    return sum_of(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

static FXQ_INLINE float largest_of(const Vec *x) { return _mm512_reduce_max_ps(_mm512_max_ps(x->low, x->high)); }

static FXQ_INLINE float sum_of(const Vec *sums) { return sum_of(_mm512_add_ps(sums->low, sums->high)); }

// The table of 256 bytes is in four registers; the first bit of a code says which two hold its entry.
static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, Left *out) {
    const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
    const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
    for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 mask = mask64_of(count - i);
        const __m512i code = _mm512_maskz_loadu_epi8(mask, codes + i);
        const __m512i low = _mm512_permutex2var_epi8(a, code, b), high = _mm512_permutex2var_epi8(c, code, d);
        _mm512_mask_storeu_epi8(out + i, mask, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
    }
}

// The codes of a codebook: its grid has a table.
struct Codebook {
    uint8_t codes[256];
    explicit Codebook(const FxqQuantizer &q) {
        for (int byte = 0, k = 0; byte < 256; ++byte) {
            codes[byte] = q.code[k];
            if (byte == q.below[k]) ++k;
        }
    }
    void snap(uint8_t *bytes, int64_t count) const { look_up(codes, bytes, count, bytes); }
};

// As in portable.inl; what no int32 holds becomes the least one, and 0.
template <int count>
static FXQ_INLINE void table_bytes(const uint8_t *table, int steps, const Vec *x, uint8_t *out) {
    static_assert(count == 64, "four registers");
    const __m512 most = _mm512_set1_ps(float(FXQ_TABLE_ENTRIES - 1));
    const auto whole = [most](__m512 y) { return _mm512_cvtps_epi32(_mm512_min_ps(y, most)); };
    const __m512i a = _mm512_packus_epi32(whole(x[0].low), whole(x[0].high));
    const __m512i b = _mm512_packus_epi32(whole(x[1].low), whole(x[1].high));
    const __m512i low_byte = _mm512_set1_epi16(255);
    const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    const __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte));
    const auto row = [&](int i) FXQ_ALWAYS {
        return _mm512_permutexvar_epi8(high, _mm512_loadu_si512(table + i * kTableRow));
    };
    __m512i bytes = row(0);
    for (int step = 0; step < steps; ++step)
        bytes = _mm512_mask_mov_epi8(bytes, _mm512_cmpge_epu8_mask(low, row(2 * step + 1)), row(2 * step + 2));
    // Packing has put groups of four numbers of each quarter of a register side by side.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, bytes));
}

// Up to 64 bytes less 128; zero beyond `count`.
static FXQ_INLINE __m512i signed_bytes(const uint8_t *from, int64_t count) {
    const __m512i middle = _mm512_set1_epi8(-128);
    if (count <= 0) return _mm512_setzero_si512();
    return _mm512_xor_si512(_mm512_mask_loadu_epi8(middle, mask64_of(count), from), middle);
}

// 16 rows of 16 times 4 bytes to 16 groups of 16 times 4 bytes.
static FXQ_INLINE void transpose(__m512i *r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 4 rows of 64 bytes to 4 groups of 16 times 4 bytes: byte i of row r to group i / 16, place 4 (i % 16) + r.
static FXQ_INLINE void interleave(__m512i *r) {
    const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    const __m512i e = _mm512_unpacklo_epi16(a, c), f = _mm512_unpackhi_epi16(a, c);
    const __m512i g = _mm512_unpacklo_epi16(b, d), h = _mm512_unpackhi_epi16(b, d);
    const __m512i i = _mm512_shuffle_i32x4(e, f, 0x44), j = _mm512_shuffle_i32x4(e, f, 0xee);
    const __m512i k = _mm512_shuffle_i32x4(g, h, 0x44), l = _mm512_shuffle_i32x4(g, h, 0xee);
    r[0] = _mm512_shuffle_i32x4(i, k, 0x88), r[1] = _mm512_shuffle_i32x4(i, k, 0xdd);
    r[2] = _mm512_shuffle_i32x4(j, l, 0x88), r[3] = _mm512_shuffle_i32x4(j, l, 0xdd);
}

static FXQ_INLINE __m512i plus_row_sums(__m512i sums, __m512i numbers) {
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), numbers);
}

// As in portable.inl, with 128 in the middle.
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int32_t, int64_t unit_elements, Right *numbers, int32_t *column_sum) {
    const int64_t groups = unit_elements / kGroupBytes;
    if (transposed) {
        for (int64_t c = 0; c < columns; c += 16, numbers += unit_elements) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t g = 0; g < groups; g += 16) {
                __m512i r[16];
                for (int64_t i = 0; i < 16; ++i)
                    r[i] = signed_bytes(source + (c + i) * stride + g * 4, c + i < columns ? inner - g * 4 : 0);
                transpose(r);
                for (int64_t i = 0; i < 16 && g + i < groups; ++i) {
                    _mm512_storeu_si512(numbers + (g + i) * kGroupBytes, r[i]);
                    sums = plus_row_sums(sums, r[i]);
                }
            }
            _mm512_storeu_si512(column_sum + c, sums);
        }
        return;
    }
    for (int64_t c = 0; c < columns; c += 64, numbers += 4 * unit_elements) {
        const int64_t units = (columns - c + 15) / 16 < 4 ? (columns - c + 15) / 16 : 4;
        __m512i sums[4] = {};
        for (int64_t g = 0; g < groups; ++g) {
            __m512i r[4];
            for (int64_t i = 0; i < 4; ++i)
                r[i] = signed_bytes(source + (g * 4 + i) * stride + c, g * 4 + i < inner ? columns - c : 0);
            interleave(r);
            for (int64_t u = 0; u < units; ++u) {
                _mm512_storeu_si512(numbers + u * unit_elements + g * kGroupBytes, r[u]);
                sums[u] = plus_row_sums(sums[u], r[u]);
            }
        }
        for (int64_t u = 0; u < units; ++u) _mm512_storeu_si512(column_sum + c + u * 16, sums[u]);
    }
}
