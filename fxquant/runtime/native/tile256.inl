// What pieces of a tile need of 256-bit registers.

#include "pieces.inl"

// Keeps what was computed in a register, and computes it here: compilers that move all loads to the front run out of
// registers.
FXQ_INLINE void keep(__m256i &a, __m256i &b) { asm volatile("" : "+x"(a), "+x"(b)); }

// The same four bytes everywhere.
FXQ_INLINE __m256i four_bytes(const void *from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

// What the sums of half a row begin at.
FXQ_INLINE __m256i first_of(const Place &place, int row, int half) {
    return place.begin ? load_bytes(place.begin_at(row, half * 8)) : _mm256_setzero_si256();
}
