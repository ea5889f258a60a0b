"""The density of the operator, held to ensembles whose Delta f is known exactly."""

import json
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from openmm_diffforce import density
from openmm_diffforce.density import OperatorDensity, fit_operator_density
from openmm_diffforce.errors import ConvergenceError, InputError
from openmm_diffforce.estimate import bar_between, estimate_free_energy, state_operators

ONES = (1.0, 1.0)


def gaussian(shift: float, n: int, generator: np.random.Generator) -> tuple[list[np.ndarray], float]:
    """S_0 = x^2/2, S_1 = (x + shift)^2/2: O is normal in both ends and Delta f is 0."""
    x = generator.standard_normal(n), generator.standard_normal(n) - shift
    return [shift * one + 0.5 * shift**2 for one in x], 0.0


def gamma(
    shape: float, scale: float, n: int, generator: np.random.Generator
) -> tuple[list[np.ndarray], float]:
    tilted = scale / (1 + scale)
    o = [generator.gamma(shape, scale, n), generator.gamma(shape, tilted, n)]
    return o, float(shape * np.log1p(scale))


def steric(sigma: float, n: int, generator: np.random.Generator) -> tuple[list[np.ndarray], float]:
    """(sigma/r)^12 switched on in a harmonic well."""
    r = np.linspace(0.2, 1.2, 100001)
    o = (sigma / r) ** 12
    weights = [np.exp(-50 * (r - 0.6) ** 2 - lam * o) for lam in (0.0, 1.0)]
    drawn = [o[np.searchsorted(np.cumsum(w) / w.sum(), generator.random(n))] for w in weights]
    return drawn, float(-np.log(weights[1].sum() / weights[0].sum()))


@pytest.mark.parametrize(
    ("case", "size"),
    [(gaussian, (2.0,)), (gaussian, (4.0,)), (gamma, (2.0, 20.0)), (gamma, (0.5, 3.0)), (steric, (0.7,))],
)
def test_exact_delta_f(case, size):
    generator = np.random.default_rng(1)
    o, exact = case(*size, 3000, generator)
    found = fit_operator_density(o, inefficiency=ONES)
    assert abs(found.delta_f - exact) < 3 * found.d_delta_f < 0.5
    assert (found.chi2 < 2).all()


def test_the_error_covers_what_happens():
    """Thirty repeats of a hard case: about two thirds within one error, nearly all within two."""
    generator = np.random.default_rng(2)
    z = []
    with mock.patch.multiple(density, STRETCHES=(4.0,), EDGES=()):
        for _ in range(30):
            o, exact = gamma(2.0, 20.0, 300, generator)
            found = fit_operator_density(o, inefficiency=ONES, n_lam=3)
            z.append((found.delta_f - exact) / found.d_delta_f)
    assert 12 <= (np.abs(z) < 1).sum() <= 28
    assert (np.abs(z) < 2).sum() >= 26
    assert (np.abs(z) < 0.2).sum() <= 15  # errors are not blown up either


def test_where_the_ends_overlap_it_is_bar():
    generator = np.random.default_rng(3)
    o, _ = gaussian(1.0, 4000, generator)
    found = fit_operator_density(o, inefficiency=ONES)
    bar = bar_between(o[0], -o[1], decorrelate=False)
    assert abs(found.delta_f - bar.delta_f) < 0.5 * bar.d_delta_f
    assert found.d_delta_f == pytest.approx(bar.d_delta_f, rel=0.25)


def test_the_gap_widens_the_error_and_a_window_closes_it():
    generator = np.random.default_rng(4)
    near, far = (fit_operator_density(gamma(2.0, s, 1000, generator)[0], inefficiency=ONES) for s in (5, 200))
    assert far.d_delta_f > 5 * near.d_delta_f
    o, exact = gamma(2.0, 200.0, 1000, generator)
    middle = generator.gamma(2.0, 200 / (1 + 0.03 * 200), 1000)
    three = fit_operator_density([o[0], middle, o[1]], (0.0, 0.03, 1.0), inefficiency=(1, 1, 1))
    assert three.d_delta_f < 0.5 * far.d_delta_f
    assert abs(three.delta_f - exact) < 3 * three.d_delta_f


def test_swapping_the_ends_changes_the_sign():
    o, _ = gamma(2.0, 20.0, 1000, np.random.default_rng(5))
    forward = fit_operator_density(o, inefficiency=ONES)
    reverse = fit_operator_density([-o[1], -o[0]], inefficiency=ONES)
    assert reverse.delta_f == pytest.approx(-forward.delta_f, abs=0.1 * forward.d_delta_f)


def test_the_curve_is_consistent():
    o, _ = gamma(2.0, 5.0, 2000, np.random.default_rng(6))
    found = fit_operator_density(o, inefficiency=ONES, n_lam=201)
    np.testing.assert_allclose(np.gradient(found.f_lam, found.lam)[2:-2], found.o_lam[2:-2], rtol=3e-3)
    assert (np.diff(found.o_lam) < 0).all()  # d<O>/dlambda = -Var
    assert found.f_lam[0] == 0
    assert found.d_f_lam[0] == 0
    np.testing.assert_allclose(found.o_lam[[0, -1]], [o[0].mean(), o[1].mean()], rtol=0.02)


