/* The flat C interface: right numbers on a case done by hand, and every error status. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "diffforce.h"

static int failures = 0;

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: failed: %s (%s)\n", __FILE__, __LINE__, #condition, \
                    diffforce_last_error());                                            \
            ++failures;                                                                 \
        }                                                                               \
    } while (0)

/* The call must give this status, and a message that names the culprit. */
#define FAILS(status, word, call)                                                            \
    do {                                                                                     \
        int got = (call);                                                                    \
        if (got != (status) || strstr(diffforce_last_error(), (word)) == NULL) {             \
            fprintf(stderr, "%s:%d: expected status %d with '%s', found %d: %s\n", __FILE__, \
                    __LINE__, (int)(status), (word), got, diffforce_last_error());           \
            ++failures;                                                                      \
        }                                                                                    \
    } while (0)

static int close_to(double a, double b) {
    return fabs(a - b) <= 1e-12 * (1.0 + fabs(b));
}

/* ------------------------------------------------------------ pair operator */

#define F 2
#define N 3

/* One site, two environment atoms. The coefficients (i-1) h on h = 0.5, lo = 0 make the function r:
 * basis function i is centred at lo + (i-1) h. */
static double table[2 * 2 * 6];
static const double r_grid[2] = {0.0, 0.5}, lam_knots[2] = {0.0, 1.0}, sigma_knots[2] = {0.0, 0.1};
static const int64_t sites[1] = {0}, env[2] = {1, 2}, pair_type[2] = {0, 0};
static const double positions[F * N * 3] = {0, 0, 0, 0.5, 0, 0, 0, 1.2, 0,
                                            0, 0, 0, 0.7, 0, 0, 0, 9.0, 0};
static const double sigmas[F] = {0.0, 0.05}, lams[F] = {0.5, 1.0};

static diffforce_pair_problem pair_problem(void) {
    diffforce_pair_problem p;
    memset(&p, 0, sizeof p);
    for (int l = 0; l < 2; ++l)
        for (int m = 0; m < 2; ++m)
            for (int k = 0; k < 6; ++k) /* (1 + l)(1 + m) r */
                table[(l * 2 + m) * 6 + k] = (1 + l) * (1 + m) * 0.5 * (k - 1);
    p.n_frames = F;
    p.n_atoms = N;
    p.n_sites = 1;
    p.n_env = 2;
    p.n_types = 1;
    p.n_lam = 2;
    p.n_noise = 2;
    p.n_coef = 6;
    p.sites = sites;
    p.env = env;
    p.pair_type = pair_type;
    p.table = table;
    p.r_grid = r_grid;
    p.lam_knots = lam_knots;
    p.sigma_knots = sigma_knots;
    p.r_switch = p.r_cutoff = -1.0;
    p.dtype = DIFFFORCE_FLOAT64;
    return p;
}

static double value[F], grad[F * N * 3], d_sigma[F], d_lam[F];

static int pair(const diffforce_pair_problem* p, const double* x, const double* sigma,
                const double* lam, const double* box) {
    return diffforce_pair_operator(p, x, sigma, lam, box, value, grad, d_sigma, d_lam);
}

