"""Delta f by posterior MD, against Gaussian ends where every work is known; and what must fail."""

import json
import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_diffforce.alchemy import EndStatePair
from openmm_diffforce.audit import SPOT_GATES, audit_bridge, judge, spot_check
from openmm_diffforce.bridge import BridgeResult, noisy_operator_bridge
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.errors import IncompatibleSystemError, InputError
from openmm_diffforce.estimate import bar_between
from openmm_diffforce.posterior import restrained_system
from openmm_diffforce.posterior_bridge import posterior_operators, run_posterior_bridge
from openmm_diffforce.posterior_work import PosteriorBridge, bridge_from_posteriors, spread_lams
from openmm_diffforce.testing import HarmonicEndStates
from openmm_diffforce.units import thermal_energy

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
SIGMA = 0.02
ENDS = HarmonicEndStates((2000.0, 1000.0), (0.0, 0.04), 3)
LAMS = (0.0, 0.5, 1.0)


def spring(stiffness: float, centre: float, n_atoms: int) -> openmm.System:
    """Atom 0 in a harmonic well; further atoms in the same well at both ends."""
    system = openmm.System()
    for atom in range(n_atoms):
        system.addParticle(12.0)
        well = openmm.CustomExternalForce("k/2*((x-m)^2+(y-m)^2+(z-m)^2)")
        well.addPerParticleParameter("k")
        well.addPerParticleParameter("m")
        values = (stiffness, centre) if atom == 0 else (1500.0, 0.5)
        well.addParticle(atom, [KT * values[0], values[1]])
        system.addForce(well)
    return system


def pair_of(n_atoms: int = 1) -> EndStatePair:
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for _ in range(n_atoms):
        topology.addAtom("C", app.element.carbon, residue)
    systems = [spring(k, m, n_atoms) for k, m in zip(ENDS.stiffness, ENDS.centre, strict=True)]
    return EndStatePair(*systems, topology, TEMPERATURE)


def exact_work(y: np.ndarray) -> np.ndarray:
    """Delta S(y) of the noised Gaussian ends, y [n, 3]."""
    s = [
        0.5 * ((y - m) ** 2).sum(1) / (1 / k + SIGMA**2) + 1.5 * math.log1p(k * SIGMA**2)
        for k, m in zip(ENDS.stiffness, ENDS.centre, strict=True)
    ]
    return s[1] - s[0]


def posterior(y: np.ndarray, lam: float) -> tuple[np.ndarray, float]:
    """Mean [n, 3] and precision of p_lam(x|y)."""
    (k_0, k_1), (m_0, m_1) = ENDS.stiffness, ENDS.centre
    precision = (1 - lam) * k_0 + lam * k_1 + SIGMA**-2
    return ((1 - lam) * k_0 * m_0 + lam * k_1 * m_1 + y / SIGMA**2) / precision, precision


def exact_operator(y: np.ndarray, lam: float) -> np.ndarray:
    """E_lam[O|y]."""
    mean, precision = posterior(y, lam)
    s = [
        0.5 * k * (((mean - m) ** 2).sum(1) + 3 / precision)
        for k, m in zip(ENDS.stiffness, ENDS.centre, strict=True)
    ]
    return s[1] - s[0]


def noised(end: int, n: int, generator: np.random.Generator) -> np.ndarray:
    return ENDS.sample(end, n, generator) + SIGMA * generator.standard_normal((n, 3))


def drawn(y: np.ndarray, lams: tuple[float, ...], n: int, generator: np.random.Generator) -> np.ndarray:
    """O on exact samples of the posteriors, [n_y, n_lams, n]."""
    out = []
    for lam in lams:
        mean, precision = posterior(y, lam)
        x = mean[:, None] + generator.standard_normal((len(y), n, 3)) / math.sqrt(precision)
        out.append(ENDS.action(1, x) - ENDS.action(0, x))
    return np.stack(out, axis=1)


# ------------------------------------------------------------------------------ works and BAR


