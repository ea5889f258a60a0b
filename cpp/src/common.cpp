#include "common.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace diffforce {

namespace {

thread_local std::string last_error;
std::atomic<int> default_threads{0};

int from_environment(const char* name) {
    const char* text = std::getenv(name);
    return text == nullptr ? 0 : std::atoi(text);
}

}  // namespace

int report(diffforce_status status, const std::string& message) {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

int resolve_threads(int n_threads) {
    if (n_threads > 0) return n_threads;
    if (const int asked = default_threads.load(); asked > 0) return asked;
    for (const char* name : {"DIFFFORCE_NUM_THREADS", "OMP_NUM_THREADS"})
        if (const int asked = from_environment(name); asked > 0) return asked;
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel(int64_t n, int n_threads, const std::function<void(int64_t, int64_t, int)>& body) {
    const int count = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(n, n_threads)));
    if (count == 1) {
        body(0, n, 0);
        return;
    }
    std::exception_ptr first_error;
    std::mutex guard;
    auto piece = [&](int k) {
        try {
            body(n * k / count, n * (k + 1) / count, k);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            if (!first_error) first_error = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    int started = 1;
    try {
        for (; started < count; ++started) threads.emplace_back(piece, started);
    } catch (const std::exception&) {
        // No more threads to be had: this one does the rest.
    }
    piece(0);
    for (int k = started; k < count; ++k) piece(k);
    for (auto& thread : threads) thread.join();
    if (first_error) std::rethrow_exception(first_error);
}

}  // namespace diffforce

extern "C" {

const char* diffforce_last_error(void) {
    return diffforce::last_error.c_str();
}

const char* diffforce_version(void) {
    return DIFFFORCE_VERSION;
}

int diffforce_set_num_threads(int n_threads) {
    return diffforce::guarded([&] {
        if (n_threads < 0)
            diffforce::fail(DIFFFORCE_BAD_SHAPE, "n_threads: expected 0 or more, found %d",
                            n_threads);
        diffforce::default_threads.store(n_threads);
    });
}

}  // extern "C"
