// Noised pair operator between sites and environment: value, gradient, Hessian-vector product.
#include "common.h"

namespace diffforce {
namespace {

template <typename T>
struct Arrays {
    const T *table, *r_grid, *lam_knots, *sigma_knots;
};

template <typename T>
Arrays<T> check(const diffforce_pair_problem& p, bool has_box) {
    require_count(p.n_frames, 0, "n_frames");
    require_count(p.n_atoms, 1, "n_atoms");
    require_count(p.n_sites, 0, "n_sites");
    require_count(p.n_env, 0, "n_env");
    require_count(p.n_types, 0, "n_types");
    require_count(p.n_lam, 1, "n_lam");
    require_count(p.n_noise, 1, "n_noise");
    require_count(p.n_coef, 4, "n_coef");
    require(p.lam_knots, "lam_knots");
    require(p.sigma_knots, "sigma_knots");
    if (p.n_types > 0) {
        require(p.table, "table");
        require(p.r_grid, "r_grid");
    }
    if (p.n_sites > 0) require(p.sites, "sites");
    if (p.n_env > 0) require(p.env, "env");
    if (p.n_sites > 0 && p.n_env > 0) require(p.pair_type, "pair_type");
    const Arrays<T> out{static_cast<const T*>(p.table), static_cast<const T*>(p.r_grid),
                        static_cast<const T*>(p.lam_knots), static_cast<const T*>(p.sigma_knots)};
    const int64_t counts[2] = {p.n_sites, p.n_env};
    const int64_t* lists[2] = {p.sites, p.env};
    const char* names[2] = {"sites", "env"};
    for (int k = 0; k < 2; ++k)
        for (int64_t i = 0; i < counts[k]; ++i)
            if (lists[k][i] < 0 || lists[k][i] >= p.n_atoms)
                fail(DIFFFORCE_BAD_INDEX, "%s: expected an atom index in [0, %lld), found %lld",
                     names[k], static_cast<long long>(p.n_atoms),
                     static_cast<long long>(lists[k][i]));
    for (int64_t a = 0; a < p.n_sites; ++a)
        for (int64_t b = 0; b < p.n_env; ++b) {
            const int64_t type = p.pair_type[a * p.n_env + b];
            if (type < -1 || type >= p.n_types)
                fail(DIFFFORCE_BAD_INDEX, "pair_type: expected -1 or a type below %lld, found %lld",
                     static_cast<long long>(p.n_types), static_cast<long long>(type));
            if (type >= 0 && p.sites[a] == p.env[b])
                fail(DIFFFORCE_BAD_INDEX,
                     "pair_type: expected -1 for atom %lld with itself, found %lld",
                     static_cast<long long>(p.sites[a]), static_cast<long long>(type));
        }
    for (int64_t t = 0; t < p.n_types; ++t)
        if (!std::isfinite(out.r_grid[2 * t]) || !std::isfinite(out.r_grid[2 * t + 1]) ||
            !(out.r_grid[2 * t + 1] > T(0)))
            fail(DIFFFORCE_BAD_GRID,
                 "r_grid: expected finite lo and h > 0, found %g, %g in type %lld",
                 static_cast<double>(out.r_grid[2 * t]), static_cast<double>(out.r_grid[2 * t + 1]),
                 static_cast<long long>(t));
    check_knots(out.lam_knots, p.n_lam, "lam_knots");
    check_knots(out.sigma_knots, p.n_noise, "sigma_knots");
    if (p.n_lam > 1 && std::fabs(static_cast<double>(out.lam_knots[p.n_lam - 1]) - 1.0) > 1e-6)
        fail(DIFFFORCE_BAD_GRID, "lam_knots: expected the last knot to be 1, found %g",
             static_cast<double>(out.lam_knots[p.n_lam - 1]));
    if (std::isnan(p.r_cutoff) || std::isnan(p.r_switch))
        fail(DIFFFORCE_BAD_GRID, "r_cutoff, r_switch: expected numbers, found NaN");
    const bool cut = p.r_cutoff > 0.0 && std::isfinite(p.r_cutoff);
    if (cut && !(p.r_switch >= 0.0 && p.r_switch < p.r_cutoff))
        fail(DIFFFORCE_BAD_GRID, "r_switch: expected a value in [0, r_cutoff = %g), found %g",
             p.r_cutoff, p.r_switch);
    if (has_box && !cut)
        fail(DIFFFORCE_BAD_GRID, "r_cutoff: expected a finite cutoff with a periodic box, found %g",
             p.r_cutoff);
    return out;
}

template <typename T>
void check_box(const T* b, double cutoff, int64_t frame) {
    const double ax = b[0], bx = b[3], by = b[4], cx = b[6], cy = b[7], cz = b[8];
    const double slack = 1e-5 * std::fabs(ax);
    double sum = 0.0;
    for (int k = 0; k < 9; ++k) sum += b[k] - b[k];
    if (sum != 0.0)
        fail(DIFFFORCE_NOT_FINITE, "box: expected finite vectors, found others in frame %lld",
             static_cast<long long>(frame));
    if (b[1] != T(0) || b[2] != T(0) || b[5] != T(0) || !(ax > 0.0) || !(by > 0.0) || !(cz > 0.0) ||
        std::fabs(bx) > 0.5 * ax + slack || std::fabs(cx) > 0.5 * ax + slack ||
        std::fabs(cy) > 0.5 * by + slack)
        fail(DIFFFORCE_BAD_BOX,
             "box: expected OpenMM's reduced form (lower triangular, positive diagonal, "
             "off-diagonal "
             "at most half of it), found [%g %g %g; %g %g %g; %g %g %g] in frame %lld",
             ax, static_cast<double>(b[1]), static_cast<double>(b[2]), bx, by,
             static_cast<double>(b[5]), cx, cy, cz, static_cast<long long>(frame));
    const double width = std::min(ax, std::min(by, cz));
    if (cutoff > 0.5 * width * (1.0 + 1e-6))
        fail(DIFFFORCE_BAD_BOX,
             "box: expected a smallest width of at least twice the cutoff %g nm, found %g nm in "
             "frame %lld",
             cutoff, width, static_cast<long long>(frame));
}

/// Box vectors in reduced form and the inverse of their diagonal.
template <typename T>
struct Box {
    T xx, yx, yy, zx, zy, zz, inverse_x, inverse_y, inverse_z;
    explicit Box(const T* b)
        : xx(b[0]),
          yx(b[3]),
          yy(b[4]),
          zx(b[6]),
          zy(b[7]),
          zz(b[8]),
          inverse_x(T(1) / b[0]),
          inverse_y(T(1) / b[4]),
          inverse_z(T(1) / b[8]) {}
};

/// Nearest image of a displacement.
template <typename S, typename T>
DIFFFORCE_INLINE void nearest_image(S& x, S& y, S& z, const Box<T>& box) {
    const T half(0.5);
    const T n3 = std::floor(primal(z) * box.inverse_z + half);
    x = x - S(n3 * box.zx);
    y = y - S(n3 * box.zy);
    z = z - S(n3 * box.zz);
    const T n2 = std::floor(primal(y) * box.inverse_y + half);
    x = x - S(n2 * box.yx);
    y = y - S(n2 * box.yy);
    const T n1 = std::floor(primal(x) * box.inverse_x + half);
    x = x - S(n1 * box.xx);
}
template <typename S, typename T>
DIFFFORCE_INLINE void nearest_image(Vec<S>& d, const Box<T>& box) {
    nearest_image(d.x, d.y, d.z, box);
}

/// The switch from 1 at r_switch to 0 at r_cutoff, and its slope. Without a cutoff it is 1.
template <typename T>
struct Switch {
    T start, inverse;
    Switch(const diffforce_pair_problem& p, bool cut)
        : start(cut ? static_cast<T>(p.r_switch) : std::numeric_limits<T>::max()),
          inverse(cut ? static_cast<T>(1.0 / (p.r_cutoff - p.r_switch)) : T(0)) {}
    template <typename S>
    DIFFFORCE_INLINE S at(S r, S& slope) const {
        const S beyond = primal(r) > start ? r - S(start) : S(T(0));
        const S y = beyond * S(inverse), rest = S(T(1)) - y;
        slope = S(T(-30) * inverse) * y * y * rest * rest;
        return S(T(1)) - y * y * y * (S(T(10)) - S(T(15)) * y + S(T(6)) * y * y);
    }
};

/// Value, sigma derivative and lambda derivative, side by side.
constexpr int channels = 4;  // the fourth pads to a vector register

/// Table weights of one frame: products of lambda and noise weights for each channel.
template <typename S>
struct Blend {
    int64_t lam, noise;
    S w[channels];
};

/// The coefficients of a pair function at one (sigma, lambda).
template <typename T, typename S>
struct Rows {
    const T* table;
    const Blend<S>* blends;
    int64_t n_blends, n_lam, n_noise, n_coef;
    const S* ready;  // [T, R, channels] or NULL: blended when needed

