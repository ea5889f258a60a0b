"""Poses, rigid-body noise and reverse sampling, held to exact mixtures."""

import numpy as np
import pytest
from scipy.stats import kstest

from openmm_diffforce.docking import so3
from openmm_diffforce.docking.mixture import PoseMixture
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.rigid import (
    PosePrior,
    RigidSchedule,
    evaluate_scores,
    noise_between,
    noise_poses,
    scores_from_gradient,
)
from openmm_diffforce.docking.rigid_sampler import group_step, sample_poses, time_grid
from openmm_diffforce.errors import ConvergenceError, InputError, ModelError
from openmm_diffforce.schedule import VESchedule

SCHEDULE = RigidSchedule()
DFMDOCK = RigidSchedule(3.0, 1.5, 0.01, 0.1, "geometric", "logarithmic")


def random_poses(n: int, seed: int = 0) -> Poses:
    generator = np.random.default_rng(seed)
    return Poses(so3.random_rotations(n, generator), generator.standard_normal((n, 3)))


def ligand(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal([3.0, -1.0, 2.0], 1.0, (12, 3))
    return x, x[:7].mean(axis=0)


def mixture(**changes) -> PoseMixture:
    turn = so3.exp([[0.2, 0.1, 0.0], [1.8, -1.0, 0.6], [-0.5, 0.4, 2.2]])
    centres = Poses(turn, [[0.0, 0.1, 0.0], [0.9, -0.4, 0.3], [-0.7, 0.2, 0.8]])
    given = {"weights": [0.5, 0.3, 0.2], "spread_tr": [0.08, 0.12, 0.1], "spread_rot": [0.15, 0.1, 0.2]}
    return PoseMixture(centres, **{**given, "schedule": SCHEDULE, **changes})


def perturbation_gradients(function, poses: Poses, h: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """Fourth-order differences in the contract's six directions."""
    out = np.zeros((2, len(poses), 3))
    for i in range(3):
        e, zero = np.eye(3)[i], np.zeros(3)
        for k, (turn, shift) in enumerate(((zero, e), (e, zero))):
            at = [function(poses.perturbed(m * h * turn, m * h * shift)) for m in (1, -1, 2, -2)]
            out[k, :, i] = (8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * h)
    return out[0], out[1]


# ----------------------------------------------------------------------------------------- poses


def test_a_pose_is_what_the_equation_says():
    x, c = ligand()
    poses = random_poses(3)
    for k in range(3):
        want = (poses.rotation[k] @ (x - c).T).T + c + poses.translation[k]
        np.testing.assert_allclose(poses.apply(x, c)[k], want, atol=1e-14)
    np.testing.assert_array_equal(Poses.identity(1).apply(x, c)[0], (x - c) + c)


def test_compose_and_inverse():
    x, c = ligand()
    a, b = random_poses(4), random_poses(4, 1)
    once = b.apply(x, c)
    for k in range(4):
        np.testing.assert_allclose(a.compose(b).apply(x, c)[k], a[k].apply(once[k], c)[0], atol=1e-13)
    same = a.compose(a.inverse())
    np.testing.assert_allclose(same.rotation, Poses.identity(4).rotation, atol=1e-14)
    np.testing.assert_allclose(same.translation, 0, atol=1e-14)
    assert len(a[0].compose(b)) == len(b.compose(a[1])) == 4


def test_perturbed_turns_about_the_ligands_own_centre():
    x, c = ligand()
    pose = random_poses(1)
    omega, shift = np.array([0.3, -0.8, 0.2]), np.array([0.1, 0.0, -0.2])
    centre = c + pose.translation[0]
    want = (pose.apply(x, c)[0] - centre) @ so3.exp(omega).T + centre + shift
    np.testing.assert_allclose(pose.perturbed(omega, shift).apply(x, c)[0], want, atol=1e-14)


def test_moved_is_the_motion_of_the_whole_complex():
    x, c = ligand()
    poses, q, b = random_poses(3), so3.exp([0.5, 2.0, -0.3]), np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(poses.moved(q, b, c).apply(x, c), poses.apply(x, c) @ q.T + b, atol=1e-13)


def test_from_coordinates_finds_the_pose():
    x, c = ligand()
    poses = random_poses(5)
    for centre in (c, None):
        about = x.mean(axis=0) if centre is None else c
        found = Poses.from_coordinates(x, poses.apply(x, about), centre=centre)
        np.testing.assert_allclose(found.rotation, poses.rotation, atol=1e-12)
        np.testing.assert_allclose(found.translation, poses.translation, atol=1e-12)
    plane = x * [1.0, 1.0, 0.0]
    flat = Poses.from_coordinates(plane, poses.apply(plane, c), centre=c)
    np.testing.assert_allclose(flat.rotation, poses.rotation, atol=1e-12)
    noisy = poses.apply(x, c) + 0.01 * np.random.default_rng(1).standard_normal((5, 12, 3))
    with pytest.raises(InputError, match=r"copies of x_ref within 0\.001 nm, found a deviation of 0\.01"):
        Poses.from_coordinates(x, noisy)
    assert (
        so3.angle(
            Poses.from_coordinates(x, noisy, tolerance=None).rotation @ poses.rotation.swapaxes(1, 2)
        ).max()
        < 0.03
    )
    mirrored = x * [1.0, 1.0, -1.0]
    with pytest.raises(InputError, match="deviation"):
        Poses.from_coordinates(x, mirrored[None])


def test_selection():
    poses = random_poses(5)
    assert len(poses[1]) == 1
    assert len(poses[poses.translation[:, 0] > 99]) == 0
    np.testing.assert_array_equal(poses[[3, 1]].translation, poses.translation[[3, 1]])
    np.testing.assert_array_equal(poses[-1].rotation[0], poses.rotation[4])
    back = Poses.concatenate(list(poses))
    np.testing.assert_array_equal(back.translation, poses.translation)
    assert poses.repeat(2).translation.tolist() == np.repeat(poses.translation, 2, axis=0).tolist()


# ------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", [SCHEDULE, DFMDOCK, RigidSchedule(1.0, 2.0, power=3.0)])
def test_schedules(schedule):
    assert float(schedule.sigma_tr(0.0)) == float(schedule.sigma_rot(0.0)) == 0.0
    for kind in ("tr", "rot"):
        low, high = (getattr(schedule, f"sigma_{kind}_{end}") for end in ("min", "max"))
        sigma, g2 = getattr(schedule, f"sigma_{kind}"), getattr(schedule, f"diffusion_{kind}")
        assert float(sigma(1.0)) == pytest.approx(np.sqrt(high**2 - low**2), rel=1e-12)
        t = np.linspace(0.05, 0.95, 19)
        slope = (sigma(t + 1e-5) ** 2 - sigma(t - 1e-5) ** 2) / 2e-5
        np.testing.assert_allclose(g2(t), slope, rtol=1e-6)
    for t in (0.0, 1e-3, 0.4, 1.0):
        assert schedule.t_of_sigma_tr(float(schedule.sigma_tr(t))) == pytest.approx(t, abs=1e-12)
    assert RigidSchedule.from_json(schedule.to_json()) == schedule


def test_dfmdocks_levels():
    """0.1 (30/0.1)^t angstrom and ln[t e^1.5 + (1 - t) e^0.1] rad."""
    t = np.array([0.0, 0.3, 1.0])
    level = np.sqrt(DFMDOCK.sigma_tr(t) ** 2 + 0.01**2)
    np.testing.assert_allclose(level, 0.1 * 0.1 * 300**t, rtol=1e-12)
    level = np.sqrt(DFMDOCK.sigma_rot(t) ** 2 + 0.1**2)
    np.testing.assert_allclose(level, np.log(t * np.exp(1.5) + (1 - t) * np.exp(0.1)), rtol=1e-12)


# --------------------------------------------------------------------------------------- mixture


def test_scores_of_the_mixture_are_gradients_of_its_log_density():
    model = mixture()
    generator = np.random.default_rng(2)
    for t in (0.0, 0.2, 0.6, 1.0):
        poses, _ = model.sample(30, t=t, generator=generator)
        tr, rot, energy = evaluate_scores(model, poses, t)
        want = perturbation_gradients(lambda p, t=t: model.log_density(p, t), poses)
        assert np.linalg.norm(tr - want[0]) < 1e-6 * np.linalg.norm(tr)
        assert np.linalg.norm(rot - want[1]) < 1e-6 * np.linalg.norm(rot)
        np.testing.assert_allclose(energy, -model.log_density(poses, t))


def test_the_mixture_is_normalised():
    """E over a wide proposal of p/q is 1."""
    model = mixture()
    generator = np.random.default_rng(3)
    proposal = mixture(spread_tr=0.16, spread_rot=0.28)
    poses, _ = proposal.sample(20000, generator=generator)
    ratio = np.exp(model.log_density(poses) - proposal.log_density(poses))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(20000) < 0.1
    wide = mixture(schedule=RigidSchedule(0.3, 0.6))
    drawn = PosePrior.from_poses(wide.sample(2000, t=1.0, generator=generator)[0], uniform=True)
    prior = PosePrior(drawn.mean, 2 * drawn.covariance)
    poses = prior.sample(20000, generator=generator)
    ratio = np.exp(wide.log_density(poses, 1.0) - prior.log_density(poses))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(20000) < 0.15


def test_noising_samples_gives_the_noised_mixture():
    """E[h] of noised samples against the exact samples at t; two moments of either kind."""
    model, t, n = mixture(), 0.4, 4000
    generator = np.random.default_rng(4)
    noised = noise_poses(model.sample(n, generator=generator)[0], t, schedule=SCHEDULE, generator=generator)
    exact, _ = model.sample(n, t=t, generator=generator)
    for value in (
        lambda p: p.translation[:, 0] ** 2,
        lambda p: p.rotation[:, 0, 1],
        lambda p: p.translation[:, 1] * p.rotation[:, 2, 2],
        lambda p: model.log_density(p, t),
    ):
        a, b = value(noised.poses), value(exact)
        assert abs(a.mean() - b.mean()) < 3.5 * np.sqrt((a.var() + b.var()) / n)


def test_the_kernels_score_averages_to_the_score():
    """The target of denoising score matching: E[target . h] = E[score . h] for test functions h."""
    model, t, n = mixture(), 0.35, 20000
    generator = np.random.default_rng(5)
    noised = noise_poses(model.sample(n, generator=generator)[0], t, schedule=SCHEDULE, generator=generator)
    tr, rot, _ = model(noised.poses, noised.t)
    features = np.stack(
        [
            np.ones(n),
            noised.poses.translation[:, 0],
            noised.poses.rotation[:, 0, 1],
            noised.poses.rotation[:, 2, 2],
        ]
    )
    for target, score in ((noised.tr_target, tr), (noised.rot_target, rot)):
        away = (features[:, :, None] * (target - score)).reshape(4, n, 3)
        z = away.mean(axis=1) / (away.std(axis=1) / np.sqrt(n))
        assert np.abs(z).max() < 3.8
    unit = (noised.rot_target * noised.rotation_vector).sum(axis=1)
    assert (unit < 0).all()  # it points back


def test_the_target_is_the_gradient_of_the_kernel():
    clean = random_poses(20)
    t = np.linspace(0.2, 1.0, 20)
    noised = noise_poses(clean, t, schedule=SCHEDULE, generator=np.random.default_rng(17))
    sigma_tr, sigma_rot = SCHEDULE.sigma_tr(t), SCHEDULE.sigma_rot(t)

    def ln_kernel(p: Poses) -> np.ndarray:
        turn = so3.angle(p.rotation @ clean.rotation.swapaxes(1, 2))
        away = ((p.translation - clean.translation) ** 2).sum(axis=1)
        return so3.igso3_log_density(turn, sigma_rot) - 0.5 * away / sigma_tr**2

    want = perturbation_gradients(ln_kernel, noised.poses, h=1e-3)
    np.testing.assert_allclose(noised.tr_target, want[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(noised.rot_target, want[1], rtol=1e-5, atol=1e-4)


def test_noise_has_the_widths_of_the_schedule():
    found = noise_poses(Poses.identity(4000), 0.7, schedule=SCHEDULE, generator=np.random.default_rng(6))
    sigma = float(SCHEDULE.sigma_tr(0.7))
    assert kstest(found.shift[:, 0] / sigma, "norm").pvalue > 0.01
    angle = so3.angle(found.poses.rotation)
    assert kstest(angle, lambda w: so3.igso3_angle_cdf(w, float(SCHEDULE.sigma_rot(0.7)))).pvalue > 0.01
    again = noise_poses(Poses.identity(4000), 0.7, schedule=SCHEDULE, generator=np.random.default_rng(6))
    np.testing.assert_array_equal(found.poses.rotation, again.poses.rotation)


def test_scores_turn_with_the_complex():
    """An invariant density: moving receptor (the centres) and ligand turns the scores."""
    model, c = mixture(), np.array([0.4, -1.0, 0.2])
    q, b = so3.exp([1.0, 0.4, -2.0]), np.array([0.3, 2.0, -1.0])
    poses, _ = model.sample(10, t=0.3, generator=np.random.default_rng(7))
    there = PoseMixture(
        model.centres.moved(q, b, c), model.weights, model.spread_tr, model.spread_rot, SCHEDULE
    )
    tr, rot, energy = model(poses, np.full(10, 0.3))
    tr_2, rot_2, energy_2 = there(poses.moved(q, b, c), np.full(10, 0.3))
    np.testing.assert_allclose(tr_2, tr @ q.T, atol=1e-10)
    np.testing.assert_allclose(rot_2, rot @ q.T, atol=1e-10)
    np.testing.assert_allclose(energy_2, energy, atol=1e-10)


def test_scores_from_a_cartesian_gradient():
    x_ref, c = ligand()
    receptor = np.random.default_rng(8).standard_normal((5, 3)) + c
    poses = random_poses(6, 9)

    def energy(p: Poses) -> np.ndarray:
        away = p.apply(x_ref, c)[:, :, None] - receptor
        return np.exp(-0.3 * (away**2).sum(axis=-1)).sum(axis=(1, 2))

    x = poses.apply(x_ref, c)
    away = x[:, :, None] - receptor
    gradient = (-0.6 * away * np.exp(-0.3 * (away**2).sum(axis=-1))[..., None]).sum(axis=2)
    tr, rot = scores_from_gradient(gradient, x, c + poses.translation)
    want = perturbation_gradients(lambda p: -energy(p), poses)
    assert np.linalg.norm(tr - want[0]) < 1e-6 * np.linalg.norm(tr)
    assert np.linalg.norm(rot - want[1]) < 1e-6 * np.linalg.norm(rot)


# ---------------------------------------------------------------------------------------- priors


def test_prior_has_the_moments_of_its_poses():
    covariance = np.array([[0.5, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.9]])
    prior = PosePrior([1.0, 2.0, 3.0], covariance, so3.exp([0.5, 0.5, 1.0]), 0.6)
    found = PosePrior.from_poses(prior.sample(8000, generator=np.random.default_rng(10)))
    np.testing.assert_allclose(found.mean, prior.mean, atol=0.05)
    np.testing.assert_allclose(found.covariance, covariance, atol=0.05)
    assert so3.angle(found.rotation @ prior.rotation.T) < 0.05
    assert found.sigma_rot == pytest.approx(0.6, abs=0.02)
    wide = prior.noised(SCHEDULE)
    np.testing.assert_allclose(wide.covariance, covariance + 4.0 * np.eye(3))
    assert wide.sigma_rot == pytest.approx(np.hypot(0.6, 1.5))
    flat = PosePrior.from_poses(random_poses(500), uniform=True)
    assert flat.rotation is None
    assert flat.noised(SCHEDULE).rotation is None
    assert PosePrior.from_poses(random_poses(5000)).sigma_rot > 1.5


def test_prior_with_rotation_is_the_mixture_of_one():
    prior = PosePrior([0.1, 0.0, 0.0], 0.04 * np.eye(3), so3.exp([0.5, 0.5, 1.0]), 0.6)
    one = PoseMixture(Poses(prior.rotation[None], prior.mean[None]), [1.0], 0.2, 0.6, SCHEDULE)
    poses = prior.sample(20, generator=np.random.default_rng(11))
    np.testing.assert_allclose(prior.log_density(poses), one.log_density(poses), atol=1e-12)


# ------------------------------------------------------------------------------- steps, sampling


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
def test_order_of_the_steps_on_the_group(method, order):
    def velocity(t, p):
        omega = np.stack([np.sin(p.rotation[:, 0, 1] + t), p.translation[:, 0], 2 * p.rotation[:, 2, 2]], 1)
        return np.cross(omega, p.translation), omega, p.rotation[:, 1, 1]

    def run(n, method):
        poses, extra = random_poses(3), np.zeros(3)
        for k in range(n):
            poses, extra = group_step(velocity, k / n, poses, extra, 1 / n, method=method)
        return np.concatenate([poses.rotation.ravel(), poses.translation.ravel(), extra])

    exact = run(160, "rk4")
    errors = [np.linalg.norm(run(n, method) - exact) for n in (10, 20, 40)]
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.abs(rates - order).max() < 0.35


def test_the_reverse_sde_recovers_the_mixture():
    model, n = mixture(), 1500
    generator = np.random.default_rng(12)
    start, _ = model.sample(n, t=1.0, generator=generator)
    found = sample_poses(model, start, schedule=SCHEDULE, generator=generator, n_steps=30)
    check_recovery(model, found.poses)
    assert found.n_calls == 60
    assert found.trajectory == ()


def test_the_probability_flow_recovers_the_mixture():
    model, n = mixture(), 1500
    start, _ = model.sample(n, t=1.0, generator=np.random.default_rng(13))
    found = sample_poses(model, start, schedule=SCHEDULE, method="ode", n_steps=30, keep_trajectory=True)
    check_recovery(model, found.poses)
    assert found.n_calls == 60
    assert len(found.trajectory) == len(found.times) == 31
    assert found.times[0] == 1
    assert found.times[-1] == 0
    np.testing.assert_array_equal(found.trajectory[0].translation, start.translation)
    np.testing.assert_array_equal(found.trajectory[-1].translation, found.poses.translation)


def test_noise_in_two_pieces_is_noise_at_once():
    n = 4000
    generator = np.random.default_rng(16)
    half = noise_between(Poses.identity(n), 0.0, 0.3, schedule=DFMDOCK, generator=generator)
    whole = noise_between(half, 0.3, 0.7, schedule=DFMDOCK, generator=generator)
    sigma_tr, sigma_rot = float(DFMDOCK.sigma_tr(0.7)), float(DFMDOCK.sigma_rot(0.7))
    assert kstest(whole.translation[:, 1] / sigma_tr, "norm").pvalue > 0.01
    angle = so3.angle(whole.rotation)
    assert kstest(angle, lambda w: so3.igso3_angle_cdf(w, sigma_rot)).pvalue > 0.01
    same = noise_between(whole, 0.7, 0.7, schedule=DFMDOCK, generator=generator)
    np.testing.assert_array_equal(same.rotation, whole.rotation)


def check_recovery(model: PoseMixture, poses: Poses) -> None:
    """Weights and spreads by z-tests; the components are far apart."""
    n = len(poses)
    value = model._components(poses, 0.0)[0]
    which = value.argmax(axis=1)
    for k, weight in enumerate(model.weights):
        share = which == k
        assert abs(share.mean() - weight) < 3.5 * np.sqrt(weight * (1 - weight) / n)
        away = poses.translation[share] - model.centres.translation[k]
        omega = so3.log(poses.rotation[share] @ model.centres.rotation[k].T)
        for found, spread in ((away, model.spread_tr[k]), (omega, model.spread_rot[k])):
            count = found.size
            assert np.abs(found.mean(axis=0)).max() < 4 * spread / np.sqrt(len(found))
            # twice the statistical error of a variance, and a hundredth for the steps
            assert abs((found**2).mean() / spread**2 - 1) < 3.5 * np.sqrt(2 / count) + 0.03


def test_sampling_repeats_bit_by_bit():
    model = mixture()
    start, _ = model.sample(5, t=1.0, generator=np.random.default_rng(14))
    runs = [
        sample_poses(model, start, schedule=SCHEDULE, generator=np.random.default_rng(15), n_steps=10)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0].poses.rotation, runs[1].poses.rotation)
    assert not np.allclose(runs[0].poses.translation, start.translation)


# ------------------------------------------------------------------------------------- bad input

RNG = np.random.default_rng(0)
X, C = ligand()
ONE = Poses.identity(1)
NONE = ONE[:0]


def flat(poses, t):
    return np.zeros((len(poses), 3)), np.zeros((len(poses), 3)), None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Poses(np.eye(3), np.zeros(3)), r"rotation \(n, 3, 3\) and translation \(n, 3\), found"),
        (lambda: Poses(np.eye(3)[None], np.zeros((2, 3))), r"found \(1, 3, 3\) and \(2, 3\)"),
        (lambda: Poses(2 * np.eye(3)[None], np.zeros((1, 3))), "Poses.rotation: expected rotations"),
        (lambda: Poses(-np.eye(3)[None], np.zeros((1, 3))), "determinant -1"),
        (lambda: Poses(np.eye(3)[None], [[np.nan, 0, 0]]), "Poses.translation: expected finite"),
        (lambda: Poses.identity(-1), "n: expected a whole number"),
        (lambda: Poses.concatenate([]), "at least one Poses"),
        (lambda: ONE.apply(X[None], C), r"x_ref: expected shape \(n_atoms, 3\)"),
        (lambda: ONE.apply(X, [0.0]), "centre: expected shape"),
        (lambda: Poses.from_coordinates(X, X), r"x: expected shape \(n, n_atoms, 3\)"),
        (lambda: Poses.from_coordinates(X[:0], X[None, :0]), "x_ref: expected shape"),
        (lambda: Poses.from_coordinates(X, X[None, :5]), "with the atoms of x_ref"),
        (lambda: Poses.from_coordinates(X[:3] * [1, 0, 0], X[None, :3]), "on a line"),
        (lambda: RigidSchedule(0.0), "expected 0 <= min < max"),
        (lambda: RigidSchedule(2.0, np.nan), "sigma_rot_min, sigma_rot_max"),
        (lambda: RigidSchedule(2.0, 1.5, 3.0), r"0 <= min < max \[nm\], found 3.0, 2.0"),
        (lambda: RigidSchedule(growth_tr="linear"), "growth_tr: expected 'power'"),
        (lambda: RigidSchedule(growth_tr="geometric"), "begins above zero"),
        (lambda: RigidSchedule(power=0.5), "power: expected a finite number >= 1"),
        (lambda: SCHEDULE.sigma_tr(1.5), r"diffusion times in \[0, 1\]"),
        (lambda: SCHEDULE.t_of_sigma_tr(3.0), r"noise level in \[0, 2\] nm, found 3.0"),
        (lambda: RigidSchedule.from_json("{}"), "expected JSON of RigidSchedule"),
        (lambda: noise_poses(ONE, 0.0, schedule=SCHEDULE, generator=RNG), "without noise there is no score"),
        (lambda: noise_poses(NONE, 0.5, schedule=SCHEDULE, generator=RNG), "at least one pose, found none"),
        (lambda: noise_poses(X, 0.5, schedule=SCHEDULE, generator=RNG), "expected Poses, found ndarray"),
        (lambda: noise_poses(ONE, [0.5, 0.6], schedule=SCHEDULE, generator=RNG), "one for each of 1 poses"),
        (lambda: noise_poses(ONE, 0.5, schedule=SCHEDULE, generator=7), "Generator, found int; pass numpy"),
        (lambda: noise_poses(ONE, 0.5, schedule=VESchedule(), generator=RNG), "RigidSchedule, found VESch"),
        (lambda: noise_between(ONE, 0.1, 0.4, schedule=None, generator=RNG), "RigidSchedule, found NoneT"),
        (lambda: mixture().sample(3, generator=None), "numpy.random.Generator, found NoneType"),
        (lambda: mixture(schedule=VESchedule()), "expected a RigidSchedule, found VESchedule"),
        (lambda: PosePrior(C, np.eye(3)).sample(3, generator=1), "numpy.random.Generator, found int"),
        (lambda: sample_poses(flat, ONE, schedule=None, method="ode"), "expected a RigidSchedule"),
        (lambda: noise_between(ONE, 0.5, 0.4, schedule=SCHEDULE, generator=RNG), "0 <= t <= t_end <= 1"),
        (lambda: evaluate_scores(flat, ONE, np.nan), "t: expected finite"),
        (lambda: scores_from_gradient(X[None], X[None], C), r"centre \(n, 3\)"),
        (lambda: PosePrior(np.zeros(3), np.zeros((3, 3))), "positive definite"),
        (lambda: PosePrior(np.zeros(3), np.eye(3), np.eye(3)), "rotation and sigma_rot together"),
        (lambda: PosePrior(np.zeros(3), np.eye(3), np.eye(3), 0.0), "sigma: expected widths > 0"),
        (lambda: PosePrior.from_poses(ONE), "at least 8 poses, found 1"),
        (lambda: PosePrior.from_poses(Poses.identity(10)), "positive definite"),
        (lambda: mixture(weights=[1.0, 0.0, 0.0]), "weights: expected numbers above zero"),
        (lambda: mixture(spread_rot=[0.1, 0.2]), r"one number for each of 3 centres, found \(2,\)"),
        (lambda: sample_poses(flat, ONE, schedule=SCHEDULE), "generator: expected a numpy.random.Gen"),
        (lambda: sample_poses(flat, NONE, schedule=SCHEDULE, method="ode"), "start: expected at least one"),
        (lambda: sample_poses(flat, ONE, schedule=SCHEDULE, method="em"), "method: expected 'sde' or 'ode'"),
        (lambda: sample_poses(flat, ONE, schedule=SCHEDULE, method="ode", n_steps=0), "n_steps"),
        (lambda: time_grid(3, 0.5, 0.4), "0 <= t_min < t_max <= 1"),
        (lambda: time_grid(3, stretch=0.0), "stretch: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda p, t: np.zeros((2, 3)), r"expected \(tr_score, rot_score, energy or None\), found ndarray"),
        (lambda p, t: (np.zeros(3), np.zeros((2, 3)), None), r"tr_score of shape \(2, 3\), found \(3,\)"),
        (lambda p, t: (np.zeros((2, 3)), None, None), r"expected rot_score of shape \(2, 3\), found"),
        (lambda p, t: (np.zeros((2, 3)), "abc", None), "rot_score is no array of real numbers"),
        (lambda p, t: (*flat(p, t)[:2], np.zeros((2, 1))), r"expected energy of shape \(2,\)"),
        (
            lambda p, t: (p.translation / p.translation, *flat(p, t)[1:]),
            r"tr_score is not finite for 1 of 2 poses, the first at index 0 and t = 0\.5",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_model_that_breaks_the_contract(model, message):
    poses = Poses(np.array([np.eye(3)] * 2), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    with pytest.raises(ModelError, match=message):
        evaluate_scores(model, poses, 0.5)


def test_steps_that_turn_too_far():
    with pytest.raises(ConvergenceError, match=r"more than pi within the step from t = 0\.5; take more"):
        group_step(
            lambda t, p: (np.zeros((1, 3)), np.full((1, 3), 9.0), np.zeros(1)), 0.5, ONE, np.zeros(1), 0.5
        )


def test_the_flow_of_one_component():
    """It takes a quantile to the same quantile: sigma grows, z stays."""
    one = PoseMixture(Poses.identity(1), [1.0], 0.1, 1e-3, SCHEDULE)
    start = Poses.identity(1).perturbed(np.zeros(3), [0.1, 0.0, 0.0])
    poses = start
    for a, b in zip(time_grid(20)[:-1], time_grid(20)[1:], strict=True):
        poses, _ = group_step(
            lambda t, p: (
                -0.5 * float(SCHEDULE.diffusion_tr(t)) * one(p, np.full(1, t))[0],
                np.zeros((1, 3)),
                np.zeros(1),
            ),
            a, poses, np.zeros(1), b - a,
        )  # fmt: skip
    assert poses.translation[0, 0] == pytest.approx(np.hypot(0.1, 2.0), rel=1e-3)