def test_the_oracle_is_consistent():
    """d Delta S = int O_lam dlam, and BAR with the exact works gives Delta f."""
    generator = np.random.default_rng(0)
    y = noised(0, 5, generator)
    lam = np.linspace(0, 1, 2001)
    o = np.array([exact_operator(y, v) for v in lam])
    np.testing.assert_allclose(np.trapezoid(o, lam, axis=0), exact_work(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("work", "n_y"), [("bar", 60), ("tweedie", 60), ("density", 6)])
def test_works_are_the_exact_ones(work, n_y):
    generator = np.random.default_rng(1)
    y = [noised(end, n_y, generator) for end in (0, 1)]
    found = bridge_from_posteriors(*(drawn(v, LAMS, 200, generator) for v in y), LAMS, sigma=SIGMA, work=work)
    z = np.concatenate(
        [(w - exact_work(v)) / e for w, e, v in zip(found.work, found.d_works, y, strict=True)]
    )
    assert np.abs(z).max() < 4.5
    assert 0.5 < np.sqrt((z**2).mean()) < 1.5
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert np.concatenate(found.d_works).max() < 0.3
    assert set(found.closures) == {work, "tweedie"}
    for end in (0, 1):
        truth = np.stack([exact_operator(y[end], lam) for lam in LAMS], axis=1)
        z = (found.operator[end] - truth) / found.d_operator[end]
        assert np.sqrt((z**2).mean()) < 1.6


def test_delta_f_and_its_error_over_repeats():
    generator = np.random.default_rng(2)
    z = []
    for _ in range(40):
        o = [drawn(noised(end, 30, generator), LAMS, 40, generator) for end in (0, 1)]
        found = bridge_from_posteriors(*o, LAMS, sigma=SIGMA, work="tweedie")
        assert found.d_work < found.d_delta_f
        assert found.bound_lower - 4 * found.d_bound_lower < ENDS.delta_f
        assert found.bound_upper + 4 * found.d_bound_upper > ENDS.delta_f
        z.append((found.delta_f - ENDS.delta_f) / found.d_delta_f)
    assert abs(np.mean(z)) < 3.5 / math.sqrt(40)
    assert 0.7 < np.sqrt(np.mean(np.square(z))) < 1.35


def test_errors_of_the_works_are_seen():
    """Works with large errors: their part of the error grows, and BAR's bias is announced."""
    generator = np.random.default_rng(3)
    y = [noised(end, 400, generator) for end in (0, 1)]
    few = bridge_from_posteriors(
        *(drawn(v, LAMS, 40, generator) for v in y), LAMS, sigma=SIGMA, work="tweedie"
    )
    many = bridge_from_posteriors(
        *(drawn(v, LAMS, 1000, generator) for v in y), LAMS, sigma=SIGMA, work="tweedie"
    )
    assert few.d_work > 3 * many.d_work
    assert abs(few.noise_shift) > 3 * abs(many.noise_shift)
    assert abs(few.delta_f - many.delta_f) < 4 * few.d_work + 2 * abs(few.noise_shift)


def test_error_that_the_works_cause_in_bar():
    generator = np.random.default_rng(12)
    y = [noised(end, n, generator) for end, n in ((0, 30), (1, 60))]
    o = [drawn(v, LAMS, 40, generator) for v in y]
    found = bridge_from_posteriors(*o, LAMS, sigma=SIGMA, work="tweedie")
    moved = [
        bar_between(
            *(
                sign * (w + e * generator.standard_normal(len(w)))
                for sign, w, e in zip((1, -1), found.work, found.d_works, strict=True)
            ),
            decorrelate=False,
            min_overlap=0,
        ).delta_f
        for _ in range(400)
    ]
    assert found.d_work == pytest.approx(np.std(moved), rel=0.15)


def test_a_posterior_without_spread_is_plain_bar():
    """O that is certain given y (no noise): the work is O."""
    generator = np.random.default_rng(4)
    x = [ENDS.sample(end, 50, generator) for end in (0, 1)]
    o = [(ENDS.action(1, v) - ENDS.action(0, v))[:, None, None] * np.ones((1, 2, 20)) for v in x]
    found = bridge_from_posteriors(*o, (0, 1), sigma=1e-9)
    for work, value in zip(found.work, o, strict=True):
        np.testing.assert_allclose(work, value[:, 0, 0])
    assert found.d_work < 1e-9
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_spread_lams_crowd_where_the_operator_is_wide():
    generator = np.random.default_rng(5)
    density = fit_operator_density(
        [generator.gamma(2.0, 40 / (1 + 40 * lam), 1000) for lam in (0, 1)], inefficiency=(1, 1)
    )
    lams = spread_lams(density, 5)
    # V = 2 (40 / (1 + 40 lam))^2: the length is ln(1 + 40 lam)
    expected = (np.exp(np.linspace(0, math.log(41), 5)) - 1) / 40
    np.testing.assert_allclose(lams, expected, rtol=0.4, atol=1e-9)
    assert lams[0] == 0.0
    assert lams[-1] == 1.0
    with pytest.raises(InputError, match="at least 2"):
        spread_lams(density, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lams": (0.0, 0.5)}, "rise strictly from 0 to 1"),
        ({"lams": (0.0, 0.5, 0.5, 1.0)}, "rise strictly from 0 to 1"),
        ({"work": "trapezoid"}, "work: expected bar, density or tweedie"),
        ({"operators_0": np.zeros((4, 2, 40))}, r"operators_0: expected finite values of shape \(n_y, 3"),
        ({"operators_1": np.full((4, 3, 40), np.nan)}, "operators_1: expected finite"),
        ({"operators_1": "x"}, "operators_1: expected numbers"),
        ({"operators_0": np.zeros((4, 3, 19))}, "at least 20 independent samples"),
    ],
)
def test_bad_arrays(change, message):
    generator = np.random.default_rng(6)
    good = {"lams": LAMS, "work": "tweedie"} | {
        f"operators_{end}": drawn(noised(end, 4, generator), LAMS, 40, generator) for end in (0, 1)
    }
    given = good | change
    with pytest.raises(InputError, match=message):
        bridge_from_posteriors(
            given["operators_0"], given["operators_1"], given["lams"], sigma=SIGMA, work=given["work"]
        )


