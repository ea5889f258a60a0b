// Splines of internal coordinates: action, Hessian-vector product, normal equations.
#include <mutex>

#include "common.h"

namespace diffforce {
namespace {

constexpr double pi = 3.14159265358979323846;

template <typename T>
void check(const diffforce_internal_problem& p, bool with_coefficients) {
    require_count(p.n_frames, 0, "n_frames");
    require_count(p.n_atoms, 1, "n_atoms");
    require_count(p.n_instances, 0, "n_instances");
    require_count(p.n_classes, 0, "n_classes");
    require_count(p.n_noise, 1, "n_noise");
    require(p.offsets, "offsets");
    if (p.n_instances > 0) {
        require(p.atoms, "atoms");
        require(p.cls, "cls");
    }
    if (p.n_classes > 0) {
        require(p.kind, "kind");
        require(p.grid, "grid");
        if (with_coefficients) require(p.coef, "coef");
    }
    if (p.offsets[0] != 0)
        fail(DIFFFORCE_BAD_INDEX, "offsets: expected the first to be 0, found %lld",
             static_cast<long long>(p.offsets[0]));
    for (int64_t c = 0; c < p.n_classes; ++c) {
        if (p.kind[c] < DIFFFORCE_DISTANCE || p.kind[c] > DIFFFORCE_TORSION)
            fail(DIFFFORCE_BAD_INDEX,
                 "kind: expected 2 (distance), 3 (angle) or 4 (torsion), found %lld in class %lld",
                 static_cast<long long>(p.kind[c]), static_cast<long long>(c));
        const int64_t n = p.offsets[c + 1] - p.offsets[c];
        if (n < 4 || n > (int64_t{1} << 31))
            fail(DIFFFORCE_BAD_INDEX,
                 "offsets: expected at least 4 coefficients for a class, found %lld in class %lld",
                 static_cast<long long>(n), static_cast<long long>(c));
    }
    for (int64_t i = 0; i < p.n_instances; ++i) {
        const int64_t c = p.cls[i];
        if (c < 0 || c >= p.n_classes)
            fail(DIFFFORCE_BAD_INDEX, "cls: expected a class in [0, %lld), found %lld at %lld",
                 static_cast<long long>(p.n_classes), static_cast<long long>(c),
                 static_cast<long long>(i));
        for (int64_t k = 0; k < 4; ++k) {
            const int64_t atom = p.atoms[4 * i + k];
            const bool pad = k >= p.kind[c];
            if (pad ? atom != -1 : (atom < 0 || atom >= p.n_atoms))
                fail(DIFFFORCE_BAD_INDEX,
                     "atoms: expected %s, found %lld in slot %lld of instance %lld",
                     pad ? "-1 as padding" : "an atom index below n_atoms",
                     static_cast<long long>(atom), static_cast<long long>(k),
                     static_cast<long long>(i));
            for (int64_t j = 0; j < k && !pad; ++j)
                if (p.atoms[4 * i + j] == atom)
                    fail(DIFFFORCE_BAD_INDEX,
                         "atoms: expected different atoms, found %lld twice in "
                         "instance %lld",
                         static_cast<long long>(atom), static_cast<long long>(i));
        }
    }
    const T* grid = static_cast<const T*>(p.grid);
    const int64_t n_knots = with_coefficients ? p.n_noise : 1;
    for (int64_t k = 0; k < n_knots * p.n_classes; ++k) {
        const double lo = grid[3 * k], h = grid[3 * k + 1], wall = grid[3 * k + 2];
        const int64_t c = k % p.n_classes;
        if (!std::isfinite(lo) || !std::isfinite(h) || !(h > 0.0) || !std::isfinite(wall) ||
            !(wall >= 0.0))
            fail(DIFFFORCE_BAD_GRID,
                 "grid: expected finite lo, h > 0 and wall >= 0, found %g, %g, %g in class %lld",
                 lo, h, wall, static_cast<long long>(c));
        const double n = static_cast<double>(p.offsets[c + 1] - p.offsets[c]);
        if (p.kind[c] == DIFFFORCE_TORSION &&
            (std::fabs(h * n - 2.0 * pi) > 1e-4 || std::fabs(lo + pi) > 1e-4))
            fail(DIFFFORCE_BAD_GRID,
                 "grid: expected lo = -pi and h = 2 pi/n of a torsion, found %g and %g in class "
                 "%lld",
                 lo, h, static_cast<long long>(c));
    }
    if (with_coefficients) {
        require(p.sigma_knots, "sigma_knots");
        check_knots(static_cast<const T*>(p.sigma_knots), p.n_noise, "sigma_knots");
    }
}

/// Internal coordinate and its gradient on each of its atoms.
template <typename S>
DIFFFORCE_INLINE S measure(int64_t kind, const Vec<S>* x, const int64_t* atoms, Vec<S> g[4]) {
    const S one(1.0);
    if (kind == DIFFFORCE_DISTANCE) {
        const Vec<S> d = x[atoms[1]] - x[atoms[0]];
        const S r = square_root(dot(d, d)), inverse = one / r;
        g[1] = inverse * d;
        g[0] = -inverse * d;
        return r;
    }
    if (kind == DIFFFORCE_ANGLE) {
        const Vec<S> a = x[atoms[0]] - x[atoms[1]], b = x[atoms[2]] - x[atoms[1]];
        const Vec<S> c = cross(a, b);
        const S sine = square_root(dot(c, c)), cosine = dot(a, b);
        g[0] = (one / (dot(a, a) * sine)) * cross(a, c);
        g[2] = (one / (dot(b, b) * sine)) * cross(c, b);
        g[1] = S(-1.0) * (g[0] + g[2]);
        return arc_tangent(sine, cosine);
    }
    const Vec<S> b1 = x[atoms[1]] - x[atoms[0]], b2 = x[atoms[2]] - x[atoms[1]],
                 b3 = x[atoms[3]] - x[atoms[2]];
    const Vec<S> m = cross(b1, b2), n = cross(b2, b3);
    const S squared = dot(b2, b2), length = square_root(squared);
    g[0] = (-length / dot(m, m)) * m;
    g[3] = (length / dot(n, n)) * n;
    // Moving b2's ends turns both planes; the sum of the four gradients is zero.
    const Vec<S> turn = (dot(b1, b2) / squared) * g[0] - (dot(b3, b2) / squared) * g[3];
    g[1] = S(-1.0) * (g[0] + turn);
    g[2] = turn - g[3];
    return arc_tangent(length * dot(b1, n), dot(m, n));
}

/// Value of one spline with wall, and its slope in q.
template <typename S, typename T>
DIFFFORCE_INLINE S evaluate(S q, const T* grid, const T* coef, int64_t n, bool periodic, S& slope) {
    const S h(static_cast<double>(grid[1])), lo(static_cast<double>(grid[0]));
    const Place<S> at = locate((q - lo) / h, n, periodic);
    S w[4], d[4], value(0.0), rise(0.0);
    basis(at.u, w);
    basis_slope(at.u, d);
    for (int64_t k = 0; k < 4; ++k) {
        int64_t index = at.first + k;
        if (periodic && index >= n) index -= n;
        const S c(static_cast<double>(coef[index]));
        value += w[k] * c;
        rise += d[k] * c;
    }
    const S wall(static_cast<double>(grid[2])), beyond = h * at.over;
    slope = rise / h + wall * beyond;
    return value + rise * at.over + S(0.5) * wall * beyond * beyond;
}

template <typename S>
struct FrameResult {
    S value, d_sigma;
};

/// One frame: the gradient is added to g[n_atoms].
template <typename S, typename T>
DIFFFORCE_INLINE FrameResult<S> frame(const diffforce_internal_problem& p, const Vec<S>* x,
                                      const NoiseWeights& noise, const S w[2], const S d[2],
                                      bool second, Vec<S>* g) {
    const int64_t n_coef = p.offsets[p.n_classes];
    const T* grid = static_cast<const T*>(p.grid);
    const T* coef = static_cast<const T*>(p.coef);
    FrameResult<S> out{S(0.0), S(0.0)};
    for (int64_t i = 0; i < p.n_instances; ++i) {
        const int64_t c = p.cls[i], kind = p.kind[c], first = p.offsets[c];
        const int64_t n = p.offsets[c + 1] - first;
        const int64_t* atoms = p.atoms + 4 * i;
        Vec<S> dq[4];
        const S q = measure(kind, x, atoms, dq);
        if (!std::isfinite(primal(q)))
            fail(DIFFFORCE_NOT_FINITE,
                 "x: expected finite coordinates of atoms that do not coincide, found none in "
                 "instance %lld",
                 static_cast<long long>(i));
        S slope(0.0);
        for (int k = 0; k < noise.count; ++k) {
            // A knot without weight is not looked at: its grid may not fit these frames.
            if (noise.w[k] == 0.0 && noise.d[k] == 0.0 && !(second && noise.dd[k] != 0.0)) continue;
            const int64_t m = noise.knot[k];
            S knot_slope;
            const S value = evaluate(q, grid + 3 * (m * p.n_classes + c), coef + m * n_coef + first,
                                     n, kind == DIFFFORCE_TORSION, knot_slope);
            out.value += w[k] * value;
            out.d_sigma += d[k] * value;
            slope += w[k] * knot_slope;
        }
        for (int64_t k = 0; k < kind; ++k) g[atoms[k]] = g[atoms[k]] + slope * dq[k];
    }
    return out;
}

DIFFFORCE_CLONES
FrameResult<double> frame_f64(const diffforce_internal_problem& p, const Vec<double>* x,
                              const NoiseWeights& noise, Vec<double>* g) {
    return frame<double, double>(p, x, noise, noise.w, noise.d, false, g);
}
DIFFFORCE_CLONES
FrameResult<double> frame_f32(const diffforce_internal_problem& p, const Vec<double>* x,
                              const NoiseWeights& noise, Vec<double>* g) {
    return frame<double, float>(p, x, noise, noise.w, noise.d, false, g);
}

void require_result(double value, int64_t frame) {
    if (!std::isfinite(value))
        fail(DIFFFORCE_NOT_FINITE,
             "result: expected a finite value and gradient, found none in frame %lld; are atoms "
             "coincident or collinear, or coefficients not finite?",
             static_cast<long long>(frame));
}

int threads_for(const diffforce_internal_problem& p) {
    return p.n_frames * p.n_instances > 100000 ? resolve_threads(0) : 1;
}

template <typename T>
void action(const diffforce_internal_problem& p, const T* x, const T* sigma, T* value, T* grad_x,
            T* d_sigma) {
    check<T>(p, true);
    const int64_t n = p.n_atoms;
    require_finite(x, p.n_frames * n * 3, "x");
    parallel(p.n_frames, threads_for(p), [&](int64_t begin, int64_t end, int) {
        std::vector<Vec<double>> position(n), gradient(n);
        for (int64_t f = begin; f < end; ++f) {
            const NoiseWeights noise =
                noise_weights(sigma[f], static_cast<const T*>(p.sigma_knots), p.n_noise, f);
            const T* from = x + f * n * 3;
            for (int64_t i = 0; i < n; ++i) {
                position[i] = {from[3 * i], from[3 * i + 1], from[3 * i + 2]};
                gradient[i] = {0.0, 0.0, 0.0};
            }
            const auto out = std::is_same<T, float>::value
                                 ? frame_f32(p, position.data(), noise, gradient.data())
                                 : frame_f64(p, position.data(), noise, gradient.data());
            double sum = out.value + out.d_sigma;
            for (int64_t i = 0; i < n; ++i) {
                sum += gradient[i].x + gradient[i].y + gradient[i].z;
                T* to = grad_x + (f * n + i) * 3;
                to[0] = static_cast<T>(gradient[i].x);
                to[1] = static_cast<T>(gradient[i].y);
                to[2] = static_cast<T>(gradient[i].z);
            }
            require_result(sum, f);
            value[f] = static_cast<T>(out.value);
            d_sigma[f] = static_cast<T>(out.d_sigma);
        }
    });
}

template <typename T>
void action_hvp(const diffforce_internal_problem& p, const T* x, const T* sigma, const T* v_x,
                const T* v_sigma, T* h_x, T* h_sigma) {
    using S = Dual<double>;
    check<T>(p, true);
    const int64_t n = p.n_atoms;
    require_finite(x, p.n_frames * n * 3, "x");
    parallel(p.n_frames, threads_for(p), [&](int64_t begin, int64_t end, int) {
        std::vector<Vec<S>> position(n), gradient(n);
        for (int64_t f = begin; f < end; ++f) {
            const NoiseWeights noise =
                noise_weights(sigma[f], static_cast<const T*>(p.sigma_knots), p.n_noise, f);
            const double v = v_sigma[f];
            const S w[2] = {{noise.w[0], noise.d[0] * v}, {noise.w[1], noise.d[1] * v}};
            const S d[2] = {{noise.d[0], noise.dd[0] * v}, {noise.d[1], noise.dd[1] * v}};
            for (int64_t i = 0; i < n; ++i) {
                const T *a = x + (f * n + i) * 3, *b = v_x + (f * n + i) * 3;
                position[i] = {S(a[0], b[0]), S(a[1], b[1]), S(a[2], b[2])};
                gradient[i] = {S(0.0), S(0.0), S(0.0)};
            }
            const auto out = frame<S, T>(p, position.data(), noise, w, d, true, gradient.data());
            double sum = out.d_sigma.b;
            for (int64_t i = 0; i < n; ++i) {
                sum += gradient[i].x.b + gradient[i].y.b + gradient[i].z.b;
                T* to = h_x + (f * n + i) * 3;
                to[0] = static_cast<T>(gradient[i].x.b);
                to[1] = static_cast<T>(gradient[i].y.b);
                to[2] = static_cast<T>(gradient[i].z.b);
            }
            require_result(sum, f);
            h_sigma[f] = static_cast<T>(out.d_sigma.b);
        }
    });
}

// ---------------------------------------------------------------- normal equations

/// Derivatives of the four basis functions that an instance touches in one frame.
struct Sample {
    double slope[4];
    Vec<double> g[4];
    int64_t first;
};

struct Neighbours {
    int32_t a, b;
    int32_t count;
    int8_t slot_a[4], slot_b[4];
};

/// Laplacian of the coordinate over all its atoms. The one of a torsion is zero.
double laplacian(int64_t kind, double q, const Vec<double>* x, const int64_t* atoms) {
    if (kind == DIFFFORCE_DISTANCE) return 4.0 / q;
    if (kind == DIFFFORCE_TORSION) return 0.0;
    const Vec<double> a = x[atoms[0]] - x[atoms[1]], b = x[atoms[2]] - x[atoms[1]];
    const double aa = dot(a, a), bb = dot(b, b), sine = std::sin(q);
    return 2.0 * (std::cos(q) * (1.0 / aa + 1.0 / bb) - 1.0 / std::sqrt(aa * bb)) / sine;
}

/// h[i, j] += sum over frames of slope_a[i] slope_b[j] (grad q_a . grad q_b) for one pair.
DIFFFORCE_CLONES
void accumulate(const Neighbours& pair, const Sample* a, const Sample* b, int64_t n_frames,
                int64_t stride, double* h) {
    const double weight = pair.a == pair.b ? 0.5 : 1.0;
    for (int64_t f = 0; f < n_frames; ++f) {
        double product = 0.0;
        for (int32_t k = 0; k < pair.count; ++k)
            product += dot(a[f].g[pair.slot_a[k]], b[f].g[pair.slot_b[k]]);
        product *= weight;
        double* block = h + a[f].first * stride + b[f].first;
        for (int i = 0; i < 4; ++i) {
            const double scaled = product * a[f].slope[i];
            for (int j = 0; j < 4; ++j) block[i * stride + j] += scaled * b[f].slope[j];
        }
    }
}

void normal(const diffforce_internal_problem& p, const double* x, const double* target,
            int n_threads, double* matrix, double* vector, double* lap) {
    check<double>(p, false);
    const int64_t n = p.n_atoms, n_inst = p.n_instances, n_coef = p.offsets[p.n_classes];
    require_finite(x, p.n_frames * n * 3, "x");
    require_finite(target, p.n_frames * n * 3, "target");
    if (n_inst > std::numeric_limits<int32_t>::max())
        fail(DIFFFORCE_BAD_SHAPE, "n_instances: more than 2^31");
    if (n_coef > (int64_t{1} << 20))
        fail(DIFFFORCE_BAD_SHAPE, "offsets: expected at most 2^20 coefficients, found %lld",
             static_cast<long long>(n_coef));
    const double* grid = static_cast<const double*>(p.grid);

    // Three ghost coefficients behind each periodic class keep the four touched ones contiguous;
    // they are folded back at the end.
    std::vector<int64_t> start(p.n_classes + 1, 0), fold;
    for (int64_t c = 0; c < p.n_classes; ++c) {
        const int64_t size = p.offsets[c + 1] - p.offsets[c];
        const int64_t ghosts = p.kind[c] == DIFFFORCE_TORSION ? 3 : 0;
        start[c + 1] = start[c] + size + ghosts;
        for (int64_t k = 0; k < size + ghosts; ++k) fold.push_back(p.offsets[c] + k % size);
    }
    const int64_t n_padded = start[p.n_classes];

    // Gradients of instances without a common atom are orthogonal.
    std::vector<std::vector<int32_t>> at_atom(n);
    for (int64_t i = 0; i < n_inst; ++i)
        for (int64_t k = 0; k < p.kind[p.cls[i]]; ++k)
            at_atom[p.atoms[4 * i + k]].push_back(static_cast<int32_t>(i));
    std::vector<Neighbours> pairs;
    std::vector<int32_t> place(n_inst, -1);
    for (int32_t a = 0; a < n_inst; ++a) {
        const size_t begin = pairs.size();
        for (int64_t k = 0; k < p.kind[p.cls[a]]; ++k)
            for (const int32_t b : at_atom[p.atoms[4 * a + k]]) {
                if (b < a) continue;
                if (place[b] < 0) {
                    place[b] = static_cast<int32_t>(pairs.size() - begin);
                    pairs.push_back(Neighbours{a, b, 0, {0, 0, 0, 0}, {0, 0, 0, 0}});
                }
                Neighbours& pair = pairs[begin + place[b]];
                int8_t slot = 0;
                while (p.atoms[4 * b + slot] != p.atoms[4 * a + k]) ++slot;
                pair.slot_a[pair.count] = static_cast<int8_t>(k);
                pair.slot_b[pair.count++] = slot;
            }
        for (size_t k = begin; k < pairs.size(); ++k) place[pairs[k].b] = -1;
    }

    // The sums of the first thread; without memory for them the results stay untouched.
    std::vector<double> first_h(static_cast<size_t>(n_padded * n_padded), 0.0);
    std::fill(matrix, matrix + n_coef * n_coef, 0.0);
    std::fill(vector, vector + n_coef, 0.0);
    std::fill(lap, lap + n_coef, 0.0);
    std::mutex guard;
    constexpr int64_t chunk = 32;
    parallel(p.n_frames, resolve_threads(n_threads), [&](int64_t begin, int64_t end, int thread) {
        std::vector<double> h, b(n_padded, 0.0), l(n_padded, 0.0);
        if (thread == 0)
            h.swap(first_h);
        else
            h.assign(static_cast<size_t>(n_padded * n_padded), 0.0);
        std::vector<Sample> samples(n_inst * chunk);
        std::vector<Vec<double>> position(n), aim(n);
        for (int64_t f0 = begin; f0 < end; f0 += chunk) {
            const int64_t count = std::min(chunk, end - f0);
            for (int64_t f = 0; f < count; ++f) {
                const double* from = x + (f0 + f) * n * 3;
                const double* to = target + (f0 + f) * n * 3;
                for (int64_t i = 0; i < n; ++i) {
                    position[i] = {from[3 * i], from[3 * i + 1], from[3 * i + 2]};
                    aim[i] = {to[3 * i], to[3 * i + 1], to[3 * i + 2]};
                }
                for (int64_t i = 0; i < n_inst; ++i) {
                    const int64_t c = p.cls[i], kind = p.kind[c];
                    const int64_t size = p.offsets[c + 1] - p.offsets[c];
                    const int64_t* atoms = p.atoms + 4 * i;
                    Sample& s = samples[i * chunk + f];
                    const double q = measure(kind, position.data(), atoms, s.g);
                    const double inverse_h = 1.0 / grid[3 * c + 1];
                    const Place<double> at =
                        locate((q - grid[3 * c]) * inverse_h, size, kind == DIFFFORCE_TORSION);
                    double curve[4];
                    basis_slope(at.u, s.slope);
                    basis_curve(at.u, curve);
                    s.first = start[c] + at.first;
                    double squared = 0.0, along = 0.0;
                    for (int64_t k = 0; k < kind; ++k) {
                        squared += dot(s.g[k], s.g[k]);
                        along += dot(s.g[k], aim[atoms[k]]);
                    }
                    const double trace = laplacian(kind, q, position.data(), atoms);
                    if (!std::isfinite(squared + trace))
                        fail(DIFFFORCE_NOT_FINITE,
                             "x: expected atoms that are neither coincident nor collinear, found "
                             "such in instance %lld of frame %lld",
                             static_cast<long long>(i), static_cast<long long>(f0 + f));
                    const double bend = at.over == 0.0 ? squared * inverse_h * inverse_h : 0.0;
                    for (int k = 0; k < 4; ++k) {
                        s.slope[k] *= inverse_h;
                        b[s.first + k] += s.slope[k] * along;
                        l[s.first + k] += curve[k] * bend + s.slope[k] * trace;
                    }
                }
            }
            for (const Neighbours& pair : pairs)
                accumulate(pair, &samples[pair.a * chunk], &samples[pair.b * chunk], count,
                           n_padded, h.data());
        }
        const std::lock_guard<std::mutex> lock(guard);
        for (int64_t i = 0; i < n_padded; ++i) {
            vector[fold[i]] += b[i];
            lap[fold[i]] += l[i];
            for (int64_t j = 0; j < n_padded; ++j)
                matrix[fold[i] * n_coef + fold[j]] += h[i * n_padded + j];
        }
    });
    // h has each pair of instances once, and half of an instance with itself.
    for (int64_t i = 0; i < n_coef; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            const double sum = matrix[i * n_coef + j] + matrix[j * n_coef + i];
            matrix[i * n_coef + j] = matrix[j * n_coef + i] = sum;
        }
}

}  // namespace
}  // namespace diffforce

