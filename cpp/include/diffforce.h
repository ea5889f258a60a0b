/* diffforce: noised pair operators and internal-coordinate actions, as a flat C interface.
 *
 * Units: nm, radians, and reduced (dimensionless, kT) values. Arrays are dense, C-ordered, owned by
 * the caller, and neither kept nor freed here. Real arrays hold float or double as the problem's
 * `dtype` says; indices are int64. All functions are thread-safe; every one returns a status, and
 * diffforce_last_error() then has a sentence that says what was expected and what was found.
 *
 * Splines. Uniform cubic B-splines by coefficients c_0 .. c_{n-1} on a grid (lo, h), n >= 4:
 *     f(q) = sum_i c_i B((q - lo)/h - (i - 1)),   domain [lo, lo + (n-3) h],
 * B the cubic B-spline centred at 0. Outside the domain f continues linearly (value and slope).
 * Periodic ones (torsions) have h = 2 pi/n, lo = -pi and indices modulo n.
 *
 * Noise. Knots sigma_0 = 0 < sigma_1 < ...; between two knots the weights are linear in sigma^2 in
 * the first interval and linear in log sigma in the others. sigma outside [0, last] is an error.
 *
 * lambda. Hat functions h_k on knots from 0 to 1 (one knot: constant); integrated != 0 replaces
 * h_k(lam) by its integral from 0 to lam.
 */
#ifndef DIFFFORCE_H
#define DIFFFORCE_H

#include <stdint.h>

#if defined(__GNUC__)
#define DIFFFORCE_API __attribute__((visibility("default")))
#else
#define DIFFFORCE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    DIFFFORCE_OK = 0,
    DIFFFORCE_NULL_POINTER = 1, /* a required pointer is NULL */
    DIFFFORCE_BAD_SHAPE = 2,    /* a count is negative, zero or too small */
    DIFFFORCE_BAD_DTYPE = 3,    /* dtype is neither DIFFFORCE_FLOAT32 nor DIFFFORCE_FLOAT64 */
    DIFFFORCE_BAD_INDEX =
        4, /* an atom, class or type index is out of range, or an atom meets itself */
    DIFFFORCE_BAD_GRID = 5,     /* spline grids, knots, switch or cutoff make no sense */
    DIFFFORCE_BAD_BOX = 6,      /* box not in reduced form, or too small for the cutoff */
    DIFFFORCE_NOT_FINITE = 7,   /* NaN or infinity in an input or in the result */
    DIFFFORCE_OUT_OF_RANGE = 8, /* sigma or lambda outside its knots */
    DIFFFORCE_NO_MEMORY = 9,    /* an allocation failed */
    DIFFFORCE_NO_TORCH = 10,    /* LibTorch or one of its C symbols was not found in the process */
    DIFFFORCE_NO_CUDA = 11,     /* this build has no CUDA part */
    DIFFFORCE_CUDA_ERROR = 12,  /* a CUDA call failed */
    DIFFFORCE_INTERNAL_ERROR = 13
} diffforce_status;

typedef enum { DIFFFORCE_FLOAT32 = 0, DIFFFORCE_FLOAT64 = 1 } diffforce_dtype;

enum { DIFFFORCE_DISTANCE = 2, DIFFFORCE_ANGLE = 3, DIFFFORCE_TORSION = 4 };

/* Message of the last failure on this thread ("" if none); valid until the next call on it. */
DIFFFORCE_API const char* diffforce_last_error(void);

/* Version of this library, e.g. "0.1.0". */
DIFFFORCE_API const char* diffforce_version(void);

/* Threads for batches of frames; 0 (the default) means the environment variable
 * DIFFFORCE_NUM_THREADS, then OMP_NUM_THREADS, then the number of cores. */
DIFFFORCE_API int diffforce_set_num_threads(int n_threads);

/* 1 if the CUDA twin was compiled in. */
DIFFFORCE_API int diffforce_has_cuda(void);

/* Pair functions between sites A and environment B:
 *   value = sum_{a,b: type(a,b) >= 0} switch(r) * sum_{l,m} a_l(lam) w_m(sigma) f_{type,l,m}(r),
 *   r = |x[sites[a]] - x[env[b]]| (nearest image if there is a box);
 * switch falls from 1 at r_switch to 0 at r_cutoff as 1 - 10 y^3 + 15 y^4 - 6 y^5. */
