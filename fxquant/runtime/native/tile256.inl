// How sets of 256-bit registers go through a tile: pieces of a few rows and 16 columns, whose sums are in registers.

// Calls task(i) for i below `count`, each a constant: only so do compilers keep arrays of registers in registers.
template <class Task, int... i>
FXQ_INLINE void each_of(const Task &task, std::integer_sequence<int, i...>) {
    (task(std::integral_constant<int, i>()), ...);
}
template <int count, class Task>
FXQ_INLINE void each(const Task &task) {
    each_of(task, std::make_integer_sequence<int, count>());
}

// Keeps what was computed in a register, and computes it here: compilers that move all loads to the front run out of
// registers.
FXQ_INLINE void keep(__m256i &a, __m256i &b) { asm volatile("" : "+x"(a), "+x"(b)); }

// The same four bytes everywhere.
FXQ_INLINE __m256i four_bytes(const void *from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

// Where a piece reads and writes. begin: what sums begin at, or null.
struct Place {
    int64_t left_stride, groups;
    const int32_t *begin;
    int64_t begin_stride;
    int32_t *sums;
    int64_t sum_stride;
    FXQ_INLINE __m256i first(int row, int half) const {
        return begin ? load_bytes(begin + row * begin_stride + half * 8) : _mm256_setzero_si256();
    }
    FXQ_INLINE int32_t *at(int row, int half) const { return sums + row * sum_stride + half * 8; }
    Place moved(int rows, int vectors) const {
        return {left_stride, groups, begin ? begin + rows * begin_stride + vectors * 16 : nullptr, begin_stride,
                sums + rows * sum_stride + vectors * 16, sum_stride};
    }
};

// The pieces of one loop by their rows: run[0] takes one. vector: which of the tile's 16 columns.
template <class Loop>
struct Pieces16 {
    typedef void (*Run)(const Loop &loop, int vector, const typename Loop::Left *, const typename Loop::Right *, const Place &);
    int most;
    Run run[6];
};

template <class Loop>
void run_pieces(const Pieces16<Loop> &pieces, const Loop &loop, int rows, int vectors, const typename Loop::Left *left,
                const typename Loop::Right *right, int64_t unit_elements, const Place &place) {
    int row = 0;
    for (int left_over = (rows + pieces.most - 1) / pieces.most; row < rows; --left_over) {  // of equal heights
        const int height = (rows - row + left_over - 1) / left_over;
        for (int v = 0; v < vectors; ++v)
            pieces.run[height - 1](loop, v, left + row * place.left_stride, right + v * unit_elements, place.moved(row, v));
        row += height;
    }
}