static void test_pair_value(void) {
    diffforce_pair_problem p = pair_problem();
    CHECK(pair(&p, positions, sigmas, lams, NULL) == DIFFFORCE_OK);
    CHECK(strcmp(diffforce_last_error(), "") == 0);
    /* frame 0: sigma 0, lambda 1/2: 1.5 (r1 + r2); frame 1: w = 1/4 of the second noise knot,
     * lambda 1: 2 * 1.25 (r1 + r2), far beyond the grid too. */
    CHECK(close_to(value[0], 1.5 * (0.5 + 1.2)));
    CHECK(close_to(value[1], 2.5 * (0.7 + 9.0)));
    CHECK(close_to(d_lam[0], 1.7));
    CHECK(close_to(d_sigma[0], 0.0));
    CHECK(close_to(d_sigma[1], 2.0 * 9.7 * 2.0 * 0.05 / 0.01));
    CHECK(close_to(grad[3], 1.5) && close_to(grad[7], 1.5));
    CHECK(close_to(grad[0], -1.5) && close_to(grad[1], -1.5));
    /* switch: nothing beyond the cutoff; excluded pairs give nothing */
    p.r_switch = 0.2;
    p.r_cutoff = 0.4;
    CHECK(pair(&p, positions, sigmas, lams, NULL) == DIFFFORCE_OK && value[0] == 0.0);
    p = pair_problem();
    const int64_t excluded[2] = {-1, 0};
    p.pair_type = excluded;
    CHECK(pair(&p, positions, sigmas, lams, NULL) == DIFFFORCE_OK);
    CHECK(close_to(value[0], 1.5 * 1.2) && grad[3] == 0.0);
    /* a box brings the far atom near */
    p = pair_problem();
    p.r_switch = 1.0;
    p.r_cutoff = 2.0;
    const double box[F * 9] = {9.5, 0, 0, 0, 9.5, 0, 0, 0, 9.5, 9.5, 0, 0, 0, 9.5, 0, 0, 0, 9.5};
    CHECK(pair(&p, positions, sigmas, lams, box) == DIFFFORCE_OK);
    CHECK(close_to(value[1], 2.5 * (0.7 + 0.5)));
    /* no frames */
    p.n_frames = 0;
    CHECK(diffforce_pair_operator(&p, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL) ==
          DIFFFORCE_OK);
}

static void test_pair_float(void) {
    diffforce_pair_problem p = pair_problem();
    float t[24], g[2] = {0.0f, 0.5f}, l[2] = {0.0f, 1.0f}, s[2] = {0.0f, 0.1f}, x[F * N * 3];
    for (int i = 0; i < 24; ++i) t[i] = (float)table[i];
    for (int i = 0; i < F * N * 3; ++i) x[i] = (float)positions[i];
    const float sigma[F] = {0.0f, 0.05f}, lam[F] = {0.5f, 1.0f};
    float v[F], gx[F * N * 3], ds[F], dl[F];
    p.table = t;
    p.r_grid = g;
    p.lam_knots = l;
    p.sigma_knots = s;
    p.dtype = DIFFFORCE_FLOAT32;
    CHECK(diffforce_pair_operator(&p, x, sigma, lam, NULL, v, gx, ds, dl) == DIFFFORCE_OK);
    CHECK(fabs(v[1] - 24.25) < 1e-4);
    float hx[F * N * 3], hs[F], hl[F];
    CHECK(diffforce_pair_operator_hvp(&p, x, sigma, lam, NULL, x, sigma, lam, hx, hs, hl) ==
          DIFFFORCE_OK);
}

