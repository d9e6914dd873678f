// For sets whose products of bytes are exact for all bytes: one loop does everything, and nobody looks how far they reach.

struct ByteLoop {
    using Left = uint8_t;
    using Right = int8_t;
    explicit ByteLoop(int64_t) {}
    static constexpr bool prepares() { return false; }
    void prepare(int, int8_t *, int64_t) {}
};
using Left = ByteLoop::Left;
using Right = ByteLoop::Right;

constexpr bool kChooses = false;
constexpr int64_t depth_of(int64_t, int64_t) { return 1; }
template <class Panel, class Task>
void choose_for_weights(int64_t, int64_t, int64_t, const Panel &, const Task &task) {
    task(ByteLoop(1));
}
template <class Task>
void choose_loop(int64_t depth, const Task &task) {
    task(ByteLoop(depth));
}
