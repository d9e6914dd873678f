// A tile of a set with one loop, whose `piece<rows>` takes at most six rows and 16 columns at a time.

template <class Loop, class Work>
void tile(const Loop &loop, int rows, int vectors, const typename Loop::Left *left, int64_t left_stride,
          const typename Loop::Right *right, int64_t unit_elements, int64_t groups, const int32_t *begin,
          int64_t begin_stride, int32_t *sums, int64_t sum_stride, Work &) {
    static constexpr Pieces16<Loop> kPieces = {6, {piece<1>, piece<2>, piece<3>, piece<4>, piece<5>, piece<6>}};
    run_pieces(kPieces, loop, rows, vectors, left, right, unit_elements,
               {left_stride, groups, begin, begin_stride, sums, sum_stride});
}