static void test_pair_errors(void) {
    diffforce_pair_problem p = pair_problem();
    double x[F * N * 3], sigma[F] = {0.0, 0.0}, lam[F] = {0.0, 0.0};
    memcpy(x, positions, sizeof x);
    FAILS(DIFFFORCE_NULL_POINTER, "problem", pair(NULL, x, sigma, lam, NULL));
    FAILS(DIFFFORCE_NULL_POINTER, "x", pair(&p, NULL, sigma, lam, NULL));
    FAILS(DIFFFORCE_NULL_POINTER, "sigma", pair(&p, x, NULL, lam, NULL));
    FAILS(DIFFFORCE_NULL_POINTER, "lam", pair(&p, x, sigma, NULL, NULL));
    FAILS(DIFFFORCE_NULL_POINTER, "value",
          diffforce_pair_operator(&p, x, sigma, lam, NULL, NULL, grad, d_sigma, d_lam));
    FAILS(DIFFFORCE_NULL_POINTER, "grad_x",
          diffforce_pair_operator(&p, x, sigma, lam, NULL, value, NULL, d_sigma, d_lam));
#define WITH(change, status, word)                          \
    do {                                                    \
        p = pair_problem();                                 \
        p.change;                                           \
        FAILS(status, word, pair(&p, x, sigma, lam, NULL)); \
    } while (0)
    WITH(sites = NULL, DIFFFORCE_NULL_POINTER, "sites");
    WITH(env = NULL, DIFFFORCE_NULL_POINTER, "env");
    WITH(pair_type = NULL, DIFFFORCE_NULL_POINTER, "pair_type");
    WITH(table = NULL, DIFFFORCE_NULL_POINTER, "table");
    WITH(r_grid = NULL, DIFFFORCE_NULL_POINTER, "r_grid");
    WITH(lam_knots = NULL, DIFFFORCE_NULL_POINTER, "lam_knots");
    WITH(sigma_knots = NULL, DIFFFORCE_NULL_POINTER, "sigma_knots");
    WITH(n_frames = -1, DIFFFORCE_BAD_SHAPE, "n_frames");
    WITH(n_atoms = 0, DIFFFORCE_BAD_SHAPE, "n_atoms");
    WITH(n_sites = -1, DIFFFORCE_BAD_SHAPE, "n_sites");
    WITH(n_env = -1, DIFFFORCE_BAD_SHAPE, "n_env");
    WITH(n_types = -1, DIFFFORCE_BAD_SHAPE, "n_types");
    WITH(n_lam = 0, DIFFFORCE_BAD_SHAPE, "n_lam");
    WITH(n_noise = 0, DIFFFORCE_BAD_SHAPE, "n_noise");
    WITH(n_coef = 3, DIFFFORCE_BAD_SHAPE, "n_coef");
    WITH(dtype = 7, DIFFFORCE_BAD_DTYPE, "dtype");
    const int64_t far[1] = {N}, negative[2] = {1, -1}, types[2] = {0, 1}, itself[2] = {0, 1};
    WITH(sites = far, DIFFFORCE_BAD_INDEX, "sites");
    WITH(env = negative, DIFFFORCE_BAD_INDEX, "env");
    WITH(pair_type = types, DIFFFORCE_BAD_INDEX, "pair_type");
    WITH(env = itself, DIFFFORCE_BAD_INDEX, "itself");
    const double flat[2] = {0.0, 0.0}, late[2] = {0.1, 1.0}, falling[2] = {0.0, -1.0},
                 half[2] = {0.0, 0.5};
    WITH(r_grid = flat, DIFFFORCE_BAD_GRID, "r_grid");
    WITH(lam_knots = late, DIFFFORCE_BAD_GRID, "lam_knots");
    WITH(lam_knots = half, DIFFFORCE_BAD_GRID, "lam_knots");
    WITH(sigma_knots = falling, DIFFFORCE_BAD_GRID, "sigma_knots");
    WITH(r_cutoff = NAN, DIFFFORCE_BAD_GRID, "r_cutoff");
    WITH(r_cutoff = 1.0, DIFFFORCE_BAD_GRID, "r_switch");
    p = pair_problem();
    double box[F * 9] = {4, 0, 0, 0, 4, 0, 0, 0, 4, 4, 0, 0, 0, 4, 0, 0, 0, 4};
    FAILS(DIFFFORCE_BAD_GRID, "r_cutoff", pair(&p, x, sigma, lam, box));
    p.r_switch = 1.0;
    p.r_cutoff = 2.1;
    FAILS(DIFFFORCE_BAD_BOX, "width", pair(&p, x, sigma, lam, box));
    p.r_cutoff = 2.0;
    CHECK(pair(&p, x, sigma, lam, box) == DIFFFORCE_OK);
    box[3] = 2.5;
    FAILS(DIFFFORCE_BAD_BOX, "reduced", pair(&p, x, sigma, lam, box));
    box[3] = NAN;
    FAILS(DIFFFORCE_NOT_FINITE, "box", pair(&p, x, sigma, lam, box));
    p = pair_problem();
    x[4] = NAN;
    FAILS(DIFFFORCE_NOT_FINITE, "x", pair(&p, x, sigma, lam, NULL));
    x[4] = 0.0;
    table[3] = INFINITY;
    FAILS(DIFFFORCE_NOT_FINITE, "table", pair(&p, x, sigma, lam, NULL));
    p = pair_problem();
    const double bad[4] = {-0.01, 0.11, NAN, 1.01};
    for (int k = 0; k < 3; ++k) {
        sigma[1] = bad[k];
        FAILS(DIFFFORCE_OUT_OF_RANGE, "sigma", pair(&p, x, sigma, lam, NULL));
    }
    sigma[1] = 0.1;
    for (int k = 0; k < 4; ++k)
        if (k != 1) {
            lam[1] = bad[k];
            FAILS(DIFFFORCE_OUT_OF_RANGE, "lam", pair(&p, x, sigma, lam, NULL));
        }
    lam[1] = 1.0;
    /* the same checks stand before the Hessian-vector product */
    double h[F * N * 3];
#define HVP(problem, v, out) \
    diffforce_pair_operator_hvp(problem, x, sigma, lam, NULL, v, sigma, lam, out, d_sigma, d_lam)
    CHECK(HVP(&p, x, h) == DIFFFORCE_OK);
    FAILS(DIFFFORCE_NULL_POINTER, "problem", HVP(NULL, x, h));
    FAILS(DIFFFORCE_NULL_POINTER, "v_x", HVP(&p, NULL, h));
    FAILS(DIFFFORCE_NULL_POINTER, "h_x", HVP(&p, x, NULL));
    p.dtype = 7;
    FAILS(DIFFFORCE_BAD_DTYPE, "dtype", HVP(&p, x, h));
    p = pair_problem();
    p.n_coef = 2;
    FAILS(DIFFFORCE_BAD_SHAPE, "n_coef", HVP(&p, x, h));
    p = pair_problem();
    x[0] = INFINITY;
    FAILS(DIFFFORCE_NOT_FINITE, "x", HVP(&p, x, h));
    if (!diffforce_has_cuda())
        FAILS(DIFFFORCE_NO_CUDA, "CUDA",
              diffforce_pair_operator_cuda(&p, x, sigma, lam, NULL, value, grad, d_sigma, d_lam,
                                           NULL));
}

