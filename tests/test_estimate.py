import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from openmm_diffforce import estimate as e
from openmm_diffforce.errors import (
    ConvergenceError,
    InputError,
    PoorOverlapError,
    UnitsError,
)
from openmm_diffforce.record import plain

STIFFNESS = np.linspace(1.0, 6.0, 5)
LAMBDAS = np.linspace(0.0, 1.0, 5)
EXACT = 0.5 * math.log(6.0)


def harmonic_tables(
    seed: int, n: int = 400, *, shift: float = 0.3, correlation: float = 0.0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """u_k = 1/2 k (x - shift k)^2 sampled exactly, or as a first-order process of that marginal."""
    rng = np.random.default_rng(seed)
    centres = shift * np.arange(5)
    us, slopes, index = [], [], []
    for k in range(5):
        noise = rng.normal(size=n)
        z = np.empty(n)
        z[0] = noise[0]
        for i in range(1, n):
            z[i] = correlation * z[i - 1] + math.sqrt(1 - correlation**2) * noise[i]
        x = centres[k] + z / math.sqrt(STIFFNESS[k])
        us.append(0.5 * STIFFNESS * (x[:, None] - centres) ** 2)
        d = x - centres[k]
        # d/dlambda along stiffness 1 + 5 lambda and centre 4 shift lambda.
        slopes.append(0.5 * 5.0 * d**2 - STIFFNESS[k] * d * 4 * shift)
        index += [(0.1 * i, LAMBDAS[k]) for i in range(n)]
    multi = pd.MultiIndex.from_tuples(index, names=["time", "lambdas"])
    u_nk = pd.DataFrame(np.concatenate(us), index=multi, columns=list(LAMBDAS))
    dhdl = pd.DataFrame(np.concatenate(slopes), index=multi, columns=["dHdl"])
    for table in (u_nk, dhdl):
        table.attrs = {"temperature": 300.0, "energy_unit": "kT"}
    return u_nk, dhdl


def test_mbar_and_bar_are_exact_within_their_errors() -> None:
    z = {"MBAR": [], "BAR": []}
    for seed in range(30):
        u_nk, _ = harmonic_tables(seed)
        found = e.estimate_free_energy(u_nk, decorrelate=False)
        for name in z:
            one = found.estimates[name]
            z[name].append((one.delta_f - EXACT) / one.d_delta_f)
    for name, scores in z.items():
        # Mean of 30 standard scores: 0 +- 0.18; their spread says whether the error is right.
        assert abs(np.mean(scores)) < 0.6, name
        assert 0.65 < np.std(scores) < 1.4, name


def test_ti_is_exact_up_to_the_trapezoid() -> None:
    u_nk, dhdl = harmonic_tables(1, n=4000)
    found = e.estimate_free_energy(u_nk, dhdl)
    # <dH/dl> = 5 / (2 (1 + 5 l)); what the rule makes of exact means, shifts drop out.
    exact = np.trapezoid(2.5 / (1 + 5 * LAMBDAS), LAMBDAS)
    ti = found.estimates["TI"]
    assert abs(ti.delta_f - exact) < 4 * ti.d_delta_f
    from alchemlyb.estimators import TI

    theirs = TI().fit(dhdl)
    ours = e.estimate_free_energy(u_nk, dhdl, decorrelate=False).estimates["TI"]
    assert ours.delta_f == pytest.approx(theirs.delta_f_.loc[0.0, 1.0])
    assert ours.d_delta_f == pytest.approx(theirs.d_delta_f_.loc[0.0, 1.0])
    assert found.dhdl[:, 0] == pytest.approx(2.5 / (1 + 5 * LAMBDAS), abs=0.2)
    assert found.d_dhdl.shape == (5, 1)


def test_result_is_complete_and_json() -> None:
    u_nk, dhdl = harmonic_tables(2)
    found = e.estimate_free_energy(u_nk, dhdl)
    assert np.allclose(found.overlap.sum(axis=1), 1.0)
    assert found.min_overlap == found.neighbour_overlap.min() > 0.03
    assert found.f_k[-1] == found.delta_f
    assert (found.n_effective <= found.n_frames.sum() + 1e-9).all()
    value, error = found.to("kJ/mol")
    assert value == pytest.approx(found.delta_f * 2.494339, rel=1e-6)
    assert found.to("kcal/mol")[1] == pytest.approx(error / 4.184)
    text = json.dumps(plain(found.to_dict()), allow_nan=False)
    assert json.loads(text)["estimates"]["BAR"]["kT"]["value"] == found.estimates["BAR"].delta_f
    with pytest.raises(UnitsError, match="energy_unit"):
        found.to("eV")


def test_decorrelation_finds_the_correlation() -> None:
    u_nk, dhdl = harmonic_tables(3, n=4000, correlation=0.9)
    raw = e.estimate_free_energy(u_nk, dhdl, decorrelate=False)
    found = e.estimate_free_energy(u_nk, dhdl)
    # g of the process itself is (1 + 0.9)/(1 - 0.9) = 19, that of its square 9.5.
    assert (found.inefficiency > 5).all()
    assert (found.inefficiency < 40).all()
    assert found.delta_f == raw.delta_f
    assert found.d_delta_f > 2 * raw.d_delta_f
    assert abs(found.delta_f - EXACT) < 4 * found.d_delta_f


def test_errors_of_correlated_frames_are_calibrated() -> None:
    z = {"MBAR": [], "BAR": []}
    for seed in range(25):
        u_nk, _ = harmonic_tables(seed, n=1000, correlation=0.8)
        found = e.estimate_free_energy(u_nk)
        for name in z:
            one = found.estimates[name]
            z[name].append((one.delta_f - EXACT) / one.d_delta_f)
    for name, scores in z.items():
        assert abs(np.mean(scores)) < 0.7, name
        assert 0.55 < np.std(scores) < 1.4, name


def test_errors_without_correlation_are_pymbars() -> None:
    from pymbar import MBAR

    u_nk, _ = harmonic_tables(3)
    attrs = u_nk.attrs
    u_nk = u_nk.iloc[150:]
    u_nk.attrs = attrs
    found = e.estimate_free_energy(u_nk, decorrelate=False)
    n_k = np.array([250, 400, 400, 400, 400])
    mbar = MBAR(u_nk.to_numpy().T, n_k, solver_protocol="robust")
    theirs = mbar.compute_free_energy_differences()
    assert np.allclose(found.f_k, theirs["Delta_f"][0], atol=1e-6)
    assert np.allclose(found.d_f_k, theirs["dDelta_f"][0], rtol=0.05)
    assert np.allclose(found.overlap, mbar.compute_overlap()["matrix"], atol=1e-6)


def test_order_of_rows_does_not_matter() -> None:
    u_nk, dhdl = harmonic_tables(4, correlation=0.5)
    order = np.random.default_rng(0).permutation(len(u_nk))
    a, b = e.estimate_free_energy(u_nk, dhdl), e.estimate_free_energy(u_nk.iloc[order], dhdl.iloc[order])
    assert a.delta_f == pytest.approx(b.delta_f, abs=1e-9)
    assert a.estimates["TI"].delta_f == pytest.approx(b.estimates["TI"].delta_f, abs=1e-12)
    assert np.array_equal(a.inefficiency, b.inefficiency)


def test_two_lambdas() -> None:
    u_nk, dhdl = harmonic_tables(5)
    both = {lam: (min(1.0, 2 * lam), max(0.0, 2 * lam - 1)) for lam in LAMBDAS}
    index = pd.MultiIndex.from_tuples(
        [(t, *both[lam]) for t, lam in u_nk.index], names=["time", "a-lambda", "b-lambda"]
    )
    two = u_nk.set_axis(index)
    two.columns = pd.Index([both[lam] for lam in LAMBDAS], tupleize_cols=False)
    two.attrs = dict(u_nk.attrs)
    assert e.estimate_free_energy(two).delta_f == pytest.approx(e.estimate_free_energy(u_nk).delta_f)
    slopes = pd.DataFrame({"a": dhdl["dHdl"].to_numpy() / 2, "b": dhdl["dHdl"].to_numpy() / 2},
                          index=index)  # fmt: skip
    slopes.attrs = dict(u_nk.attrs)
    assert e.estimate_free_energy(two, slopes).dhdl.shape == (5, 2)
    assert e.estimate_free_energy(two, slopes).estimates["TI"].delta_f == pytest.approx(
        e.estimate_free_energy(u_nk, dhdl).estimates["TI"].delta_f
    )


def test_states_that_do_not_meet_are_refused() -> None:
    u_nk, _ = harmonic_tables(6, shift=6.0)
    with pytest.raises(PoorOverlapError, match="expected an overlap"):
        e.estimate_free_energy(u_nk)
    # Who insists gets the confident wrong number that the gate is there for.
    assert math.isfinite(e.estimate_free_energy(u_nk, min_overlap=0.0).delta_f)


def test_unsampled_states_are_left_out() -> None:
    u_nk, _ = harmonic_tables(7)
    part = u_nk[u_nk.index.get_level_values("lambdas") != 0.5]
    part.attrs = dict(u_nk.attrs)
    found = e.estimate_free_energy(part)
    assert found.states == (0.0, 0.25, 0.75, 1.0)
    assert abs(found.delta_f - EXACT) < 5 * found.d_delta_f


def broken(kind: str) -> tuple[object, object]:
    u_nk, dhdl = harmonic_tables(8, n=50)
    if kind == "type":
        return u_nk.to_numpy(), None
    if kind == "no attrs":
        u_nk.attrs = {}
    elif kind == "unit":
        u_nk.attrs["energy_unit"] = "kJ/mol"
    elif kind == "temperature":
        u_nk.attrs["temperature"] = -3.0
    elif kind == "other attrs":
        dhdl.attrs["temperature"] = 310.0
    elif kind == "nan":
        u_nk.iloc[3, 1] = np.nan
    elif kind == "index":
        u_nk = u_nk.reset_index(level="time", drop=True)
        u_nk.attrs = dict(dhdl.attrs)
    elif kind == "column":
        u_nk = u_nk.drop(columns=[0.25])
        u_nk.attrs = dict(dhdl.attrs)
    elif kind == "other frames":
        dhdl = dhdl.iloc[::2]
        dhdl.attrs = dict(u_nk.attrs)
    elif kind == "dhdl nan":
        dhdl.iloc[0, 0] = np.inf
    elif kind == "one state":
        u_nk, dhdl = u_nk.iloc[:50], None
        u_nk.attrs = {"temperature": 300.0, "energy_unit": "kT"}
    elif kind == "empty":
        u_nk = u_nk.iloc[:0]
        u_nk.attrs = dict(dhdl.attrs)
    return u_nk, dhdl


@pytest.mark.parametrize(
    ("kind", "error", "word"),
    [
        ("type", InputError, "DataFrame"),
        ("no attrs", UnitsError, "attrs"),
        ("unit", UnitsError, "to_kT"),
        ("temperature", UnitsError, "temperature"),
        ("other attrs", UnitsError, "different runs"),
        ("nan", InputError, "finite"),
        ("index", InputError, "index"),
        ("column", InputError, "column for every"),
        ("other frames", InputError, "one run"),
        ("dhdl nan", InputError, "finite"),
        ("one state", InputError, "two states"),
        ("empty", InputError, "frames in at least two"),
    ],
)
def test_malformed_tables_are_refused(kind: str, error: type, word: str) -> None:
    u_nk, dhdl = broken(kind)
    with pytest.raises(error, match=word):
        e.estimate_free_energy(u_nk, dhdl)


def test_too_few_frames_are_refused() -> None:
    u_nk, _ = harmonic_tables(9, n=8)
    with pytest.raises(ConvergenceError, match="at least 10 frames"):
        e.estimate_free_energy(u_nk)
    u_nk, _ = harmonic_tables(9, n=60, correlation=0.97)
    with pytest.raises(ConvergenceError, match="independent frames"):
        e.estimate_free_energy(u_nk)


def test_combine_refuses_what_does_not_belong_together() -> None:
    (a, _), (b, _) = harmonic_tables(10, n=20), harmonic_tables(11, n=20)
    assert len(e.combine_tables([a, b])) == 200
    assert e.combine_tables([a, b]).attrs == a.attrs
    b.attrs["temperature"] = 310.0
    with pytest.raises(UnitsError, match="equal attrs"):
        e.combine_tables([a, b])
    c = a.drop(columns=[0.25])
    c.attrs = dict(a.attrs)
    with pytest.raises(InputError, match="states"):
        e.combine_tables([a, c])
    with pytest.raises(InputError, match="at least one"):
        e.combine_tables([])


def test_parquet_round_trip(tmp_path: Path) -> None:
    u_nk, _ = harmonic_tables(12, n=20)
    u_nk.to_parquet(tmp_path / "u.parquet")
    pd.testing.assert_frame_equal(e.read_table(tmp_path / "u.parquet"), u_nk)
    u_nk.attrs = {}
    u_nk.to_parquet(tmp_path / "v.parquet")
    with pytest.raises(UnitsError, match="attrs"):
        e.read_table(tmp_path / "v.parquet")
    (tmp_path / "w.parquet").write_text("no")
    with pytest.raises(InputError, match="parquet"):
        e.read_table(tmp_path / "w.parquet")


def gaussian_works(seed: int, n_0: int, n_1: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """u_0 = x^2/2, u_1 = 2 (x - shift)^2 + 1: Delta f = ln 2 + 1."""
    rng = np.random.default_rng(seed)
    x_0, x_1 = rng.normal(size=n_0), shift + rng.normal(size=n_1) / 2
    w = lambda x: 2 * (x - shift) ** 2 + 1 - x**2 / 2  # noqa: E731
    return w(x_0), -w(x_1)


def exact_overlap(shift: float) -> float:
    x = np.linspace(-10, 10 + shift, 40001)
    p_0 = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    p_1 = np.exp(-2 * (x - shift) ** 2) * 2 / math.sqrt(2 * math.pi)
    return float(np.trapezoid(2 * p_0 * p_1 / (p_0 + p_1), x))


def test_bar_and_its_overlap_are_exact_within_their_errors() -> None:
    z, z_overlap = [], []
    for seed in range(40):
        found = e.bar_between(*gaussian_works(seed, 600, 300, 0.7), decorrelate=False)
        z.append((found.delta_f - math.log(2) - 1) / found.d_delta_f)
        z_overlap.append((found.overlap - exact_overlap(0.7)) / found.d_overlap)
    assert abs(np.mean(z)) < 0.5
    assert 0.7 < np.std(z) < 1.35
    # The overlap's error leaves out that of Delta f, to which A is nearly stationary.
    assert abs(np.mean(z_overlap)) < 0.6
    assert 0.4 < np.std(z_overlap) < 1.5


def test_bar_agrees_with_pymbar() -> None:
    from pymbar import bar

    works = gaussian_works(1, 500, 200, 0.7)
    theirs = bar(*works)
    ours = e.bar_between(*works, decorrelate=False)
    assert ours.delta_f == pytest.approx(theirs["Delta_f"], abs=1e-6)
    assert ours.d_delta_f == pytest.approx(theirs["dDelta_f"], rel=1e-3)


def test_bar_without_overlap_is_refused() -> None:
    works = gaussian_works(2, 500, 500, 8.0)
    with pytest.raises(PoorOverlapError, match="overlap A"):
        e.bar_between(*works)
    assert math.isfinite(e.bar_between(*works, min_overlap=0.0).delta_f)
    # Thousands of kT apart nothing overflows.
    with pytest.raises(PoorOverlapError):
        e.bar_between(np.full(50, 5e4), np.full(50, 7e4))


@pytest.mark.parametrize("bad", [[1.0], [[1.0, 2.0]], [1.0, np.nan], ["a", "b"]])
def test_bad_works_are_refused(bad: list) -> None:
    with pytest.raises(InputError, match="work_forward"):
        e.bar_between(bad, [1.0, 2.0])
    with pytest.raises(InputError, match="work_reverse"):
        e.bar_between([1.0, 2.0], bad)


def test_end_correction_signs() -> None:
    learned = e.Estimate("MBAR", 5.0, 0.1, 300.0)
    w_0, w_1 = ([0.5, 0.5], [-0.5, -0.5]), ([2.0, 2.0], [-2.0, -2.0])
    found = e.end_correction(learned, work_0=w_0, work_1=w_1)
    assert found.corrected.delta_f == pytest.approx(5.0 + 2.0 - 0.5)
    assert found.min_overlap == pytest.approx(1.0)
    assert e.end_correction(learned).corrected.delta_f == 5.0
    only = e.end_correction(learned, work_1=w_1)
    assert only.correction_0 is None
    assert only.corrected.delta_f == pytest.approx(7.0)
    json.dumps(only.to_dict())
    with pytest.raises(PoorOverlapError, match="end state 1"):
        e.end_correction(learned, work_1=(np.full(50, 40.0), np.full(50, 40.0)))
    with pytest.raises(InputError, match="work_0"):
        e.end_correction(learned, work_0=(1.0,))
    with pytest.raises(InputError, match="learned"):
        e.end_correction(5.0)


def test_end_correction_recovers_the_classical_difference() -> None:
    # Learned ends: stiffness 1.1 and 5.5 instead of 1 and 6.
    z = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        works = []
        for learned, classical in ((1.1, 1.0), (5.5, 6.0)):
            x_l, x_c = rng.normal(size=(2, 300)) / np.sqrt([[learned], [classical]])
            d = 0.5 * (classical - learned)
            works.append((d * x_l**2, -d * x_c**2))
        start = e.Estimate("MBAR", 0.5 * math.log(5.5 / 1.1), 0.0, 300.0)
        found = e.end_correction(start, work_0=works[0], work_1=works[1])
        z.append((found.corrected.delta_f - EXACT) / found.corrected.d_delta_f)
        assert found.min_overlap > 0.9
    assert abs(np.mean(z)) < 0.6
    assert 0.6 < np.std(z) < 1.5


def test_reweighting_to_other_ends() -> None:
    z = []
    for seed in range(20):
        u_nk, _ = harmonic_tables(seed, shift=0.0)
        # x^2 back from the energies; targets of stiffness 1, 6, 1.1, 5.
        x2 = 2 * u_nk[0.0].to_numpy()
        targets = 0.5 * x2[:, None] * np.array([1.0, 6.0, 1.1, 5.0])
        found = e.reweight(u_nk, targets, decorrelate=False)
        exact = 0.5 * np.log([1.0, 6.0, 1.1, 5.0])
        value, error = found.contrast([-1, 0, 0, 1])
        z.append((value - exact[3]) / error)
        assert np.allclose(found.f, exact, atol=0.2)
    assert abs(np.mean(z)) < 0.8
    assert 0.5 < np.std(z) < 1.6
    # Paired: the difference of differences is far better known than either.
    value, paired = found.contrast([1, -1, -1, 1])
    assert value == pytest.approx(exact[3] - exact[2] - exact[1], abs=4 * paired)
    assert paired < 0.3 * error
    with pytest.raises(InputError, match="sum to 0"):
        found.contrast([1, 0, 0, 1])
    with pytest.raises(PoorOverlapError, match="effective"):
        e.reweight(u_nk, x2[:, None] * np.array([[0.5, 1e6]]))
    with pytest.raises(InputError, match="u_target"):
        e.reweight(u_nk, targets[:-1])


def test_errors_of_reweighting_are_pymbars() -> None:
    from pymbar import MBAR

    u_nk, _ = harmonic_tables(3, shift=0.0)
    x2 = 2 * u_nk[0.0].to_numpy()
    targets = 0.5 * x2[:, None] * np.array([0.8, 8.0, 3.0])
    found = e.reweight(u_nk, targets, decorrelate=False)
    mbar = MBAR(u_nk.to_numpy().T, np.full(5, 400), solver_protocol="robust")
    theirs = mbar.compute_perturbed_free_energies(targets.T)
    assert np.allclose(found.f, theirs["Delta_f"][0], atol=1e-6)
    for i, c in ((1, [-1, 1, 0]), (2, [-1, 0, 1])):
        assert found.contrast(c)[1] == pytest.approx(theirs["dDelta_f"][0, i], rel=0.05)


def test_standard_score() -> None:
    a, b = e.Estimate("a", 1.0, 0.0, 300.0), e.Estimate("b", 1.0, 0.0, 300.0)
    assert e.standard_score(a, b) == 0.0
    with pytest.raises(UnitsError):
        e.standard_score(a, e.Estimate("b", 1.0, 0.0, 310.0))


def test_the_module_does_not_pull_in_dynamics() -> None:
    code = (
        "import sys, openmm_diffforce.estimate as m, inspect;"
        "bad = [n for n in ('openmm_diffforce.systems', 'openmm_diffforce.windows', "
        "'openmm_diffforce.alchemy') if n in sys.modules];"
        "assert not bad, bad; assert 'import openmm' not in inspect.getsource(m)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