    DIFFFORCE_INLINE void get(int64_t type, int64_t first, S c[4][channels]) const {
        if (ready != nullptr) {
            const S* from = ready + (type * n_coef + first) * channels;
            for (int k = 0; k < 4; ++k)
                for (int j = 0; j < channels; ++j) c[k][j] = from[k * channels + j];
            return;
        }
        for (int k = 0; k < 4; ++k)
            for (int j = 0; j < channels; ++j) c[k][j] = S(T(0));
        for (int64_t i = 0; i < n_blends; ++i) {
            const Blend<S>& blend = blends[i];
            const T* from =
                table + ((type * n_lam + blend.lam) * n_noise + blend.noise) * n_coef + first;
            for (int k = 0; k < 4; ++k)
                for (int j = 0; j < channels; ++j) c[k][j] += blend.w[j] * S(from[k]);
        }
    }
};

template <typename S>
struct Sums {
    S channel[channels];
};

/// One pair: adds to the sums, returns dvalue/dr.
template <typename T, typename S>
DIFFFORCE_INLINE S one_pair(int64_t n_coef, const Rows<T, S>& rows, const T* r_grid, int64_t type,
                            S r, S fade, S fade_slope, Sums<S>& sums) {
    const T lo = r_grid[2 * type], inverse_h = T(1) / r_grid[2 * type + 1];
    const Place<S> at = locate((r - S(lo)) * S(inverse_h), n_coef, false);
    S w[4], d[4], c[4][channels], value[channels], rise[channels];
    basis(at.u, w);
    basis_slope(at.u, d);
    rows.get(type, at.first, c);
    for (int j = 0; j < channels; ++j) {
        rise[j] = d[0] * c[0][j] + d[1] * c[1][j] + d[2] * c[2][j] + d[3] * c[3][j];
        value[j] = w[0] * c[0][j] + w[1] * c[1][j] + w[2] * c[2][j] + w[3] * c[3][j];
        value[j] += at.over * rise[j];
        sums.channel[j] += value[j] * fade;
    }
    return rise[0] * S(inverse_h) * fade + value[0] * fade_slope;
}

/// Scratch of one thread, kept from frame to frame.
template <typename T, typename S>
struct Scratch {
    std::vector<Blend<S>> blends;
    std::vector<S> ready;
    std::vector<Vec<S>> x, g;
    LambdaWeights lam;
    // Environment atoms near the sites, as arrays of coordinates.
    std::vector<T> cx, cy, cz, dx, dy, dz, r2, r, fade, slope;
    std::vector<int64_t> candidates, hits;
    T last_sigma = T(-1), last_lam = T(-1);
};

template <typename T>
DIFFFORCE_INLINE void frame_generic(const diffforce_pair_problem& p, const Rows<T, Dual<T>>& rows,
                                    const T* r_grid, const Box<T>* box, bool cut,
                                    const Vec<Dual<T>>* x, Vec<Dual<T>>* g, Sums<Dual<T>>& sums) {
    using S = Dual<T>;
    const Switch<T> fading(p, cut);
    const T cutoff2 = static_cast<T>(p.r_cutoff * p.r_cutoff);
    for (int64_t a = 0; a < p.n_sites; ++a)
        for (int64_t b = 0; b < p.n_env; ++b) {
            const int64_t type = p.pair_type[a * p.n_env + b];
            if (type < 0) continue;
            Vec<S> d = x[p.sites[a]] - x[p.env[b]];
            if (box != nullptr) nearest_image(d, *box);
            const S r2 = dot(d, d);
            if (cut && primal(r2) >= cutoff2) continue;
            S fade_slope;
            const S r = square_root(r2), fade = fading.at(r, fade_slope);
            const S slope = one_pair(p.n_coef, rows, r_grid, type, r, fade, fade_slope, sums);
            // Coincident atoms have no direction: no force.
            const S force = primal(r) > T(0) ? slope / r : S(T(0));
            g[p.sites[a]] = g[p.sites[a]] + force * d;
            g[p.env[b]] = g[p.env[b]] - force * d;
        }
}

/// Displacements from n points (s.cx ...) to `to`, and their squares; vectorised.
template <typename T>
DIFFFORCE_INLINE void distances(int64_t n, Vec<T> to, const Box<T>* box, Scratch<T, T>& s) {
    const T* __restrict cx = s.cx.data(), * __restrict cy = s.cy.data(), * __restrict cz = s.cz.data();
    T* __restrict dx = s.dx.data(), * __restrict dy = s.dy.data(), * __restrict dz = s.dz.data();
    T* __restrict r2 = s.r2.data();
    if (box == nullptr) {
        DIFFFORCE_VECTORISE
        for (int64_t k = 0; k < n; ++k) {
            const T x = to.x - cx[k], y = to.y - cy[k], z = to.z - cz[k];
            dx[k] = x;
            dy[k] = y;
            dz[k] = z;
            r2[k] = x * x + y * y + z * z;
        }
        return;
    }
    const Box<T> b = *box;
    DIFFFORCE_VECTORISE
    for (int64_t k = 0; k < n; ++k) {
        T x = to.x - cx[k], y = to.y - cy[k], z = to.z - cz[k];
        nearest_image(x, y, z, b);
        dx[k] = x;
        dy[k] = y;
        dz[k] = z;
        r2[k] = x * x + y * y + z * z;
    }
}

/// Environment atoms that can be within the cutoff of any site, by their distance to the sites'
/// middle. Returns false where the nearest image is not certain to be found that far out.
template <typename T>
DIFFFORCE_INLINE bool prefilter(const diffforce_pair_problem& p, const Box<T>* box, const Vec<T>* x,
                                Scratch<T, T>& s) {
    const Vec<T> origin = x[p.sites[0]];
    Vec<T> middle{T(0), T(0), T(0)};
    for (int64_t a = 0; a < p.n_sites; ++a) {
        Vec<T> d = x[p.sites[a]] - origin;
        if (box != nullptr) nearest_image(d, *box);
        middle = middle + d;
    }
    middle = origin + (T(1) / static_cast<T>(p.n_sites)) * middle;
    T radius2(0);
    for (int64_t a = 0; a < p.n_sites; ++a) {
        Vec<T> d = x[p.sites[a]] - middle;
        if (box != nullptr) nearest_image(d, *box);
        radius2 = std::max(radius2, dot(d, d));
    }
    const T reach = static_cast<T>(p.r_cutoff * (1.0 + 1e-5)) + std::sqrt(radius2);
    if (box != nullptr && reach > T(0.5) * std::min(box->xx, std::min(box->yy, box->zz)))
        return false;
    const int64_t n = p.n_env;
    for (int64_t b = 0; b < n; ++b) {
        const Vec<T>& from = x[p.env[b]];
        s.cx[b] = from.x;
        s.cy[b] = from.y;
        s.cz[b] = from.z;
    }
    distances(n, middle, box, s);
    const T* r2 = s.r2.data();
    s.candidates.clear();
    for (int64_t b = 0; b < n; ++b)
        if (r2[b] < reach * reach) s.candidates.push_back(b);
    return true;
}

template <typename T>
DIFFFORCE_INLINE void frame_fast(const diffforce_pair_problem& p, const Rows<T, T>& rows,
                                 const T* r_grid, const Box<T>* box, bool cut, const Vec<T>* x,
                                 Vec<T>* g, Sums<T>& sums, Scratch<T, T>& s) {
    if (p.n_sites == 0 || p.n_env == 0) return;
    const size_t n_env = static_cast<size_t>(p.n_env);
    if (s.dx.size() < n_env) {
        for (auto* v : {&s.cx, &s.cy, &s.cz, &s.dx, &s.dy, &s.dz, &s.r2, &s.r, &s.fade, &s.slope})
            v->resize(n_env);
        s.hits.resize(n_env);
    }
    if (!(cut && p.n_env > 64 && prefilter(p, box, x, s))) {
        s.candidates.resize(n_env);
        for (size_t b = 0; b < n_env; ++b) s.candidates[b] = static_cast<int64_t>(b);
    }
    const int64_t n = static_cast<int64_t>(s.candidates.size());
    const int64_t* candidates = s.candidates.data();
    for (int64_t k = 0; k < n; ++k) {
        const Vec<T>& from = x[p.env[candidates[k]]];
        s.cx[k] = from.x;
        s.cy[k] = from.y;
        s.cz[k] = from.z;
    }
    const Switch<T> fading(p, cut);
    const T cutoff2 = cut ? static_cast<T>(p.r_cutoff * p.r_cutoff) : std::numeric_limits<T>::max();
    const T *r2 = s.r2.data(), *dx = s.dx.data(), *dy = s.dy.data(), *dz = s.dz.data();
    T* __restrict r = s.r.data(), * __restrict fade = s.fade.data();
    T* __restrict slope = s.slope.data();
    int64_t* hits = s.hits.data();
    for (int64_t a = 0; a < p.n_sites; ++a) {
        distances(n, x[p.sites[a]], box, s);
        const int64_t* types = p.pair_type + a * p.n_env;
        int64_t n_hits = 0;
        for (int64_t k = 0; k < n; ++k) {
            hits[n_hits] = k;
            n_hits += static_cast<int64_t>((r2[k] < cutoff2) & (types[candidates[k]] >= 0));
        }
        for (int64_t i = 0; i < n_hits; ++i) r[i] = r2[hits[i]];
        DIFFFORCE_VECTORISE
        for (int64_t i = 0; i < n_hits; ++i) {
            r[i] = std::sqrt(r[i]);
            fade[i] = fading.at(r[i], slope[i]);
        }
        // Local: gradient entries cannot be these numbers, so that they stay in registers.
        Vec<T> total{T(0), T(0), T(0)};
        Sums<T> site_sums{{T(0), T(0), T(0), T(0)}};
        for (int64_t i = 0; i < n_hits; ++i) {
            const int64_t k = hits[i], b = candidates[k];
            const T rise =
                one_pair(p.n_coef, rows, r_grid, types[b], r[i], fade[i], slope[i], site_sums);
            // Coincident atoms have no direction: no force.
            const T force = r[i] > T(0) ? rise / r[i] : T(0);
            const Vec<T> pull{force * dx[k], force * dy[k], force * dz[k]};
            total = total + pull;
            Vec<T>& other = g[p.env[b]];
            other = other - pull;
        }
        g[p.sites[a]] = g[p.sites[a]] + total;
        for (int j = 0; j < channels; ++j) sums.channel[j] += site_sums.channel[j];
    }
}

template <typename T, typename S>
DIFFFORCE_INLINE void blend_all(const Rows<T, S>& rows, int64_t n_types, S* ready) {
    const int64_t n = rows.n_coef;
    for (int64_t t = 0; t < n_types; ++t) {
        S* to = ready + t * n * channels;
        for (int64_t k = 0; k < n * channels; ++k) to[k] = S(T(0));
        for (int64_t i = 0; i < rows.n_blends; ++i) {
            const Blend<S> blend = rows.blends[i];
            const T* from =
                rows.table + ((t * rows.n_lam + blend.lam) * rows.n_noise + blend.noise) * n;
            for (int64_t k = 0; k < n; ++k)
                for (int j = 0; j < channels; ++j) to[k * channels + j] += blend.w[j] * S(from[k]);
        }
    }
}

// The clones: one body for each instruction set.
#define DIFFFORCE_BODY(T, suffix)                                                                \
    DIFFFORCE_CLONES void fast_##suffix(const diffforce_pair_problem& p, const Rows<T, T>& rows, \
                                        const T* r_grid, const Box<T>* box, bool cut,            \
                                        const Vec<T>* x, Vec<T>* g, Sums<T>& sums,               \
                                        Scratch<T, T>& s) {                                      \
        frame_fast(p, rows, r_grid, box, cut, x, g, sums, s);                                    \
    }                                                                                            \
    DIFFFORCE_CLONES void blend_##suffix(const Rows<T, T>& rows, int64_t n_types, T* ready) {    \
        blend_all(rows, n_types, ready);                                                         \
    }