/* ------------------------------------------------------------ internal action */

static const int64_t atoms[2 * 4] = {0, 1, -1, -1, 0, 2, -1, -1}, cls[2] = {0, 0}, kind[1] = {2},
                               offsets[2] = {0, 6};
static const double grid[2 * 3] = {0.0, 0.5, 0.0, 0.0, 0.5, 10.0};
static double coef[2 * 6];

static diffforce_internal_problem internal_problem(void) {
    diffforce_internal_problem p;
    memset(&p, 0, sizeof p);
    for (int m = 0; m < 2; ++m)
        for (int k = 0; k < 6; ++k) coef[m * 6 + k] = (1 + m) * 0.5 * (k - 1);
    p.n_frames = F;
    p.n_atoms = N;
    p.n_instances = 2;
    p.n_classes = 1;
    p.n_noise = 2;
    p.atoms = atoms;
    p.cls = cls;
    p.kind = kind;
    p.offsets = offsets;
    p.grid = grid;
    p.coef = coef;
    p.sigma_knots = sigma_knots;
    p.dtype = DIFFFORCE_FLOAT64;
    return p;
}

static int internal(const diffforce_internal_problem* p, const double* x, const double* sigma) {
    return diffforce_internal_action(p, x, sigma, value, grad, d_sigma);
}

