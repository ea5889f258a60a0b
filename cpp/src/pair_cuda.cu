// CUDA twin of the pair operator: one thread for each environment atom, one block row for each
// frame. Site gradients are summed in shared memory, environment gradients in registers.
#include <cuda_runtime.h>

#include "common.h"

namespace diffforce {
namespace {

constexpr int threads_per_block = 128;
constexpr int sites_per_block = 32;

/// A product of one lambda weight and one noise weight, for value, d_sigma and d_lam.
template <typename T>
struct Blend {
    int64_t offset;  // of the knots in the table of one type
    T w[3];
};

/// The problem with typed device pointers.
template <typename T>
struct Problem {
    int64_t n_frames, n_atoms, n_sites, n_env, n_lam, n_noise, n_coef;
    const int64_t *sites, *env, *pair_type;
    const T *table, *r_grid, *lam_knots, *sigma_knots, *x, *sigma, *lam, *box;
    T r_switch, r_cutoff;
    bool cut, integrated;
    T *value, *grad_x, *d_sigma, *d_lam;
};

template <typename T>
__device__ T not_a_number() {
    return static_cast<T>(nanf(""));
}

/// Index of the interval of a value on ascending knots.
template <typename T>
__device__ int64_t interval(const T* knots, int64_t n, T value) {
    int64_t k = 0;
    while (k < n - 2 && knots[k + 1] <= value) ++k;
    return k;
}

/// Weights as in common.h; NaN where sigma or lambda is out of range. Returns how many.
template <typename T>
__device__ int set_blends(const Problem<T>& p, int64_t frame, Blend<T>* blends) {
    const double slack = sizeof(T) == 4 ? 1e-6 : 1e-12;
    const double sigma = p.sigma[frame], lam = p.lam[frame];
    const double last = p.sigma_knots[p.n_noise - 1];
    if (!(sigma >= 0.0 && sigma <= last * (1.0 + slack) && lam >= -slack && lam <= 1.0 + slack)) {
        blends[0].offset = 0;
        for (int j = 0; j < 3; ++j) blends[0].w[j] = not_a_number<T>();
        return 1;
    }
    int n_noise = 1;
    int64_t m = 0;
    double w[2] = {1.0, 0.0}, d[2] = {0.0, 0.0};
    if (p.n_noise > 1) {
        n_noise = 2;
        m = interval(p.sigma_knots, p.n_noise, p.sigma[frame]);
        if (m == 0) {
            const double scale = 1.0 / (static_cast<double>(p.sigma_knots[1]) * p.sigma_knots[1]);
            w[1] = sigma * sigma * scale;
            d[1] = 2.0 * sigma * scale;
        } else {
            const double low = p.sigma_knots[m], high = p.sigma_knots[m + 1];
            const double scale = 1.0 / log(high / low);
            w[1] = log(sigma / low) * scale;
            d[1] = scale / sigma;
        }
        w[0] = 1.0 - w[1];
        d[0] = -d[1];
    }
    int count = 0;
    const auto add = [&](int64_t l, double a, double da) {
        for (int i = 0; i < n_noise; ++i) {
            if (a * w[i] == 0.0 && a * d[i] == 0.0 && da * w[i] == 0.0) continue;
            blends[count].offset = (l * p.n_noise + m + i) * p.n_coef;
            blends[count].w[0] = static_cast<T>(a * w[i]);
            blends[count].w[1] = static_cast<T>(a * d[i]);
            blends[count].w[2] = static_cast<T>(da * w[i]);
            ++count;
        }
    };
    if (p.n_lam == 1) {
        add(0, p.integrated ? lam : 1.0, p.integrated ? 1.0 : 0.0);
        return count;
    }
    const int64_t k = interval(p.lam_knots, p.n_lam, p.lam[frame]);
    const double gap = static_cast<double>(p.lam_knots[k + 1]) - p.lam_knots[k];
    const double u = (lam - p.lam_knots[k]) / gap;
    if (!p.integrated) {
        add(k, 1.0 - u, -1.0 / gap);
        add(k + 1, u, 1.0 / gap);
        return count;
    }
    double rising = 0.0;  // what the interval to the left gives to its right knot
    for (int64_t i = 0; i <= k; ++i) {
        const double width = static_cast<double>(p.lam_knots[i + 1]) - p.lam_knots[i];
        const double part = i < k ? 1.0 : u;
        add(i, rising + width * (part - 0.5 * part * part), i < k ? 0.0 : 1.0 - u);
        rising = width * 0.5 * part * part;
    }
    add(k + 1, rising, u);
    return count;
}

template <typename T>
__device__ bool box_fits(const T* b, T cutoff) {
    const T slack = T(1e-5) * fabs(b[0]);
    const T width = fmin(b[0], fmin(b[4], b[8]));
    return b[0] > T(0) && b[4] > T(0) && b[8] > T(0) && b[1] == T(0) && b[2] == T(0) &&
           b[5] == T(0) && fabs(b[3]) <= T(0.5) * b[0] + slack &&
           fabs(b[6]) <= T(0.5) * b[0] + slack && fabs(b[7]) <= T(0.5) * b[4] + slack &&
           cutoff <= T(0.5) * width * T(1 + 1e-6);
}

template <typename T>
__device__ T warp_sum(T value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    return value;
}

template <typename T>
__global__ void __launch_bounds__(threads_per_block) pair_kernel(const Problem<T> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Blend<T>* blends = reinterpret_cast<Blend<T>*>(memory);
    __shared__ T site_grad[sites_per_block][3];
    __shared__ T sums[3];
    __shared__ int n_blends;
    __shared__ bool fits;

    const int64_t b = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
    const int64_t first_site = static_cast<int64_t>(blockIdx.z) * sites_per_block;
    const int n_here = static_cast<int>(
        p.n_sites - first_site < sites_per_block ? p.n_sites - first_site : sites_per_block);
    const bool active = b < p.n_env;
    const int64_t other = active ? p.env[b] : 0;
    const T cutoff2 = p.r_cutoff * p.r_cutoff;
    const unsigned int lane = threadIdx.x % 32;

    for (int64_t f = blockIdx.y; f < p.n_frames; f += gridDim.y) {
        const T* x = p.x + f * p.n_atoms * 3;
        const T* box = p.box == nullptr ? nullptr : p.box + f * 9;
        __syncthreads();  // the previous frame's shared sums have been read
        if (threadIdx.x == 0) {
            n_blends = set_blends(p, f, blends);
            fits = box == nullptr || box_fits(box, p.r_cutoff);
        }
        if (threadIdx.x < 3) sums[threadIdx.x] = T(0);
        for (int k = threadIdx.x; k < n_here * 3; k += threads_per_block)
            site_grad[k / 3][k % 3] = T(0);
        __syncthreads();

        const bool poisoned = !fits || !(blends[0].w[0] == blends[0].w[0]);
        T value(0), by_sigma(0), by_lam(0), gx(0), gy(0), gz(0);
        const T px = x[other * 3], py = x[other * 3 + 1], pz = x[other * 3 + 2];
        T bx[9];
        if (box != nullptr)
            for (int k = 0; k < 9; ++k) bx[k] = box[k];
        for (int a = 0; a < n_here; ++a) {
            const int64_t site = p.sites[first_site + a];
            T fx(0), fy(0), fz(0);
            bool touched = false;
            const int64_t type = active ? p.pair_type[(first_site + a) * p.n_env + b] : -1;
            if (type >= 0) {
                T dx = x[site * 3] - px, dy = x[site * 3 + 1] - py, dz = x[site * 3 + 2] - pz;
                if (box != nullptr) {
                    const T n3 = floor(dz / bx[8] + T(0.5));
                    dx -= n3 * bx[6];
                    dy -= n3 * bx[7];
                    dz -= n3 * bx[8];
                    const T n2 = floor(dy / bx[4] + T(0.5));
                    dx -= n2 * bx[3];
                    dy -= n2 * bx[4];
                    dx -= floor(dx / bx[0] + T(0.5)) * bx[0];
                }
                const T r2 = dx * dx + dy * dy + dz * dz;
                // NaN and infinity go on, to be seen in the result.
                touched = !p.cut || !(r2 >= cutoff2) || !isfinite(r2);
                if (touched) {
                    const T r = sqrt(r2), inverse_h = T(1) / p.r_grid[2 * type + 1];
                    const T s = (r - p.r_grid[2 * type]) * inverse_h;
                    const Place<T> at = locate(isfinite(s) ? s : T(0), p.n_coef, false);
                    T w[4], d[4], v[3] = {T(0), T(0), T(0)}, rise(0);
                    basis(at.u, w);
                    basis_slope(at.u, d);
                    // Beyond the domain value + over * slope, as weights of the coefficients.
                    for (int k = 0; k < 4; ++k) w[k] += at.over * d[k];
                    const T* row = p.table + type * p.n_lam * p.n_noise * p.n_coef + at.first;
                    for (int i = 0; i < n_blends; ++i) {
                        const T* c = row + blends[i].offset;
                        const T here = w[0] * c[0] + w[1] * c[1] + w[2] * c[2] + w[3] * c[3];
                        const T slope = d[0] * c[0] + d[1] * c[1] + d[2] * c[2] + d[3] * c[3];
                        for (int j = 0; j < 3; ++j) v[j] += blends[i].w[j] * here;
                        rise += blends[i].w[0] * slope;
                    }
                    T force = rise * inverse_h;
                    if (p.cut && r > p.r_switch) {
                        const T inverse = T(1) / (p.r_cutoff - p.r_switch);
                        const T y = (r - p.r_switch) * inverse, rest = T(1) - y;
                        const T fade = T(1) - y * y * y * (T(10) - T(15) * y + T(6) * y * y);
                        force = force * fade - v[0] * T(30) * inverse * y * y * rest * rest;
                        for (int j = 0; j < 3; ++j) v[j] *= fade;
                    }
                    if (!isfinite(s)) v[0] = force = not_a_number<T>();
                    value += v[0];
                    by_sigma += v[1];
                    by_lam += v[2];
                    const T scale = r == T(0) ? T(0) : force / r;
                    fx = scale * dx;
                    fy = scale * dy;
                    fz = scale * dz;
                    gx -= fx;
                    gy -= fy;
                    gz -= fz;
                }
            }
            // With a cutoff most warps have nothing for most sites.
            if (__any_sync(0xffffffffu, touched)) {
                fx = warp_sum(fx);
                fy = warp_sum(fy);
                fz = warp_sum(fz);
                if (lane == 0) {
                    atomicAdd(&site_grad[a][0], fx);
                    atomicAdd(&site_grad[a][1], fy);
                    atomicAdd(&site_grad[a][2], fz);
                }
            }
        }
        if (poisoned) value = by_sigma = by_lam = gx = gy = gz = not_a_number<T>();
        T* grad = p.grad_x + f * p.n_atoms * 3;
        if (active && (gx != T(0) || gy != T(0) || gz != T(0))) {
            atomicAdd(&grad[other * 3], gx);
            atomicAdd(&grad[other * 3 + 1], gy);
            atomicAdd(&grad[other * 3 + 2], gz);
        }
        value = warp_sum(value);
        by_sigma = warp_sum(by_sigma);
        by_lam = warp_sum(by_lam);
        if (lane == 0) {
            atomicAdd(&sums[0], value);
            atomicAdd(&sums[1], by_sigma);
            atomicAdd(&sums[2], by_lam);
        }
        __syncthreads();
        for (int k = threadIdx.x; k < n_here * 3; k += threads_per_block) {
            const T total = poisoned ? not_a_number<T>() : site_grad[k / 3][k % 3];
            if (total != T(0)) atomicAdd(&grad[p.sites[first_site + k / 3] * 3 + k % 3], total);
        }
        if (threadIdx.x == 0) {
            atomicAdd(&p.value[f], sums[0]);
            atomicAdd(&p.d_sigma[f], sums[1]);
            atomicAdd(&p.d_lam[f], sums[2]);
        }
    }
}

void check_cuda(cudaError_t code, const char* what) {
    if (code != cudaSuccess)
        fail(DIFFFORCE_CUDA_ERROR, "CUDA failed to %s: %s", what, cudaGetErrorString(code));
}

template <typename T>
void launch(const diffforce_pair_problem& q, const void* x, const void* sigma, const void* lam,
            const void* box, void* value, void* grad_x, void* d_sigma, void* d_lam,
            cudaStream_t stream) {
    Problem<T> p;
    p.n_frames = q.n_frames;
    p.n_atoms = q.n_atoms;
    p.n_sites = q.n_sites;
    p.n_env = q.n_env;
    p.n_lam = q.n_lam;
    p.n_noise = q.n_noise;
    p.n_coef = q.n_coef;
    p.sites = q.sites;
    p.env = q.env;
    p.pair_type = q.pair_type;
    p.table = static_cast<const T*>(q.table);
    p.r_grid = static_cast<const T*>(q.r_grid);
    p.lam_knots = static_cast<const T*>(q.lam_knots);
    p.sigma_knots = static_cast<const T*>(q.sigma_knots);
    p.x = static_cast<const T*>(x);
    p.sigma = static_cast<const T*>(sigma);
    p.lam = static_cast<const T*>(lam);
    p.box = static_cast<const T*>(box);
    p.cut = q.r_cutoff > 0.0 && std::isfinite(q.r_cutoff);
    p.r_switch = static_cast<T>(p.cut ? q.r_switch : 0.0);
    p.r_cutoff = static_cast<T>(p.cut ? q.r_cutoff : 0.0);
    p.integrated = q.integrated != 0;
    p.value = static_cast<T*>(value);
    p.grad_x = static_cast<T*>(grad_x);
    p.d_sigma = static_cast<T*>(d_sigma);
    p.d_lam = static_cast<T*>(d_lam);

    const size_t frames = static_cast<size_t>(p.n_frames) * sizeof(T);
    check_cuda(cudaMemsetAsync(value, 0, frames, stream), "clear the results");
    check_cuda(cudaMemsetAsync(d_sigma, 0, frames, stream), "clear the results");
    check_cuda(cudaMemsetAsync(d_lam, 0, frames, stream), "clear the results");
    check_cuda(cudaMemsetAsync(grad_x, 0, frames * p.n_atoms * 3, stream), "clear the results");
    // At least one block even without pairs: it sees a sigma that is out of range.
    const auto blocks = [](int64_t n, int64_t each) { return n < 1 ? 1 : (n + each - 1) / each; };
    const int64_t in_x = blocks(p.n_env, threads_per_block);
    const int64_t in_z = blocks(p.n_sites, sites_per_block);
    if (in_x > 0x7fffffff || in_z > 65535)
        fail(DIFFFORCE_BAD_SHAPE, "sites, env: too many for one launch");
    const size_t shared = sizeof(Blend<T>) * 2 * static_cast<size_t>(p.n_lam + 1);
    if (shared > 40000)
        fail(DIFFFORCE_BAD_SHAPE, "lam_knots: expected fewer knots on a CUDA device, found %lld",
             static_cast<long long>(p.n_lam));
    const dim3 grid(static_cast<unsigned>(in_x),
                    static_cast<unsigned>(p.n_frames < 65535 ? p.n_frames : 65535),
                    static_cast<unsigned>(in_z));
    pair_kernel<T><<<grid, threads_per_block, shared, stream>>>(p);
    check_cuda(cudaGetLastError(), "start the kernel");
}

}  // namespace
}  // namespace diffforce