DIFFFORCE_BODY(float, f32)
DIFFFORCE_BODY(double, f64)
#undef DIFFFORCE_BODY

inline void fast(const diffforce_pair_problem& p, const Rows<float, float>& rows, const float* grid,
                 const Box<float>* box, bool cut, const Vec<float>* x, Vec<float>* g,
                 Sums<float>& sums, Scratch<float, float>& s) {
    fast_f32(p, rows, grid, box, cut, x, g, sums, s);
}
inline void fast(const diffforce_pair_problem& p, const Rows<double, double>& rows,
                 const double* grid, const Box<double>* box, bool cut, const Vec<double>* x,
                 Vec<double>* g, Sums<double>& sums, Scratch<double, double>& s) {
    fast_f64(p, rows, grid, box, cut, x, g, sums, s);
}
inline void blend(const Rows<float, float>& rows, int64_t n_types, float* ready) {
    blend_f32(rows, n_types, ready);
}
inline void blend(const Rows<double, double>& rows, int64_t n_types, double* ready) {
    blend_f64(rows, n_types, ready);
}
template <typename T>
void blend(const Rows<T, Dual<T>>& rows, int64_t n_types, Dual<T>* ready) {
    blend_all(rows, n_types, ready);
}

/// Products of the weights, for value, sigma derivative and lambda derivative; duals carry their
/// derivative along (v_sigma, v_lam).
template <typename T, typename S>
void set_blends(const NoiseWeights& m, const LambdaWeights& l, double v_sigma, double v_lam,
                std::vector<Blend<S>>& out) {
    out.clear();
    constexpr bool second = !std::is_same<S, T>::value;
    const auto make = [&](double value, double by_sigma, double by_lam) {
        if constexpr (second)
            return S(static_cast<T>(value), static_cast<T>(by_sigma * v_sigma + by_lam * v_lam));
        else
            return static_cast<S>(value);
    };
    for (int64_t k = l.begin; k < l.end; ++k)
        for (int i = 0; i < m.count; ++i) {
            const double a = l.w[k], da = l.d[k], dda = l.dd[k];
            const double w = m.w[i], d = m.d[i], dd = m.dd[i];
            if (!second && a * w == 0.0 && a * d == 0.0 && da * w == 0.0) continue;
            Blend<S> blend;
            blend.lam = k;
            blend.noise = m.knot[i];
            blend.w[0] = make(a * w, a * d, da * w);
            blend.w[1] = make(a * d, a * dd, da * d);
            blend.w[2] = make(da * w, da * d, dda * w);
            blend.w[3] = make(0.0, 0.0, 0.0);
            out.push_back(blend);
        }
}