static void test_internal(void) {
    diffforce_internal_problem p = internal_problem();
    CHECK(internal(&p, positions, sigmas) == DIFFFORCE_OK);
    CHECK(close_to(value[0], 1.7)); /* the wall of the second knot has no weight at sigma = 0 */
    CHECK(close_to(value[1], 0.75 * 9.7 + 0.25 * (2 * 9.7 + 5.0 * 7.5 * 7.5)));
    CHECK(close_to(grad[3], 1.0));
    p.n_frames = 0;
    CHECK(diffforce_internal_action(&p, NULL, NULL, NULL, NULL, NULL) == DIFFFORCE_OK);
    double a[36], b[6], lap[6], sum = 0.0;
    p = internal_problem();
    for (int threads = 1; threads < 5; ++threads) {
        CHECK(diffforce_internal_normal(&p, positions, positions, threads, a, b, lap) ==
              DIFFFORCE_OK);
        /* the line of slope 1 has |grad|^2 = 2 (r1) + 2 (r2) + 2 e_1.e_2 on atom 0, which is 0 */
        sum = 0.0;
        for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) sum += a[i * 6 + j] * coef[i] * coef[j];
        CHECK(close_to(sum, F * 4.0));
        sum = 0.0;
        for (int i = 0; i < 6; ++i) sum += b[i] * coef[i];
        CHECK(close_to(sum, 0.5 + 1.2 + 0.7 + 9.0));
        sum = 0.0;
        for (int i = 0; i < 6; ++i) sum += lap[i] * coef[i];
        CHECK(close_to(sum, 4 / 0.5 + 4 / 1.2 + 4 / 0.7 + 4 / 9.0));
    }
}