def test_correlated_samples_count_less():
    generator = np.random.default_rng(7)
    o = [np.repeat(drawn(noised(end, 4, generator), LAMS, 8, generator), 20, axis=2) for end in (0, 1)]
    with pytest.raises(InputError, match="with an inefficiency of"):
        bridge_from_posteriors(*o, LAMS, sigma=SIGMA)


# ---------------------------------------------------------------------------------------- MD

OPTIONS = {
    "lams": LAMS, "n_y": 16, "n_samples": 60, "interval": 10, "n_equil": 100, "timestep": 0.005,
    "friction": 20.0, "work": "tweedie", "seed": 3,
}  # fmt: skip


def frames_of(n: int, seed: int = 0, n_atoms: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    found = []
    for end in (0, 1):
        x = 0.5 + generator.standard_normal((n, n_atoms, 3)) / math.sqrt(1500.0)
        x[:, 0] = ENDS.sample(end, n, generator)
        found.append(x)
    return found


def test_md_gives_the_exact_operators():
    generator = np.random.default_rng(8)
    x = ENDS.sample(0, 6, generator)
    y = x + SIGMA * generator.standard_normal(x.shape)
    options = {**OPTIONS, "n_samples": 400}
    o, n_forces, n_energies = posterior_operators(
        pair_of(), x[:, None], y[:, None], SIGMA, LAMS,
        **{k: options[k] for k in ("n_samples", "interval", "n_equil", "timestep", "friction", "seed")},
    )  # fmt: skip
    assert o.shape == (6, 3, 400)
    truth = np.stack([exact_operator(y, lam) for lam in LAMS], axis=1)
    blocks = o.reshape(6, 3, 20, 20).mean(3)
    z = (o.mean(2) - truth) * math.sqrt(20) / blocks.std(2, ddof=1)
    assert np.abs(z).max() < 4.5
    assert np.sqrt((z**2).mean()) < 1.6
    steps = 6 * (3 * 400 * 10 + 2 * 100)
    assert steps < n_forces <= steps + 6 * 2 * 100  # and the minimizer's iterations
    assert n_energies == o.size


def test_delta_f_by_posterior_md():
    calls: list[tuple[int, int]] = []
    found = run_posterior_bridge(
        pair_of(), *frames_of(200), SIGMA * 10 * unit.angstrom, **OPTIONS,
        progress=lambda k, n: calls.append((k, n)),
    )  # fmt: skip
    assert abs(found.delta_f - ENDS.delta_f) < 3.5 * found.d_delta_f < 2.5
    assert found.overlap > 0.1
    assert found.sigma == pytest.approx(SIGMA)
    steps = 2 * 16 * (3 * 60 * 10 + 2 * 100)
    assert steps < found.n_forces <= steps + 32 * 2 * 100
    assert found.n_energies == 2 * 400 + 32 * 3 * 60
    assert calls == [(k, 32) for k in range(1, 33)]
    for o in found.operator:  # from lambda 0 to 1 for the y of either end
        assert (np.diff(o.mean(axis=0)) < 0).all()


def test_same_seed_same_number_and_lams_from_the_frames():
    options = OPTIONS | {"n_y": 2, "n_samples": 60, "n_equil": 10, "lams": 3}
    a, b, c = (
        run_posterior_bridge(pair_of(), *frames_of(100), SIGMA, **(options | {"seed": s})) for s in (1, 1, 2)
    )
    assert a.delta_f == b.delta_f != c.delta_f
    assert a.lams == b.lams
    assert len(a.lams) == 3


def test_atoms_without_noise_stay_where_they_are():
    """Noise on atom 0 alone: atom 1, constrained to atom 2, is fixed, and the answer is that of one atom."""
    pair = pair_of(n_atoms=3)
    x_0, x_1 = frames_of(100, n_atoms=3)
    for x in (x_0, x_1):
        x[:, 2] = x[:, 1] + [0.1, 0.0, 0.0]
    constrained = [pair.system_0, pair.system_1]
    for system in constrained:
        system.addConstraint(1, 2, 0.1)
    pair = EndStatePair(*constrained, pair.topology, TEMPERATURE)
    found = run_posterior_bridge(pair, x_0, x_1, SIGMA, atoms=[0], **OPTIONS)
    assert abs(found.delta_f - ENDS.delta_f) < 3.5 * found.d_delta_f < 2.5
    restrained, _ = restrained_system(pair.system_0, SIGMA, TEMPERATURE, atoms=[0])
    assert [restrained.getParticleMass(a)._value for a in range(3)] == [12.0, 0.0, 0.0]
    assert restrained.getNumConstraints() == 0
    with pytest.raises(IncompatibleSystemError, match="constrained"):
        run_posterior_bridge(pair, x_0, x_1, SIGMA, **OPTIONS)
    with pytest.raises(IncompatibleSystemError, match="constrained"):
        run_posterior_bridge(pair, x_0, x_1, SIGMA, atoms=[0, 1], **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": 1.0 * unit.kelvin}, "sigma"),
        ({"n_y": 1}, "n_y: expected at least 2"),
        ({"n_y": 51}, "n_y: expected no more than the"),
        ({"lams": (0.0, 0.5)}, "lams"),
        ({"lams": 1}, "lams"),
        ({"atoms": [0, 0]}, "atoms"),
        ({"atoms": [1]}, "atoms"),
        ({"atoms": []}, "atoms"),
        ({"n_samples": 0}, "n_samples"),
        ({"interval": 0}, "interval"),
        ({"n_equil": -1}, "n_equil"),
        ({"seed": -1}, "seed"),
        ({"frames_0": np.zeros((50, 2, 3))}, "frames_0"),
    ],
)
def test_bad_input(change, message):
    x_0, x_1 = frames_of(50)
    given = {"frames_0": x_0, "frames_1": x_1, "sigma": SIGMA, **OPTIONS, **change}
    with pytest.raises(InputError, match=message):
        run_posterior_bridge(pair_of(), **given)


