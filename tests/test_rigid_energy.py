"""-ln p_0 of poses by flow and paths, held to exact mixtures."""

import json

import numpy as np
import pytest

from openmm_diffforce.docking import so3
from openmm_diffforce.docking.mixture import PoseMixture
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.rigid import PosePrior, RigidSchedule
from openmm_diffforce.docking.rigid_energy import (
    PoseEnergyResult,
    pose_flow_energy,
    pose_path_energy,
    score_divergence,
)
from openmm_diffforce.errors import ConvergenceError, InputError, ModelError

SCHEDULE = RigidSchedule()
DFMDOCK = RigidSchedule(3.0, 1.5, 0.01, 0.1, "geometric", "logarithmic")


def mixture(schedule: RigidSchedule = SCHEDULE) -> PoseMixture:
    turn = so3.exp([[0.2, 0.1, 0.0], [1.8, -1.0, 0.6], [-0.5, 0.4, 2.2]])
    centres = Poses(turn, [[0.0, 0.1, 0.0], [0.9, -0.4, 0.3], [-0.7, 0.2, 0.8]])
    return PoseMixture(centres, [0.5, 0.3, 0.2], [0.08, 0.12, 0.1], [0.15, 0.1, 0.2], schedule)


def near(model: PoseMixture, n: int = 12, seed: int = 0) -> Poses:
    return model.sample(n, generator=np.random.default_rng(seed))[0]


def decoys(n: int = 8, seed: int = 1) -> Poses:
    """At random, ten widths and more from every mode."""
    return PosePrior(np.zeros(3), np.eye(3)).sample(n, generator=np.random.default_rng(seed))


def end(model: PoseMixture):
    return lambda poses: model.log_density(poses, 1.0)


def single(t_to: float = 1.0) -> tuple[PoseMixture, PosePrior]:
    """One component: a Gaussian prior and an IGSO3 are its exact end."""
    centre = Poses(so3.exp([[0.3, 0.1, -0.2]]), [[0.2, 0.0, 0.1]])
    model = PoseMixture(centre, [1.0], 0.1, 0.2, SCHEDULE)
    prior = PosePrior(centre.translation[0], 0.01 * np.eye(3), centre.rotation[0], 0.2)
    return model, prior.noised(SCHEDULE, t_to)


# ------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_divergence_is_the_laplacian_of_the_log_density(t):
    model = mixture()
    poses, _ = model.sample(10, t=t, generator=np.random.default_rng(2))
    div_tr, div_rot = score_divergence(model, poses, t, steps=(1e-4, 1e-4))

    def ln_p(rotation):
        return model.log_density(Poses(rotation, poses.translation), t)

    np.testing.assert_allclose(div_rot, so3.laplacian(ln_p, poses.rotation, step=1e-3), rtol=1e-4, atol=1e-3)
    h, want = 1e-3, 0.0
    for e in h * np.eye(3):
        values = [model.log_density(poses.perturbed(np.zeros(3), k * e), t) for k in (1, 0, -1)]
        want = want + (values[0] - 2 * values[1] + values[2]) / h**2
    np.testing.assert_allclose(div_tr, want, rtol=2e-3, atol=1e-2)


def test_divergence_of_a_field_that_is_no_gradient():
    """s_rot = R-dependent, s_tr rotated by 90 degrees: only the trace counts."""

    def model(p, t):
        return np.cross([0.0, 0.0, 1.0], p.translation), np.cross(p.rotation[:, 0], p.rotation[:, 1]), None

    div_tr, div_rot = score_divergence(model, decoys(), 0.5)
    np.testing.assert_allclose(div_tr, 0, atol=1e-9)
    # rows of R: r_i . (derivative of (r_0 x r_1) along e_i), by hand: the field is R^T e_2-like
    want = so3.lie_divergence(lambda r: np.cross(r[:, 0], r[:, 1]), decoys().rotation)
    np.testing.assert_allclose(div_rot, want, atol=1e-6)


# ---------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("schedule", [SCHEDULE, DFMDOCK])
def test_flow_gives_the_exact_density(schedule):
    model = mixture(schedule)
    poses = near(model)
    found = pose_flow_energy(model, poses, schedule=schedule, prior=end(model), n_steps=30)
    exact = model.log_density(poses)
    assert np.abs(found.ln_p0 - exact).max() < 0.01
    assert (np.abs(found.ln_p0 - exact) <= found.discretisation_error + 1e-6).all()
    assert found.discretisation_error.max() < 0.2
    np.testing.assert_allclose(found.energy, -found.ln_p0)
    assert (found.standard_error == 0).all()


@pytest.mark.parametrize("path", ["noising", "standing"])
@pytest.mark.parametrize("schedule", [SCHEDULE, DFMDOCK])
def test_paths_give_the_exact_density(schedule, path):
    model = mixture(schedule)
    poses = near(model)
    found = pose_path_energy(
        model, poses, schedule=schedule, prior=end(model), path=path, n_steps=20, n_paths=2,
        generator=np.random.default_rng(3),
    )  # fmt: skip
    assert np.abs(found.ln_p0 - model.log_density(poses)).max() < 0.01
    assert found.standard_error.max() < 0.01
    assert found.discretisation_error.max() < 0.15


