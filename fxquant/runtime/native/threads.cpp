// A pool of threads that starts on first use and waits between calls, and each thread's scratch memory.
//
// Work is handed out by a counter; which thread does what never changes a result, since tasks write disjoint outputs.

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#endif

#include "kernels.h"

namespace fxq {
namespace {

struct Job {
    void (*task)(void *, int64_t);
    void *context;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    void work() noexcept {
        try {
            for (int64_t i; (i = next.fetch_add(1)) < count;) task(context, i);
        } catch (...) {
            failed = true;
        }
    }
};

// Looks for some hundred microseconds before its thread sleeps: an image's layers follow each other in less time than
// waking a thread takes, which may be fifty on a virtual machine. Without the processor's pause instruction, for
// which virtual machines may take it away.
constexpr int kLooks = 1 << 19;

template <class Condition>
void look_for(const Condition &is_there) {
    for (int i = 0; i < kLooks && !is_there(); ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
}

struct Pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    std::vector<std::thread> threads;
    // Written under the mutex; two of them are looked for without it.
    Job *job = nullptr;
    std::atomic<uint64_t> generation{0};
    std::atomic<int> running{0};
    int wanted = 0;

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            look_for([&] { return generation != seen; });
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return generation != seen; });
            seen = generation;
            if (wanted == 0) continue;
            --wanted;
            ++running;
            Job *mine = job;
            lock.unlock();
            mine->work();
            lock.lock();
            if (--running == 0) done.notify_all();
        }
    }
};

// One caller at a time uses the pool; others run alone. It is never destroyed: its threads end with the process.
std::mutex pool_owner;
Pool *pool = nullptr;

void after_fork_in_child() {
    // The child has none of the parent's threads; the parent's pool stays behind, unused.
    new (&pool_owner) std::mutex;
    pool = nullptr;
}

bool run_in_pool(Job &job, int32_t helpers) {
    if (!pool) {
        pool = new Pool;
#if !defined(_WIN32)
        static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
        (void)registered;
#endif
    }
    while (static_cast<int32_t>(pool->threads.size()) < helpers)
        pool->threads.emplace_back([self = pool] { self->serve(); });
    {
        std::lock_guard<std::mutex> lock(pool->mutex);
        pool->job = &job;
        pool->wanted = helpers;
        ++pool->generation;
    }
    pool->wake.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(pool->mutex);
    pool->wanted = 0;  // whoever has not come by now need not
    lock.unlock();
    look_for([] { return pool->running == 0; });
    lock.lock();
    pool->done.wait(lock, [] { return pool->running == 0; });
    return !job.failed;
}

#if defined(_WIN32)
void *aligned(size_t bytes) { return _aligned_malloc(bytes, 64); }
void give_back(void *data) { _aligned_free(data); }
#else
void *aligned(size_t bytes) {
    void *data = nullptr;
    return posix_memalign(&data, 64, bytes) == 0 ? data : nullptr;
}
void give_back(void *data) { std::free(data); }
#endif

struct Buffer {
    void *data = nullptr;
    size_t bytes = 0;
    ~Buffer() { give_back(data); }
};

}  // namespace

bool parallel(int64_t count, int32_t threads, void (*task)(void *, int64_t), void *context) {
    Job job;
    job.task = task;
    job.context = context;
    job.count = count;
    if (threads > 1 && count > 1) {
        std::unique_lock<std::mutex> owner(pool_owner, std::try_to_lock);
        if (owner.owns_lock()) {
            try {
                return run_in_pool(job, static_cast<int32_t>(count < threads ? count : threads) - 1);
            } catch (...) {
                // A thread could not be started, and nothing was handed out yet: this one does it all.
            }
        }
    }
    job.work();
    return !job.failed;
}

void *scratch(Slot slot, size_t bytes) {
    static thread_local Buffer buffers[kSlots];
    Buffer &buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        give_back(buffer.data);
        buffer.data = nullptr;
        buffer.bytes = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        buffer.data = aligned(rounded);
        if (!buffer.data) throw std::bad_alloc();
        buffer.bytes = rounded;
    }
    return buffer.data;
}

}  // namespace fxq