def test_correlation_widens_the_error():
    o, _ = gaussian(2.0, 1000, np.random.default_rng(7))
    once = fit_operator_density(o, inefficiency=ONES)
    repeated = [np.repeat(one, 4) for one in o]
    assert fit_operator_density(repeated, inefficiency=(4, 4)).d_delta_f == pytest.approx(
        once.d_delta_f, rel=0.05
    )
    found = fit_operator_density(repeated)
    assert found.d_delta_f == pytest.approx(once.d_delta_f, rel=0.5)
    assert min(found.inefficiency) > 2


def test_ends_that_are_no_tilts_of_each_other_are_seen():
    generator = np.random.default_rng(8)
    o, _ = gaussian(1.5, 3000, generator)
    assert (fit_operator_density(o, inefficiency=ONES).chi2 < 1.6).all()
    wrong = [o[0], 0.5 * (o[1] - o[1].mean()) + o[1].mean()]  # end 1 sampled half as wide as it is
    assert fit_operator_density(wrong, inefficiency=ONES).chi2.max() > 3


def test_an_operator_that_is_a_constant():
    found = fit_operator_density([np.full(50, 2.5), np.full(50, 2.5)])
    assert (found.delta_f, found.d_delta_f) == (2.5, 0.0)


def test_a_record_for_json():
    o, _ = gaussian(1.0, 200, np.random.default_rng(9))
    found = fit_operator_density(o, n_lam=5)
    assert isinstance(found, OperatorDensity)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["delta_f"] == found.delta_f
    assert len(back["f_lam"]) == 5


GOOD = [np.linspace(0, 1, 100), np.linspace(-1, 0, 100)]


@pytest.mark.parametrize(
    ("operators", "lams", "options", "message"),
    [
        (GOOD, (0.0, 0.0), {}, "strictly increase"),
        (GOOD, (0.0, 1.5), {}, "within \\[0, 1\\]"),
        (GOOD, (0.0, 0.5, 1.0), {}, "one array for each of 3 lams, found 2"),
        ([GOOD[0], np.full(100, np.nan)], (0.0, 1.0), {}, "100 that are not finite"),
        ([GOOD[0], np.zeros((10, 10))], (0.0, 1.0), {}, "shape \\(10, 10\\)"),
        ([GOOD[0], ["a", "b"]], (0.0, 1.0), {}, "real numbers"),
        (GOOD, (0.0, 1.0), {"inefficiency": (0.5, 1.0)}, "numbers >= 1"),
        (GOOD, (0.0, 1.0), {"inefficiency": (1.0, 50.0)}, "independent frames at lambda 1"),
    ],
)
def test_bad_input(operators, lams, options, message):
    with pytest.raises(InputError, match=message):
        fit_operator_density(operators, lams, **options)


def test_no_mode_is_an_error_not_a_number():
    with (
        mock.patch.object(np.linalg, "solve", lambda a, b: np.full_like(b, np.nan)),
        pytest.raises(ConvergenceError, match="density of the operator: expected the posterior"),
    ):
        fit_operator_density(GOOD, inefficiency=ONES)


# ------------------------------------------------------------------------------ from tables


def linear_table(generator: np.random.Generator, lams: tuple[float, ...] = (0.0, 0.3, 1.0)) -> pd.DataFrame:
    """Harmonic wells 2 apart that mix linearly; rows shuffled, as alchemlyb allows."""
    rows = []
    for lam in lams:
        x = generator.normal(2.0 * lam, 1.0, 100)
        u = 0.5 * x[:, None] ** 2 + np.array(lams) * (2.0 - 2.0 * x[:, None])
        index = pd.MultiIndex.from_arrays([np.arange(100.0), np.full(100, lam)], names=["time", "lambda"])
        rows.append(pd.DataFrame(u, index=index, columns=list(lams)))
    table = pd.concat(rows).sample(frac=1.0, random_state=1)
    table.attrs = {"temperature": 310.0, "energy_unit": "kT"}
    return table


def test_operators_of_a_table():
    table = linear_table(np.random.default_rng(10))
    found = state_operators(table)
    np.testing.assert_allclose(found.lams, [0.0, 0.3, 1.0], atol=1e-12)
    assert found.temperature == 310.0
    for lam, o in zip(found.lams, found.operators, strict=True):
        rows = table[np.isclose(table.index.get_level_values("lambda"), lam)].sort_index()
        np.testing.assert_allclose(o, rows[1.0] - rows[0.0])
    density_of = fit_operator_density(found.operators, found.lams, inefficiency=(1, 1, 1))
    mbar = estimate_free_energy(table, decorrelate=False).estimates["MBAR"]
    assert abs(density_of.delta_f - mbar.delta_f) < 0.5 * mbar.d_delta_f
    assert density_of.d_delta_f == pytest.approx(mbar.d_delta_f, rel=0.15)


def test_a_table_that_does_not_mix_linearly_is_refused():
    table = linear_table(np.random.default_rng(11))
    table[0.3] += 0.01
    with pytest.raises(InputError, match=r"mix linearly.*column 0\.3; use MBAR"):
        state_operators(table)