def test_decoys_far_from_every_mode():
    """At sigma 0.3 nm, as a model of complexes is asked; exact energies spread over 30 kT."""
    model, t_min = mixture(), 0.4
    poses = decoys()
    exact = model.log_density(poses, t_min)
    assert np.ptp(exact) > 20
    given = {"schedule": SCHEDULE, "prior": end(model), "t_min": t_min}
    found = pose_path_energy(model, poses, n_steps=8, generator=np.random.default_rng(4), **given)
    assert np.abs(found.ln_p0 - exact).max() < 0.1
    flow = pose_flow_energy(model, poses, n_steps=80, **given)
    assert np.abs(flow.ln_p0 - exact).max() < 0.05
    coarse = pose_flow_energy(model, poses, n_steps=10, **given)
    wrong = np.abs(coarse.ln_p0 - exact) > 1
    assert wrong.any()  # the flow is stiff out there ...
    assert (coarse.discretisation_error[wrong] > 1).all()  # ... and the error says so


def test_error_falls_with_the_order_of_the_method():
    model = mixture()
    poses = near(model, 6)
    exact = model.log_density(poses)
    error = {
        (method, n): np.abs(
            pose_flow_energy(
                model,
                poses,
                schedule=SCHEDULE,
                prior=end(model),
                n_steps=n,
                method=method,
                steps=(1e-4, 1e-4),
            ).ln_p0
            - exact
        ).mean()
        for method in ("heun", "rk4")
        for n in (30, 60)
    }
    assert 1.4 < np.log2(error["heun", 30] / error["heun", 60]) < 2.8
    assert np.log2(error["rk4", 30] / error["rk4", 60]) > 3.2
    assert error["rk4", 30] < 0.1 * error["heun", 30]


def test_gaussian_prior_of_one_component_is_exact():
    model, prior = single()
    poses = near(model, 8)
    found = pose_flow_energy(model, poses, schedule=SCHEDULE, prior=prior, n_steps=20)
    assert np.abs(found.ln_p0 - model.log_density(poses)).max() < 0.005
    path = pose_path_energy(model, poses, schedule=SCHEDULE, prior=prior, generator=np.random.default_rng(5))
    assert np.abs(path.ln_p0 - model.log_density(poses)).max() < 0.005


def test_moment_matched_prior():
    """Wide noise forgets the mixture: a prior from samples is good to a tenth of kT."""
    wide = RigidSchedule(4.0, 3.0)
    model = mixture(wide)
    prior = PosePrior.from_poses(model.sample(4000, generator=np.random.default_rng(6))[0]).noised(wide)
    flat = PosePrior(prior.mean, prior.covariance)
    poses = near(model, 10)
    for one in (prior, flat):
        found = pose_path_energy(
            model, poses, schedule=wide, prior=one, path="standing", n_steps=32
        )  # fmt: skip
        assert 1e-6 < np.abs(found.ln_p0 - model.log_density(poses)).max() < 0.15


def test_starting_above_zero_noise():
    model, t_min = mixture(), 0.25
    poses = near(model, 8)
    given = {"schedule": SCHEDULE, "prior": end(model), "t_min": t_min}
    exact = model.log_density(poses, t_min)
    for found in (
        pose_flow_energy(model, poses, n_steps=30, **given),
        pose_path_energy(model, poses, path="standing", **given),
    ):
        assert np.abs(found.ln_p0 - exact).max() < 0.01
    assert np.abs(exact - model.log_density(poses)).max() > 0.3


def test_a_divergence_that_the_model_knows():
    """One component at t: div s_tr = -3/var; the rotation's from a fine difference."""
    model, prior = single()

    def divergence(poses, t):
        var = 0.01 + SCHEDULE.sigma_tr(t) ** 2
        return -3 / var, score_divergence(model, poses, t, steps=(1e-3, 1e-4))[1]

    poses = near(model, 5)
    given = {"schedule": SCHEDULE, "prior": prior, "n_steps": 20}
    own = pose_flow_energy(model, poses, divergence=divergence, **given)
    central = pose_flow_energy(model, poses, **given)
    np.testing.assert_allclose(own.ln_p0, central.ln_p0, atol=1e-4)
    assert own.n_evaluations * 13 == central.n_evaluations


# --------------------------------------------------------------------- what learned scores do to it


def test_paths_disagree_where_scores_are_inconsistent():
    """A score that is 10 % too long belongs to no density: the spread over paths shows it."""
    model = mixture()

    def wrong(poses, t):
        tr, rot, _ = model(poses, t)
        return 1.1 * tr, 1.1 * rot, None

    poses = near(model)
    given = {"schedule": SCHEDULE, "prior": end(model)}
    good, bad = (
        pose_path_energy(one, poses, generator=np.random.default_rng(7), **given) for one in (model, wrong)
    )
    assert np.median(bad.standard_error) > 20 * np.median(good.standard_error)
    assert np.median(bad.standard_error) > 0.1
    flow = pose_flow_energy(wrong, poses, n_steps=30, **given)
    assert np.abs(flow.ln_p0 - bad.ln_p0).max() > 0.2


