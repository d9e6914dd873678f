// How sets of few or small registers go through a tile: pieces of a few rows and 16 columns, whose sums are in registers.

// Calls task(i) for i below `count`, each a constant: only so do compilers keep arrays of registers in registers.
template <class Task, int... i>
FXQ_INLINE void each_of(const Task &task, std::integer_sequence<int, i...>) {
    (task(std::integral_constant<int, i>()), ...);
}
template <int count, class Task>
FXQ_INLINE void each(const Task &task) {
    each_of(task, std::make_integer_sequence<int, count>());
}

// Where a piece reads and writes. begin: what sums begin at, or null.
struct Place {
    int64_t left_stride, groups;
    const int32_t *begin;
    int64_t begin_stride;
    int32_t *sums;
    int64_t sum_stride;
    FXQ_INLINE const int32_t *begin_at(int row, int column) const { return begin + row * begin_stride + column; }
    FXQ_INLINE int32_t *at(int row, int column) const { return sums + row * sum_stride + column; }
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
