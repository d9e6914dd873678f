// How far the numbers of an operand reach, by which a set whose loops have limits chooses one. Bytes are looked at when
// they are there: whoever calls may have told anything, and every loop that is chosen is exact.

struct Reach {
    int32_t least = 255, most = 0;
};

// Of bytes (rows, width), rows `stride` apart.
static Reach reach_of(const uint8_t *bytes, int64_t stride, int64_t rows, int64_t width) {
    Reach found;
    for (int64_t r = 0; r < rows; ++r, bytes += stride) {
        uint8_t least = 255, most = 0;
        for (int64_t i = 0; i < width; ++i) {
            least = bytes[i] < least ? bytes[i] : least;
            most = bytes[i] > most ? bytes[i] : most;
        }
        found.least = least < found.least ? least : found.least;
        found.most = most > found.most ? most : found.most;
    }
    return found;
}

// What zero-points lose where tiles take kShift off every byte of every digit.
constexpr int32_t shift_of(const FxqLevels &levels) {
    return kShift * (levels.count == 1 ? 1 : levels.count == 2 ? 1 + 256 : 1 + 256 + 65536);
}

// The left operand as loops take it: bytes or digits less `low`, from 0 to `most`.
struct LeftReach {
    int32_t low = 0, most = 255;
};

// Taking the least byte off all of them is worth a copy where what is left is half as large.
static LeftReach left_reach(const FxqLevels &levels, const uint8_t *bytes, int64_t stride, int64_t rows, int64_t width) {
    LeftReach found;
    if (!kChooses) return found;
    if (!levels.identity) {
        found.most = reach_of(levels.digit[0], 256, levels.count, 256).most;
        return found;
    }
    const Reach reach = reach_of(bytes, stride, rows, width);
    found.low = 2 * (reach.most - reach.least) <= reach.most ? reach.least : 0;
    found.most = reach.most - found.low;
    return found;
}

// The right operand, where it is bytes: these less `middle`, at most `most` in size. `middle` is 128 but where another
// one makes them half as large.
struct RightReach {
    int32_t middle = 128, most = 128;
};
static RightReach right_reach(const uint8_t *bytes, int64_t stride, int64_t rows, int64_t width) {
    RightReach found;
    if (!kChooses) return found;
    const Reach reach = reach_of(bytes, stride, rows, width);
    const auto most_from = [&](int32_t middle) {
        return reach.most - middle > middle - reach.least ? reach.most - middle : middle - reach.least;
    };
    const int32_t middle = (reach.least + reach.most + 1) / 2;
    found.middle = 2 * most_from(middle) <= most_from(128) ? middle : 128;
    found.most = most_from(found.middle);
    return found;
}