def test_a_barostat_is_refused_a_centre_of_mass_remover_is_dropped():
    system = pair_of().system_0
    system.addForce(openmm.CMMotionRemover())
    restrained, _ = restrained_system(system, SIGMA, TEMPERATURE)
    assert "CMMotionRemover" not in {f.getName() for f in restrained.getForces()}
    system.addForce(openmm.MonteCarloBarostat(1.0, TEMPERATURE))
    with pytest.raises(InputError, match="constant volume"):
        restrained_system(system, SIGMA, TEMPERATURE)


def test_one_start_per_frame():
    x = frames_of(3)[0]
    with pytest.raises(InputError, match="one start for every noised frame"):
        posterior_operators(pair_of(), x, x[:2], SIGMA, LAMS)


# -------------------------------------------------------------------------------- spot check


@pytest.fixture(scope="module")
def bridge() -> BridgeResult:
    generator = np.random.default_rng(9)
    x = [ENDS.sample(end, 400, generator) for end in (0, 1)]
    o = [ENDS.action(1, v) - ENDS.action(0, v) for v in x]
    return noisy_operator_bridge(
        x, o, generator=generator, inefficiency=(1, 1), sigmas=(0.01, 0.02), n_bootstrap=0
    )


@pytest.fixture(scope="module")
def spot() -> PosteriorBridge:
    generator = np.random.default_rng(10)
    o = [drawn(noised(end, 150, generator), LAMS, 60, generator) for end in (0, 1)]
    found = bridge_from_posteriors(*o, LAMS, sigma=SIGMA, work="tweedie")
    return replace(found, closures={"density": found.delta_f + 0.01, **found.closures})