/// What the value and the Hessian-vector product share: everything around one frame's pairs.
template <typename T, typename S, typename Load, typename Store>
void run(const diffforce_pair_problem& p, const T* x, const T* sigma, const T* lam, const T* box,
         const T* v_sigma, const T* v_lam, Load load, Store store) {
    const Arrays<T> arrays = check<T>(p, box != nullptr);
    const int64_t n = p.n_atoms;
    require_finite(x, p.n_frames * n * 3, "x");
    const bool cut = p.r_cutoff > 0.0 && std::isfinite(p.r_cutoff);
    const int64_t n_pairs = p.n_sites * p.n_env;
    // With few pairs it is cheaper to blend only the coefficients that they touch.
    const bool ahead = n_pairs * 2 > p.n_types * p.n_coef;
    const int threads = p.n_frames * n_pairs > 100000 ? resolve_threads(0) : 1;
    parallel(p.n_frames, threads, [&](int64_t begin, int64_t end, int) {
        const T unit_box[9] = {T(1), T(0), T(0), T(0), T(1), T(0), T(0), T(0), T(1)};
        Scratch<T, S> s;
        s.x.resize(n);
        s.g.resize(n);
        if (ahead) s.ready.resize(p.n_types * p.n_coef * channels);
        for (int64_t f = begin; f < end; ++f) {
            if (box != nullptr) check_box(box + 9 * f, p.r_cutoff, f);
            // Frames of a batch often share sigma and lambda, and then the blended table.
            const bool same = std::is_same<S, T>::value && f > begin && sigma[f] == s.last_sigma &&
                              lam[f] == s.last_lam;
            if (!same) {
                const NoiseWeights m = noise_weights(sigma[f], arrays.sigma_knots, p.n_noise, f);
                lambda_weights(lam[f], arrays.lam_knots, p.n_lam, p.integrated != 0, f, s.lam);
                set_blends<T, S>(m, s.lam, v_sigma == nullptr ? 0.0 : v_sigma[f],
                                 v_lam == nullptr ? 0.0 : v_lam[f], s.blends);
                s.last_sigma = sigma[f];
                s.last_lam = lam[f];
            }
            Rows<T, S> rows{arrays.table, s.blends.data(), static_cast<int64_t>(s.blends.size()),
                            p.n_lam,      p.n_noise,       p.n_coef,
                            nullptr};
            if (ahead) {
                if (!same) blend(rows, p.n_types, s.ready.data());
                rows.ready = s.ready.data();
            }
            for (int64_t i = 0; i < n; ++i) {
                s.x[i] = load(f * n + i);
                s.g[i] = {S(T(0)), S(T(0)), S(T(0))};
            }
            Sums<S> sums{{S(T(0)), S(T(0)), S(T(0)), S(T(0))}};
            const Box<T> vectors(box == nullptr ? unit_box : box + 9 * f);
            const Box<T>* frame_box = box == nullptr ? nullptr : &vectors;
            if constexpr (std::is_same<S, T>::value)
                fast(p, rows, arrays.r_grid, frame_box, cut, s.x.data(), s.g.data(), sums, s);
            else
                frame_generic(p, rows, arrays.r_grid, frame_box, cut, s.x.data(), s.g.data(), sums);
            store(f, sums, s.g.data());
        }
    });
}

