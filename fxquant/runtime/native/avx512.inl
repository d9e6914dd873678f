// What the sets for AVX512 share.

// The table of 256 bytes is in four registers; the first bit of a code says which two hold its entry.
void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, Left *out) {
    const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
    const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
    for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 mask = count - i < 64 ? (uint64_t(1) << (count - i)) - 1 : ~uint64_t(0);
        const __m512i code = _mm512_maskz_loadu_epi8(mask, codes + i);
        const __m512i low = _mm512_permutex2var_epi8(a, code, b), high = _mm512_permutex2var_epi8(c, code, d);
        _mm512_mask_storeu_epi8(out + i, mask, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
    }
}