def statuses(found: BridgeResult, spot: PosteriorBridge) -> dict[str, str]:
    return {g.name: g.status for g in spot_check(found, spot)}


def test_a_good_bridge_passes_its_spot_check(bridge, spot):
    assert set(statuses(bridge, spot)) == set(SPOT_GATES)
    assert set(statuses(bridge, spot).values()) == {"PASS"}
    own = audit_bridge(bridge).gates
    assert audit_bridge(bridge, spot=spot).gates == (*own, *spot_check(bridge, spot))


@pytest.mark.parametrize("shift", [-2.5, 2.5])
def test_a_biased_bridge_fails(bridge, spot, shift):
    wrong = replace(bridge, delta_f=bridge.delta_f + shift)
    assert statuses(wrong, spot)["posterior MD: Delta f [kT]"] == "FAIL"


def test_the_bias_is_seen_from_both_ends_without_bar(bridge, spot):
    """Even when BAR of the spot check fails in the same way, the mean works of the ends do not."""
    name = "posterior MD: Delta f outside the mean works [kT]"
    for value in (spot.bound_upper + 3.0, spot.bound_lower - 3.0):
        wrong = replace(bridge, delta_f=value)
        assert statuses(wrong, replace(spot, delta_f=value))[name] == "FAIL"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"d_delta_f": 2.0}, "stated error [kT]"),
        ({"overlap": 0.01}, "overlap of the noised ends"),
        ({"closures": {"density": 0.0, "tweedie": 1.1}}, "work by two closures [kT]"),
    ],
)
def test_a_blind_spot_check_fails(bridge, spot, change, name):
    assert statuses(bridge, replace(spot, **change))[f"posterior MD: {name}"] == "FAIL"


@pytest.mark.parametrize("name", SPOT_GATES)
def test_every_gate_has_three_answers(name):
    gate = SPOT_GATES[name]
    beyond = gate.bad / 2 if gate.larger_is_better else 2 * gate.bad
    values = (gate.good, 0.5 * (gate.good + gate.bad), beyond, math.nan)
    assert [judge(name, v, gates=SPOT_GATES).status for v in values] == ["PASS", "WARN", "FAIL", "FAIL"]


def test_real_works_of_another_pair_fail(bridge):
    """A spot check whose works are 3 kT off, from the samples on."""
    generator = np.random.default_rng(11)
    o = [drawn(noised(end, 150, generator), LAMS, 60, generator) + 3.0 for end in (0, 1)]
    wrong = bridge_from_posteriors(*o, LAMS, sigma=SIGMA, work="tweedie")
    assert statuses(bridge, wrong)["posterior MD: Delta f [kT]"] == "FAIL"