using diffforce::fail;
using diffforce::guarded;
using diffforce::require;

namespace {

void require_frames(const diffforce_internal_problem* problem, const void* x, const char* name) {
    if (problem->n_frames != 0) require(x, name);
}

}  // namespace

extern "C" {

int diffforce_internal_action(const diffforce_internal_problem* problem, const void* x,
                              const void* sigma, void* value, void* grad_x, void* d_sigma) {
    return guarded([&] {
        require(problem, "problem");
        require_frames(problem, x, "x");
        require_frames(problem, sigma, "sigma");
        require_frames(problem, value, "value");
        require_frames(problem, grad_x, "grad_x");
        require_frames(problem, d_sigma, "d_sigma");
        if (problem->dtype == DIFFFORCE_FLOAT64)
            diffforce::action(*problem, static_cast<const double*>(x),
                              static_cast<const double*>(sigma), static_cast<double*>(value),
                              static_cast<double*>(grad_x), static_cast<double*>(d_sigma));
        else if (problem->dtype == DIFFFORCE_FLOAT32)
            diffforce::action(*problem, static_cast<const float*>(x),
                              static_cast<const float*>(sigma), static_cast<float*>(value),
                              static_cast<float*>(grad_x), static_cast<float*>(d_sigma));
        else
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float32 (0) or float64 (1), found %d",
                 problem->dtype);
    });
}