typedef struct {
    int64_t n_frames, n_atoms;
    int64_t n_sites, n_env;                  /* nA, nB */
    int64_t n_types, n_lam, n_noise, n_coef; /* T, L, M, R of the table */
    const int64_t* sites;                    /* [nA] atom indices */
    const int64_t* env;                      /* [nB] atom indices */
    const int64_t* pair_type;                /* [nA, nB], -1 excludes the pair */
    const void* table;                       /* [T, L, M, R] spline coefficients */
    const void* r_grid;                      /* [T, 2]: lo, h */
    const void* lam_knots;                   /* [L] */
    const void* sigma_knots;                 /* [M] */
    double r_switch, r_cutoff;               /* r_cutoff <= 0 or infinite: no cutoff, no switch */
    int integrated;
    int dtype; /* a diffforce_dtype */
} diffforce_pair_problem;

/* x[F,N,3], sigma[F], lam[F], box[F,3,3] or NULL -> value[F], grad_x[F,N,3], d_sigma[F], d_lam[F].
 * A box is lower triangular in OpenMM's reduced form; it needs a cutoff of at most half its
 * smallest width. */
DIFFFORCE_API int diffforce_pair_operator(const diffforce_pair_problem* problem, const void* x,
                                          const void* sigma, const void* lam, const void* box,
                                          void* value, void* grad_x, void* d_sigma, void* d_lam);

/* Product of the Hessian of value in (x, sigma, lam) with (v_x, v_sigma, v_lam). */
DIFFFORCE_API int diffforce_pair_operator_hvp(const diffforce_pair_problem* problem, const void* x,
                                              const void* sigma, const void* lam, const void* box,
                                              const void* v_x, const void* v_sigma,
                                              const void* v_lam, void* h_x, void* h_sigma,
                                              void* h_lam);

/* diffforce_pair_operator on a CUDA device: every array above, those of the problem too, lies on
 * the current device; `stream` is a cudaStream_t. Asynchronous: contents are not checked (indices
 * must be right), and a frame whose sigma or lambda is out of range, or whose box is too small,
 * comes out as NaN. */
DIFFFORCE_API int diffforce_pair_operator_cuda(const diffforce_pair_problem* problem, const void* x,
                                               const void* sigma, const void* lam, const void* box,
                                               void* value, void* grad_x, void* d_sigma,
                                               void* d_lam, void* stream);

/* Action of internal coordinates q_i(x), each a class c of instances with one spline:
 *   value = sum_m w_m(sigma) sum_i [f_{m,c(i)}(q_i) + wall_{m,c(i)}/2 (q_i - edge)^2 outside]. */
typedef struct {
    int64_t n_frames, n_atoms;
    int64_t n_instances, n_classes; /* I, C */
    int64_t n_noise;                /* M */
    const int64_t* atoms;           /* [I, 4] atom indices, padded with -1 */
    const int64_t* cls;             /* [I] */
    const int64_t* kind;            /* [C] DIFFFORCE_DISTANCE, _ANGLE or _TORSION */
    const int64_t* offsets;         /* [C+1]; class c has coefficients offsets[c] : offsets[c+1] */
    const void* grid;               /* [M, C, 3]: lo, h, wall */
    const void* coef;               /* [M, offsets[C]] */
    const void* sigma_knots;        /* [M] */
    int dtype;                      /* a diffforce_dtype */
} diffforce_internal_problem;

/* x[F,N,3], sigma[F] -> value[F], grad_x[F,N,3], d_sigma[F]. */
DIFFFORCE_API int diffforce_internal_action(const diffforce_internal_problem* problem,
                                            const void* x, const void* sigma, void* value,
                                            void* grad_x, void* d_sigma);

/* Product of the Hessian of value in (x, sigma) with (v_x, v_sigma). */
DIFFFORCE_API int diffforce_internal_action_hvp(const diffforce_internal_problem* problem,
                                                const void* x, const void* sigma, const void* v_x,
                                                const void* v_sigma, void* h_x, void* h_sigma);

/* Normal equations of score matching. With phi_k the sum over the instances of its class of basis
 * function k (continued linearly, without wall):
 *   a[k,l] = sum_f grad phi_k . grad phi_l,  b[k] = sum_f grad phi_k . target,
 *   lap[k] = sum_f laplacian(phi_k).
 * Uses grid[0] alone; coef and sigma_knots may be NULL. dtype must be DIFFFORCE_FLOAT64.
 * x[F,N,3], target[F,N,3] -> a[K,K], b[K], lap[K], K = offsets[C]. The order of summation, so the
 * last bits, depend on n_threads (0: see diffforce_set_num_threads). */
DIFFFORCE_API int diffforce_internal_normal(const diffforce_internal_problem* problem,
                                            const double* x, const double* target, int n_threads,
                                            double* a, double* b, double* lap);

/* Register the torch operators diffforce::* with the LibTorch that is loaded in this process. A
 * second call does nothing. */
DIFFFORCE_API int diffforce_torch_register(void);

#ifdef __cplusplus
}
#endif
#endif