static void test_internal_errors(void) {
    diffforce_internal_problem p = internal_problem();
    double x[F * N * 3], sigma[F] = {0.0, 0.1}, a[36], b[6], lap[6];
    memcpy(x, positions, sizeof x);
    FAILS(DIFFFORCE_NULL_POINTER, "problem", internal(NULL, x, sigma));
    FAILS(DIFFFORCE_NULL_POINTER, "x", internal(&p, NULL, sigma));
    FAILS(DIFFFORCE_NULL_POINTER, "sigma", internal(&p, x, NULL));
    FAILS(DIFFFORCE_NULL_POINTER, "value",
          diffforce_internal_action(&p, x, sigma, NULL, grad, d_sigma));
#undef WITH
#define WITH(change, status, word)                   \
    do {                                             \
        p = internal_problem();                      \
        p.change;                                    \
        FAILS(status, word, internal(&p, x, sigma)); \
    } while (0)
    WITH(atoms = NULL, DIFFFORCE_NULL_POINTER, "atoms");
    WITH(cls = NULL, DIFFFORCE_NULL_POINTER, "cls");
    WITH(kind = NULL, DIFFFORCE_NULL_POINTER, "kind");
    WITH(offsets = NULL, DIFFFORCE_NULL_POINTER, "offsets");
    WITH(grid = NULL, DIFFFORCE_NULL_POINTER, "grid");
    WITH(coef = NULL, DIFFFORCE_NULL_POINTER, "coef");
    WITH(sigma_knots = NULL, DIFFFORCE_NULL_POINTER, "sigma_knots");
    WITH(n_frames = -1, DIFFFORCE_BAD_SHAPE, "n_frames");
    WITH(n_atoms = 0, DIFFFORCE_BAD_SHAPE, "n_atoms");
    WITH(n_instances = -1, DIFFFORCE_BAD_SHAPE, "n_instances");
    WITH(n_classes = -1, DIFFFORCE_BAD_SHAPE, "n_classes");
    WITH(n_noise = 0, DIFFFORCE_BAD_SHAPE, "n_noise");
    WITH(dtype = 7, DIFFFORCE_BAD_DTYPE, "dtype");
    const int64_t five[1] = {5}, few[2] = {0, 3}, late[2] = {1, 7}, other[2] = {0, 1},
                  far[8] = {0, 3, -1, -1, 0, 2, -1, -1}, pad[8] = {0, 1, 2, -1, 0, 2, -1, -1},
                  twice[8] = {0, 0, -1, -1, 0, 2, -1, -1}, four[1] = {4},
                  torsion[8] = {0, 1, 2, 3, 0, 1, 2, 3};
    WITH(kind = five, DIFFFORCE_BAD_INDEX, "kind");
    WITH(offsets = few, DIFFFORCE_BAD_INDEX, "offsets");
    WITH(offsets = late, DIFFFORCE_BAD_INDEX, "offsets");
    WITH(cls = other, DIFFFORCE_BAD_INDEX, "cls");
    WITH(atoms = far, DIFFFORCE_BAD_INDEX, "atoms");
    WITH(atoms = pad, DIFFFORCE_BAD_INDEX, "padding");
    WITH(atoms = twice, DIFFFORCE_BAD_INDEX, "twice");
    const double flat[6] = {0.0, 0.0, 0.0, 0.0, 0.5, 0.0}, pull[6] = {0.0, 0.5, -1.0, 0, 0.5, 0},
                 falling[2] = {0.0, -0.1};
    WITH(grid = flat, DIFFFORCE_BAD_GRID, "grid");
    WITH(grid = pull, DIFFFORCE_BAD_GRID, "wall");
    WITH(sigma_knots = falling, DIFFFORCE_BAD_GRID, "sigma_knots");
    p = internal_problem();
    p.n_atoms = 4;
    p.n_frames = 1;
    p.kind = four;
    p.atoms = torsion;
    FAILS(DIFFFORCE_BAD_GRID, "torsion", internal(&p, x, sigma));
    p = internal_problem();
    sigma[1] = 0.2;
    FAILS(DIFFFORCE_OUT_OF_RANGE, "sigma", internal(&p, x, sigma));
    sigma[1] = 0.1;
    x[9] = x[12] = NAN;
    FAILS(DIFFFORCE_NOT_FINITE, "x", internal(&p, x, sigma));
    x[9] = x[12] = 1.0; /* atoms 0 and 1 of frame 1 coincide */
    FAILS(DIFFFORCE_NOT_FINITE, "coincident", internal(&p, x, sigma));
    FAILS(DIFFFORCE_NOT_FINITE, "coincident",
          diffforce_internal_action_hvp(&p, x, sigma, x, sigma, grad, d_sigma));
    FAILS(DIFFFORCE_NOT_FINITE, "coincident", diffforce_internal_normal(&p, x, x, 2, a, b, lap));
    memcpy(x, positions, sizeof x);
    coef[2] = NAN;
    FAILS(DIFFFORCE_NOT_FINITE, "coefficients", internal(&p, x, sigma));
    p = internal_problem();
    CHECK(diffforce_internal_action_hvp(&p, x, sigma, x, sigma, grad, d_sigma) == DIFFFORCE_OK);
    FAILS(DIFFFORCE_NULL_POINTER, "problem",
          diffforce_internal_action_hvp(NULL, x, sigma, x, sigma, grad, d_sigma));
    FAILS(DIFFFORCE_NULL_POINTER, "v_x",
          diffforce_internal_action_hvp(&p, x, sigma, NULL, sigma, grad, d_sigma));
    FAILS(DIFFFORCE_NULL_POINTER, "h_sigma",
          diffforce_internal_action_hvp(&p, x, sigma, x, sigma, grad, NULL));
    p.n_atoms = 0;
    FAILS(DIFFFORCE_BAD_SHAPE, "n_atoms",
          diffforce_internal_action_hvp(&p, x, sigma, x, sigma, grad, d_sigma));
    p = internal_problem();
    p.dtype = 7;
    FAILS(DIFFFORCE_BAD_DTYPE, "dtype",
          diffforce_internal_action_hvp(&p, x, sigma, x, sigma, grad, d_sigma));
    p = internal_problem();
    FAILS(DIFFFORCE_NULL_POINTER, "problem", diffforce_internal_normal(NULL, x, x, 1, a, b, lap));
    FAILS(DIFFFORCE_NULL_POINTER, "target", diffforce_internal_normal(&p, x, NULL, 1, a, b, lap));
    FAILS(DIFFFORCE_NULL_POINTER, "lap", diffforce_internal_normal(&p, x, x, 1, a, b, NULL));
    FAILS(DIFFFORCE_BAD_SHAPE, "n_threads", diffforce_internal_normal(&p, x, x, -1, a, b, lap));
    p.dtype = DIFFFORCE_FLOAT32;
    FAILS(DIFFFORCE_BAD_DTYPE, "float64", diffforce_internal_normal(&p, x, x, 1, a, b, lap));
    p = internal_problem();
    p.cls = other;
    FAILS(DIFFFORCE_BAD_INDEX, "cls", diffforce_internal_normal(&p, x, x, 1, a, b, lap));
    p = internal_problem();
    double target[F * N * 3] = {0};
    target[3] = INFINITY;
    FAILS(DIFFFORCE_NOT_FINITE, "target", diffforce_internal_normal(&p, x, target, 1, a, b, lap));
    static const int64_t huge[2] = {0, ((int64_t)1 << 20) + 1};
    p.offsets = huge;
    FAILS(DIFFFORCE_BAD_SHAPE, "2^20", diffforce_internal_normal(&p, x, x, 1, a, b, lap));
#if !defined(__SANITIZE_ADDRESS__) /* it ends the process where memory ends */
    static const int64_t large[2] = {0, (int64_t)1 << 20}; /* 8 TiB, seen before a is touched */
    p.offsets = large;
    struct rlimit before, tight;
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    tight = before;
    tight.rlim_cur = (rlim_t)1 << 32;
    CHECK(setrlimit(RLIMIT_AS, &tight) == 0);
    FAILS(DIFFFORCE_NO_MEMORY, "memory", diffforce_internal_normal(&p, x, x, 1, a, b, lap));
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
#endif
}