int diffforce_internal_action_hvp(const diffforce_internal_problem* problem, const void* x,
                                  const void* sigma, const void* v_x, const void* v_sigma,
                                  void* h_x, void* h_sigma) {
    return guarded([&] {
        require(problem, "problem");
        require_frames(problem, x, "x");
        require_frames(problem, sigma, "sigma");
        require_frames(problem, v_x, "v_x");
        require_frames(problem, v_sigma, "v_sigma");
        require_frames(problem, h_x, "h_x");
        require_frames(problem, h_sigma, "h_sigma");
        if (problem->dtype == DIFFFORCE_FLOAT64)
            diffforce::action_hvp(
                *problem, static_cast<const double*>(x), static_cast<const double*>(sigma),
                static_cast<const double*>(v_x), static_cast<const double*>(v_sigma),
                static_cast<double*>(h_x), static_cast<double*>(h_sigma));
        else if (problem->dtype == DIFFFORCE_FLOAT32)
            diffforce::action_hvp(*problem, static_cast<const float*>(x),
                                  static_cast<const float*>(sigma), static_cast<const float*>(v_x),
                                  static_cast<const float*>(v_sigma), static_cast<float*>(h_x),
                                  static_cast<float*>(h_sigma));
        else
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float32 (0) or float64 (1), found %d",
                 problem->dtype);
    });
}

int diffforce_internal_normal(const diffforce_internal_problem* problem, const double* x,
                              const double* target, int n_threads, double* a, double* b,
                              double* lap) {
    return guarded([&] {
        require(problem, "problem");
        require_frames(problem, x, "x");
        require_frames(problem, target, "target");
        require(problem->offsets, "offsets");
        if (problem->n_classes > 0) {
            require(a, "a");
            require(b, "b");
            require(lap, "lap");
        }
        if (problem->dtype != DIFFFORCE_FLOAT64)
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float64 (1), found %d", problem->dtype);
        if (n_threads < 0)
            fail(DIFFFORCE_BAD_SHAPE, "n_threads: expected 0 or more, found %d", n_threads);
        diffforce::normal(*problem, x, target, n_threads, a, b, lap);
    });
}

}  // extern "C"