void require_result(double value, int64_t frame) {
    if (!std::isfinite(value))
        fail(DIFFFORCE_NOT_FINITE,
             "result: expected a finite value and gradient, found none in frame %lld; are all "
             "entries of table finite?",
             static_cast<long long>(frame));
}

template <typename T>
void pair_operator(const diffforce_pair_problem& p, const T* x, const T* sigma, const T* lam,
                   const T* box, T* value, T* grad_x, T* d_sigma, T* d_lam) {
    const int64_t n = p.n_atoms;
    run<T, T>(
        p, x, sigma, lam, box, nullptr, nullptr,
        [&](int64_t i) { return Vec<T>{x[3 * i], x[3 * i + 1], x[3 * i + 2]}; },
        [&](int64_t f, const Sums<T>& sums, const Vec<T>* g) {
            double sum = 0.0;
            for (int64_t i = 0; i < n; ++i) {
                T* to = grad_x + (f * n + i) * 3;
                to[0] = g[i].x;
                to[1] = g[i].y;
                to[2] = g[i].z;
                sum += g[i].x + g[i].y + g[i].z;
            }
            value[f] = sums.channel[0];
            d_sigma[f] = sums.channel[1];
            d_lam[f] = sums.channel[2];
            require_result(sum + value[f] + d_sigma[f] + d_lam[f], f);
        });
}