extern "C" {

int diffforce_has_cuda(void) {
    return 1;
}

int diffforce_pair_operator_cuda(const diffforce_pair_problem* problem, const void* x,
                                 const void* sigma, const void* lam, const void* box, void* value,
                                 void* grad_x, void* d_sigma, void* d_lam, void* stream) {
    using namespace diffforce;
    return guarded([&] {
        require(problem, "problem");
        const diffforce_pair_problem& p = *problem;
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
        if (std::isnan(p.r_cutoff) || std::isnan(p.r_switch))
            fail(DIFFFORCE_BAD_GRID, "r_cutoff, r_switch: expected numbers, found NaN");
        const bool cut = p.r_cutoff > 0.0 && std::isfinite(p.r_cutoff);
        if (cut && !(p.r_switch >= 0.0 && p.r_switch < p.r_cutoff))
            fail(DIFFFORCE_BAD_GRID, "r_switch: expected a value in [0, r_cutoff = %g), found %g",
                 p.r_cutoff, p.r_switch);
        if (box != nullptr && !cut)
            fail(DIFFFORCE_BAD_GRID,
                 "r_cutoff: expected a finite cutoff with a periodic box, found %g", p.r_cutoff);
        if (p.n_frames == 0) return;
        require(x, "x");
        require(sigma, "sigma");
        require(lam, "lam");
        require(value, "value");
        require(grad_x, "grad_x");
        require(d_sigma, "d_sigma");
        require(d_lam, "d_lam");
        const cudaStream_t on = static_cast<cudaStream_t>(stream);
        if (p.dtype == DIFFFORCE_FLOAT64)
            launch<double>(p, x, sigma, lam, box, value, grad_x, d_sigma, d_lam, on);
        else if (p.dtype == DIFFFORCE_FLOAT32)
            launch<float>(p, x, sigma, lam, box, value, grad_x, d_sigma, d_lam, on);
        else
            fail(DIFFFORCE_BAD_DTYPE, "dtype: expected float32 (0) or float64 (1), found %d",
                 p.dtype);
    });
}

}  // extern "C"