def test_energies_do_not_depend_on_the_frame():
    model, c = mixture(), np.array([0.4, -1.0, 0.2])
    q, b = so3.exp([1.0, 0.4, -2.0]), np.array([0.3, 2.0, -1.0])
    there = PoseMixture(
        model.centres.moved(q, b, c), model.weights, model.spread_tr, model.spread_rot, SCHEDULE
    )
    poses = near(model, 6)
    here, moved = (
        pose_flow_energy(m, p, schedule=SCHEDULE, prior=end(m), n_steps=20)
        for m, p in ((model, poses), (there, poses.moved(q, b, c)))
    )
    # the axes of the differences do not turn with the frame
    np.testing.assert_allclose(moved.ln_p0, here.ln_p0, atol=2e-3)


def test_poses_do_not_see_each_other_and_batches_do_not_matter():
    model = mixture()
    poses = near(model, 5)
    given = {"schedule": SCHEDULE, "prior": end(model), "n_steps": 10}
    every = pose_flow_energy(model, poses, **given)
    alone = pose_flow_energy(model, poses[2], **given)
    small = pose_flow_energy(model, poses, max_batch=7, **given)
    np.testing.assert_allclose(alone.ln_p0[0], every.ln_p0[2], atol=1e-9)
    np.testing.assert_allclose(small.ln_p0, every.ln_p0, atol=1e-9)
    assert small.n_evaluations == every.n_evaluations == 13 * 5 * 4 * (10 + 5)
    assert small.n_calls == np.ceil(65 / 7) * 60
    assert every.n_calls == 60


def test_a_record_for_json():
    model = mixture()
    found = pose_path_energy(
        model, near(model, 3), schedule=SCHEDULE, prior=end(model), n_steps=2, n_paths=3,
        generator=np.random.default_rng(8),
    )  # fmt: skip
    assert isinstance(found, PoseEnergyResult)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["method"] == "noising path"
    assert (back["n_paths"], back["n_steps"]) == (3, 2)
    assert back["n_evaluations"] == 13 * 9 * (4 * 2 + 1)
    assert back["ln_p0"] == found.ln_p0.tolist()


# ------------------------------------------------------------------------------------- bad input

MODEL, PRIOR = single()
ONE = Poses.identity(1)


def flow(**changes):
    given = {
        "model": MODEL,
        "poses": ONE,
        "schedule": SCHEDULE,
        "prior": PRIOR,
        "n_steps": 2,
        "method": "heun",
    }
    return pose_flow_energy(**{**given, **changes})


def along(**changes):
    given = {"model": MODEL, "poses": ONE, "schedule": SCHEDULE, "prior": PRIOR, "path": "standing"}
    return pose_path_energy(**{**given, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow(poses=ONE[:0]), "at least one pose, found none"),
        (lambda: flow(poses=np.eye(3)), "expected Poses, found ndarray"),
        (lambda: flow(n_steps=3), "even number of at least 2, found 3"),
        (lambda: flow(n_steps=2.0), r"whole number >= 0, found 2\.0"),
        (lambda: flow(method="euler"), "method: expected 'rk4' or 'heun'"),
        (lambda: flow(schedule=None), "expected a RigidSchedule, found NoneType"),
        (lambda: along(schedule=0.5), "expected a RigidSchedule, found float"),
        (lambda: flow(t_min=1.0), "0 <= t_min < t_max <= 1"),
        (lambda: flow(stretch=-1.0), "stretch: expected"),
        (lambda: flow(steps=(0.0, 0.1)), "displacements in"),
        (lambda: flow(steps=0.1), "two displacements"),
        (lambda: flow(max_batch=0), "max_batch: expected at least 1"),
        (lambda: flow(prior=lambda p: np.zeros(3)), r"found shape \(3,\)"),
        (lambda: flow(prior=lambda p: np.full(1, np.nan)), "prior: expected a PosePrior or a callable"),
        (lambda: along(path="straight"), "path: expected 'noising' or 'standing'"),
        (lambda: along(path="noising"), "generator: expected a numpy.random.Generator"),
        (lambda: along(path="noising", n_paths=1), "at least 2 noising paths, found 1"),
        (lambda: along(n_steps=0), "n_steps: expected at least 1"),
        (lambda: score_divergence(MODEL, ONE, 2.0), r"diffusion times in \[0, 1\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_models_and_divergences_that_break_the_contract():
    with pytest.raises(ModelError, match="tr_score is not finite"):
        flow(model=lambda p, t: (np.full((len(p), 3), np.nan), np.zeros((len(p), 3)), None))
    with pytest.raises(ModelError, match=r"divergence: expected two finite arrays of shape \(1,\)"):
        flow(divergence=lambda p, t: (np.zeros(2), np.zeros(1)))
    with pytest.raises(ConvergenceError, match="take more steps"):
        flow(model=lambda p, t: (np.zeros((len(p), 3)), np.full((len(p), 3), 9.0), None))