template <typename T>
void pair_hvp(const diffforce_pair_problem& p, const T* x, const T* sigma, const T* lam,
              const T* box, const T* v_x, const T* v_sigma, const T* v_lam, T* h_x, T* h_sigma,
              T* h_lam) {
    using S = Dual<T>;
    const int64_t n = p.n_atoms;
    run<T, S>(
        p, x, sigma, lam, box, v_sigma, v_lam,
        [&](int64_t i) {
            const T *a = x + 3 * i, *b = v_x + 3 * i;
            return Vec<S>{S(a[0], b[0]), S(a[1], b[1]), S(a[2], b[2])};
        },
        [&](int64_t f, const Sums<S>& sums, const Vec<S>* g) {
            double sum = 0.0;
            for (int64_t i = 0; i < n; ++i) {
                T* to = h_x + (f * n + i) * 3;
                to[0] = g[i].x.b;
                to[1] = g[i].y.b;
                to[2] = g[i].z.b;
                sum += to[0] + to[1] + to[2];
            }
            h_sigma[f] = sums.channel[1].b;
            h_lam[f] = sums.channel[2].b;
            require_result(sum + h_sigma[f] + h_lam[f], f);
        });
}

}  // namespace
}  // namespace diffforce

using diffforce::fail;
using diffforce::guarded;
using diffforce::require;