/* A batch large enough for threads gives what single frames give; an error in any thread is seen.
 */
static void test_threads(void) {
    enum { FRAMES = 60000 };
    diffforce_pair_problem p = pair_problem();
    double* x = malloc(sizeof(double) * FRAMES * N * 3);
    double* sigma = malloc(sizeof(double) * FRAMES);
    double* lam = malloc(sizeof(double) * FRAMES);
    double* out = malloc(sizeof(double) * FRAMES * (N * 3 + 3));
    for (int f = 0; f < FRAMES; ++f) {
        memcpy(x + f * N * 3, positions + (f % 2) * N * 3, sizeof(double) * N * 3);
        sigma[f] = sigmas[f % 2];
        lam[f] = lams[f % 2];
    }
    CHECK(pair(&p, positions, sigmas, lams, NULL) == DIFFFORCE_OK);
    p.n_frames = FRAMES;
    CHECK(diffforce_set_num_threads(3) == DIFFFORCE_OK);
    double* rest = out + FRAMES;
    CHECK(diffforce_pair_operator(&p, x, sigma, lam, NULL, out, rest, rest + FRAMES * N * 3,
                                  rest + FRAMES * (N * 3 + 1)) == DIFFFORCE_OK);
    for (int f = 0; f < FRAMES; ++f)
        if (out[f] != value[f % 2]) {
            CHECK(out[f] == value[f % 2]);
            break;
        }
    sigma[FRAMES - 1] = NAN;
    FAILS(DIFFFORCE_OUT_OF_RANGE, "sigma",
          diffforce_pair_operator(&p, x, sigma, lam, NULL, out, rest, rest + FRAMES * N * 3,
                                  rest + FRAMES * (N * 3 + 1)));
    FAILS(DIFFFORCE_BAD_SHAPE, "n_threads", diffforce_set_num_threads(-1));
    CHECK(diffforce_set_num_threads(0) == DIFFFORCE_OK);
    free(x);
    free(sigma);
    free(lam);
    free(out);
}

int main(void) {
    CHECK(strlen(diffforce_version()) > 0);
    test_pair_value();
    test_pair_float();
    test_pair_errors();
    test_internal();
    test_internal_errors();
    test_threads();
    /* there is no LibTorch in this process */
    FAILS(DIFFFORCE_NO_TORCH, "LibTorch", diffforce_torch_register());
    if (failures == 0) printf("all checks of the C interface passed\n");
    return failures == 0 ? 0 : 1;
}
