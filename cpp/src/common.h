// Shared pieces of the core: errors, dual numbers, splines, interpolation weights, threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "diffforce.h"

// One copy per instruction set, chosen when the library is loaded: the wheel runs on any x86-64 and
// is still vectorised. (Sanitizers run before such a choice can be made.)
#if defined(DIFFFORCE_HAS_TARGET_CLONES) && !defined(__SANITIZE_ADDRESS__)
#define DIFFFORCE_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DIFFFORCE_CLONES
#endif
#if defined(__CUDACC__)
#define DIFFFORCE_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DIFFFORCE_INLINE inline __attribute__((always_inline))
#else
#define DIFFFORCE_INLINE inline
#endif

// The iterations of the loop that follows do not touch each other's memory.
#if defined(__clang__)
#define DIFFFORCE_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define DIFFFORCE_VECTORISE _Pragma("GCC ivdep")
#else
#define DIFFFORCE_VECTORISE
#endif

namespace diffforce {

struct Error {
    diffforce_status status;
    std::string message;
};

template <typename... Args>
[[noreturn]] void fail(diffforce_status status, const char* format, Args... args) {
    char text[512];
    std::snprintf(text, sizeof text, format, args...);
    throw Error{status, text};
}
[[noreturn]] inline void fail(diffforce_status status, const char* text) {
    throw Error{status, text};
}

/// Keep a message for diffforce_last_error and pass the status on.
int report(diffforce_status status, const std::string& message);

/// Run a body that may throw; turn what it throws into a status.
template <typename Body>
int guarded(Body&& body) {
    try {
        body();
        return report(DIFFFORCE_OK, "");
    } catch (const Error& error) {
        return report(error.status, error.message);
    } catch (const std::bad_alloc&) {
        return report(DIFFFORCE_NO_MEMORY, "not enough memory; use fewer frames at a time");
    } catch (const std::exception& error) {
        return report(DIFFFORCE_INTERNAL_ERROR, error.what());
    } catch (...) {
        return report(DIFFFORCE_INTERNAL_ERROR, "unknown error");
    }
}

inline void require(const void* pointer, const char* name) {
    if (pointer == nullptr) fail(DIFFFORCE_NULL_POINTER, "%s: expected an array, found NULL", name);
}

inline void require_count(int64_t count, int64_t least, const char* name) {
    if (count < least || count > (int64_t{1} << 40))
        fail(DIFFFORCE_BAD_SHAPE, "%s: expected a count of at least %lld, found %lld", name,
             static_cast<long long>(least), static_cast<long long>(count));
}

template <typename T>
void require_finite(const T* data, int64_t count, const char* name) {
    // x - x is 0 for a finite x and NaN otherwise; the sum vectorises.
    T sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += data[i] - data[i];
    if (sum == T(0)) return;
    for (int64_t i = 0; i < count; ++i)
        if (!std::isfinite(data[i]))
            fail(DIFFFORCE_NOT_FINITE, "%s: expected finite numbers, found %g at flat index %lld",
                 name, static_cast<double>(data[i]), static_cast<long long>(i));
}

/// n_threads as asked for, or the default (see the header).
int resolve_threads(int n_threads);

/// Cut [0, n) into at most n_threads pieces; body(begin, end, thread). Rethrows the first error.
void parallel(int64_t n, int n_threads, const std::function<void(int64_t, int64_t, int)>& body);

// ---------------------------------------------------------------- dual numbers

/// a + b eps with eps^2 = 0: a function of duals carries its directional derivative along.
template <typename T>
struct Dual {
    T a, b;
    Dual() = default;
    constexpr Dual(T value, T slope = T(0)) : a(value), b(slope) {}
};
template <typename T>
DIFFFORCE_INLINE Dual<T> operator+(Dual<T> x, Dual<T> y) {
    return {x.a + y.a, x.b + y.b};
}
template <typename T>
DIFFFORCE_INLINE Dual<T> operator-(Dual<T> x, Dual<T> y) {
    return {x.a - y.a, x.b - y.b};
}
template <typename T>
DIFFFORCE_INLINE Dual<T> operator-(Dual<T> x) {
    return {-x.a, -x.b};
}
template <typename T>
DIFFFORCE_INLINE Dual<T> operator*(Dual<T> x, Dual<T> y) {
    return {x.a * y.a, x.a * y.b + x.b * y.a};
}
template <typename T>
DIFFFORCE_INLINE Dual<T> operator/(Dual<T> x, Dual<T> y) {
    const T q = x.a / y.a;
    return {q, (x.b - q * y.b) / y.a};
}
template <typename T>
DIFFFORCE_INLINE Dual<T>& operator+=(Dual<T>& x, Dual<T> y) {
    x.a += y.a;
    x.b += y.b;
    return x;
}
template <typename T>
DIFFFORCE_INLINE Dual<T>& operator-=(Dual<T>& x, Dual<T> y) {
    x.a -= y.a;
    x.b -= y.b;
    return x;
}

template <typename S>
struct Underlying {
    using type = S;
};
template <typename T>
struct Underlying<Dual<T>> {
    using type = T;
};
template <typename S>
using Real = typename Underlying<S>::type;

template <typename T>
DIFFFORCE_INLINE T primal(T x) {
    return x;
}
template <typename T>
DIFFFORCE_INLINE T primal(Dual<T> x) {
    return x.a;
}
template <typename T>
DIFFFORCE_INLINE T tangent(Dual<T> x) {
    return x.b;
}

DIFFFORCE_INLINE float square_root(float x) {
    return std::sqrt(x);
}
DIFFFORCE_INLINE double square_root(double x) {
    return std::sqrt(x);
}
template <typename T>
DIFFFORCE_INLINE Dual<T> square_root(Dual<T> x) {
    const T root = std::sqrt(x.a);
    return {root, root > T(0) ? x.b / (T(2) * root) : T(0)};
}
DIFFFORCE_INLINE float arc_tangent(float y, float x) {
    return std::atan2(y, x);
}
DIFFFORCE_INLINE double arc_tangent(double y, double x) {
    return std::atan2(y, x);
}
template <typename T>
DIFFFORCE_INLINE Dual<T> arc_tangent(Dual<T> y, Dual<T> x) {
    return {std::atan2(y.a, x.a), (x.a * y.b - y.a * x.b) / (x.a * x.a + y.a * y.a)};
}

// ---------------------------------------------------------------- vectors

template <typename S>
struct Vec {
    S x, y, z;
};
template <typename S>
DIFFFORCE_INLINE Vec<S> operator+(const Vec<S>& a, const Vec<S>& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <typename S>
DIFFFORCE_INLINE Vec<S> operator-(const Vec<S>& a, const Vec<S>& b) {
    return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <typename S>
DIFFFORCE_INLINE Vec<S> operator*(S s, const Vec<S>& a) {
    return {s * a.x, s * a.y, s * a.z};
}
template <typename S>
DIFFFORCE_INLINE S dot(const Vec<S>& a, const Vec<S>& b) {
    return a.x * b.x + a.y * b.y + a.z * b.z;
}
template <typename S>
DIFFFORCE_INLINE Vec<S> cross(const Vec<S>& a, const Vec<S>& b) {
    return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

// ---------------------------------------------------------------- cubic B-splines

/// Where q lies on a grid: first coefficient, fraction u of the interval, overshoot beyond the
/// domain (in units of h; 0 inside).
template <typename S>
struct Place {
    int64_t first;
    S u, over;
};

template <typename S>
DIFFFORCE_INLINE Place<S> locate(S s, int64_t n, bool periodic) {
    using T = Real<S>;
    const T p = primal(s);
    if (periodic) {
        const T below = std::floor(p);
        int64_t first = static_cast<int64_t>(below) % n;
        if (first < 0) first += n;
        return {first, s - S(below), S(T(0))};
    }
    const T top = static_cast<T>(n - 3);
    if (p < T(0)) return {0, S(T(0)), s};
    if (p > top) return {n - 4, S(T(1)), s - S(top)};
    const int64_t below = static_cast<int64_t>(p);
    const int64_t first = below < n - 4 ? below : n - 4;
    return {first, s - S(static_cast<T>(first)), S(T(0))};
}

template <typename S>
DIFFFORCE_INLINE void basis(S u, S w[4]) {
    using T = Real<S>;
    const S v = S(T(1)) - u, sixth(T(1) / T(6)), half(T(0.5)), two_thirds(T(2) / T(3));
    w[0] = sixth * v * v * v;
    w[1] = (half * u - S(T(1))) * u * u + two_thirds;
    w[2] = (half * v - S(T(1))) * v * v + two_thirds;
    w[3] = sixth * u * u * u;
}

/// Derivative of the basis in u.
template <typename S>
DIFFFORCE_INLINE void basis_slope(S u, S w[4]) {
    using T = Real<S>;
    const S v = S(T(1)) - u, half(T(0.5)), two(T(2)), three_halves(T(1.5));
    w[0] = -(half * v * v);
    w[1] = (three_halves * u - two) * u;
    w[2] = (two - three_halves * v) * v;
    w[3] = half * u * u;
}

/// Second derivative of the basis in u.
DIFFFORCE_INLINE void basis_curve(double u, double w[4]) {
    const double v = 1.0 - u;
    w[0] = v;
    w[1] = 3.0 * u - 2.0;
    w[2] = 3.0 * v - 2.0;
    w[3] = u;
}

// ---------------------------------------------------------------- interpolation weights

/// Weights of the two neighbouring noise knots and their first and second sigma derivatives.
struct NoiseWeights {
    int64_t knot[2];
    int count;
    double w[2], d[2], dd[2];
};

/// Check that knots ascend from 0.
template <typename T>
void check_knots(const T* knots, int64_t n, const char* name) {
    for (int64_t k = 0; k < n; ++k)
        if (!std::isfinite(knots[k]) || (k == 0 ? knots[0] != T(0) : !(knots[k] > knots[k - 1])))
            fail(DIFFFORCE_BAD_GRID,
                 "%s: expected finite numbers that ascend from 0, found %g at %lld", name,
                 static_cast<double>(knots[k]), static_cast<long long>(k));
}

template <typename T>
NoiseWeights noise_weights(T sigma_t, const T* knots, int64_t n, int64_t frame) {
    const double sigma = sigma_t, last = knots[n - 1];
    const double slack = last * (std::is_same<T, float>::value ? 1e-6 : 1e-12);
    if (!(sigma >= 0.0 && sigma <= last + slack))
        fail(DIFFFORCE_OUT_OF_RANGE,
             "sigma: expected a noise level in [0, %g] nm, found %g in frame %lld", last, sigma,
             static_cast<long long>(frame));
    NoiseWeights out{};
    if (n == 1) {
        out.count = 1;
        out.w[0] = 1.0;
        return out;
    }
    const int64_t m = std::min<int64_t>(
        std::max<int64_t>(std::upper_bound(knots, knots + n, sigma_t) - knots - 1, 0), n - 2);
    double upper, slope, curve;
    if (m == 0) {
        const double scale = 1.0 / (static_cast<double>(knots[1]) * static_cast<double>(knots[1]));
        upper = sigma * sigma * scale;
        slope = 2.0 * sigma * scale;
        curve = 2.0 * scale;
    } else {
        const double low = knots[m], high = knots[m + 1], scale = 1.0 / std::log(high / low);
        upper = std::log(sigma / low) * scale;
        slope = scale / sigma;
        curve = -scale / (sigma * sigma);
    }
    out.count = 2;
    out.knot[0] = m;
    out.knot[1] = m + 1;
    out.w[0] = 1.0 - upper;
    out.w[1] = upper;
    out.d[0] = -slope;
    out.d[1] = slope;
    out.dd[0] = -curve;
    out.dd[1] = curve;
    return out;
}

/// Weights of the lambda knots and their first and second lambda derivatives; knots from `count`
/// on have none. The vectors keep their memory from frame to frame.
struct LambdaWeights {
    int64_t begin = 0, end = 0;
    std::vector<double> w, d, dd;
};

template <typename T>
void lambda_weights(T lam_t, const T* knots, int64_t n, bool integrated, int64_t frame,
                    LambdaWeights& out) {
    const double lam = lam_t, slack = std::is_same<T, float>::value ? 1e-6 : 1e-12;
    if (!(lam >= -slack && lam <= 1.0 + slack))
        fail(DIFFFORCE_OUT_OF_RANGE, "lam: expected a value in [0, 1], found %g in frame %lld", lam,
             static_cast<long long>(frame));
    out.w.assign(n, 0.0);
    out.d.assign(n, 0.0);
    out.dd.assign(n, 0.0);
    if (n == 1) {
        out.begin = 0;
        out.end = 1;
        out.w[0] = integrated ? lam : 1.0;
        out.d[0] = integrated ? 1.0 : 0.0;
        return;
    }
    const int64_t k = std::min<int64_t>(
        std::max<int64_t>(std::upper_bound(knots, knots + n, lam_t) - knots - 1, 0), n - 2);
    const double gap = static_cast<double>(knots[k + 1]) - static_cast<double>(knots[k]);
    const double u = (lam - static_cast<double>(knots[k])) / gap;
    out.end = k + 2;
    if (!integrated) {
        out.begin = k;
        out.w[k] = 1.0 - u;
        out.w[k + 1] = u;
        out.d[k] = -1.0 / gap;
        out.d[k + 1] = 1.0 / gap;
        return;
    }
    out.begin = 0;
    for (int64_t i = 0; i <= k; ++i) {
        const double width = static_cast<double>(knots[i + 1]) - static_cast<double>(knots[i]);
        const double part = i < k ? 1.0 : u;
        out.w[i] += width * (part - 0.5 * part * part);
        out.w[i + 1] += width * 0.5 * part * part;
    }
    out.d[k] = 1.0 - u;
    out.d[k + 1] = u;
    out.dd[k] = -1.0 / gap;
    out.dd[k + 1] = 1.0 / gap;
}

}  // namespace diffforce