extern "C" {

int diffforce_pair_operator(const diffforce_pair_problem* problem, const void* x, const void* sigma,
                            const void* lam, const void* box, void* value, void* grad_x,
                            void* d_sigma, void* d_lam) {
    return guarded([&] {
        require(problem, "problem");
        if (problem->n_frames != 0) {
            require(x, "x");
            require(sigma, "sigma");
            require(lam, "lam");
            require(value, "value");
            require(grad_x, "grad_x");
            require(d_sigma, "d_sigma");
            require(d_lam, "d_lam");
        }
        const auto call = [&](auto zero) {
            using T = decltype(zero);
            diffforce::pair_operator(
                *problem, static_cast<const T*>(x), static_cast<const T*>(sigma),
                static_cast<const T*>(lam), static_cast<const T*>(box), static_cast<T*>(value),
                static_cast<T*>(grad_x), static_cast<T*>(d_sigma), static_cast<T*>(d_lam));
        };
        if (problem->dtype == DIFFFORCE_FLOAT64)
            call(double{});
        else if (problem->dtype == DIFFFORCE_FLOAT32)
            call(float{});
        else
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float32 (0) or float64 (1), found %d",
                 problem->dtype);
    });
}

int diffforce_pair_operator_hvp(const diffforce_pair_problem* problem, const void* x,
                                const void* sigma, const void* lam, const void* box,
                                const void* v_x, const void* v_sigma, const void* v_lam, void* h_x,
                                void* h_sigma, void* h_lam) {
    return guarded([&] {
        require(problem, "problem");
        if (problem->n_frames != 0) {
            require(x, "x");
            require(sigma, "sigma");
            require(lam, "lam");
            require(v_x, "v_x");
            require(v_sigma, "v_sigma");
            require(v_lam, "v_lam");
            require(h_x, "h_x");
            require(h_sigma, "h_sigma");
            require(h_lam, "h_lam");
        }
        const auto call = [&](auto zero) {
            using T = decltype(zero);
            diffforce::pair_hvp(*problem, static_cast<const T*>(x), static_cast<const T*>(sigma),
                                static_cast<const T*>(lam), static_cast<const T*>(box),
                                static_cast<const T*>(v_x), static_cast<const T*>(v_sigma),
                                static_cast<const T*>(v_lam), static_cast<T*>(h_x),
                                static_cast<T*>(h_sigma), static_cast<T*>(h_lam));
        };
        if (problem->dtype == DIFFFORCE_FLOAT64)
            call(double{});
        else if (problem->dtype == DIFFFORCE_FLOAT32)
            call(float{});
        else
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float32 (0) or float64 (1), found %d",
                 problem->dtype);
    });
}

}  // extern "C"
