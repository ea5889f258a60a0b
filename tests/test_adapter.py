"""An external docking model in angstrom, held to the same model in nm; and what is wrong with wrong ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_diffforce.docking import so3
from openmm_diffforce.docking.adapter import DFMDOCK_SCHEDULE, ExternalDockingModel
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.rigid import PosePrior, evaluate_scores, scores_from_gradient
from openmm_diffforce.docking.rigid_energy import pose_path_energy
from openmm_diffforce.docking.rigid_sampler import sample_poses
from openmm_diffforce.errors import InputError, ModelError

WIDTH = 4.0
"""Of the attraction between CA [angstrom]."""


def backbone(n: int, seed: int) -> np.ndarray:
    """N, CA, C of n residues [nm]: bonds of 0.15 nm, CA spread over a nanometre."""
    generator = np.random.default_rng(seed)
    ca = generator.normal(0.0, 0.5, (n, 3))
    arms = generator.standard_normal((2, n, 3))
    arms *= 0.15 / np.linalg.norm(arms, axis=-1, keepdims=True)
    return np.stack([ca + arms[0], ca, ca + arms[1]], axis=1)


RECEPTOR = backbone(8, 0)
LIGAND = backbone(6, 1) + np.array([1.5, 0.3, -0.2])
POSES = Poses.identity(5).perturbed(
    np.random.default_rng(2).normal(0, 1.0, (5, 3)), np.random.default_rng(3).normal(0, 0.3, (5, 3))
)


def attraction(receptor: np.ndarray, ligand: np.ndarray, t: float) -> tuple[float, np.ndarray]:
    """E = -sum w_j exp(-d^2/2 w(t)^2) over CA pairs, and dE/d(ligand CA); any length unit of WIDTH."""
    width = WIDTH * (1 + t)
    away = ligand[None, :, 1] - receptor[:, None, 1]
    weight = 1 + 0.3 * np.arange(ligand.shape[0])  # residues differ: rotations matter
    pair = weight * np.exp(-0.5 * (away**2).sum(axis=-1) / width**2)
    return -float(pair.sum()), (pair[..., None] * away).sum(axis=0) / width**2


def dfmdock_like(receptor: np.ndarray, ligand: np.ndarray, t: float) -> dict:
    """Angstrom in; torch tensors of shape (1, 3) and () out, as the published model has it."""
    energy, gradient = attraction(receptor, ligand, t)
    own = ligand[:, 1] - ligand[:, 1].mean(axis=0)
    tensors = {
        "tr_score": -gradient.sum(axis=0)[None],
        "rot_score": -np.cross(own, gradient).sum(axis=0)[None],
        "energy": energy,
    }
    return {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in tensors.items()}


def external(function=dfmdock_like, **changes) -> ExternalDockingModel:
    given = {"receptor": RECEPTOR, "ligand": LIGAND, "schedule": DFMDOCK_SCHEDULE}
    return ExternalDockingModel(function, **{**given, **changes})


def direct(poses: Poses, t: np.ndarray):
    """The same model written for the contract, in nm."""
    centre = LIGAND[:, 1].mean(axis=0)
    x = poses.apply(LIGAND[:, 1], centre)
    energy, gradient = [], []
    for k in range(len(poses)):
        ligand = np.repeat(x[k][:, None], 3, axis=1)
        e, g = attraction(10 * RECEPTOR, 10 * ligand, float(t[k]))
        energy.append(e)
        gradient.append(10 * g)
    return *scores_from_gradient(gradient, x, centre + poses.translation), np.array(energy)


def test_units_and_conventions_of_the_published_interface():
    times = np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    for found, want in zip(external()(POSES, times), direct(POSES, times), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)


def test_what_the_function_is_given():
    seen = []

    def function(receptor, ligand, t):
        seen.append((receptor, ligand, t))
        return {"tr_score": np.zeros(3), "rot_score": [[0.0, 0.0, 0.0]]}

    model = external(function, time=lambda t: 1000 * t)
    tr, rot, energy = model(POSES[:2], np.array([0.2, 0.4]))
    assert energy is None
    assert tr.shape == rot.shape == (2, 3)
    assert [s[2] for s in seen] == [200.0, 400.0]
    np.testing.assert_allclose(seen[1][0], 10 * RECEPTOR)
    want = POSES.apply(LIGAND.reshape(-1, 3), LIGAND[:, 1].mean(axis=0))[1].reshape(6, 3, 3)
    np.testing.assert_allclose(seen[1][1], 10 * want)


def test_other_conventions_are_converted():
    times = np.full(5, 0.2)
    want = direct(POSES, times)

    def nanometres(receptor, ligand, t):
        out = dfmdock_like(10 * receptor, 10 * ligand, t)
        return {**out, "tr_score": 10 * out["tr_score"]}

    def body(receptor, ligand, t):
        """Its rotation score is along R exp(eps e_i); R from the coordinates."""
        rotation = Poses.from_coordinates(LIGAND.reshape(-1, 3), ligand.reshape(1, -1, 3) / 10).rotation[0]
        out = dfmdock_like(receptor, ligand, t)
        return {**out, "rot_score": rotation.T @ out["rot_score"].detach().numpy()[0]}

    def origin(receptor, ligand, t):
        energy, gradient = attraction(receptor, ligand, t)
        torque = -np.cross(ligand[:, 1], gradient).sum(axis=0)
        return {"tr_score": -gradient.sum(axis=0), "rot_score": torque, "energy": energy}

    def halves(receptor, ligand, t):
        out = dfmdock_like(receptor, ligand, t)
        return {**out, "energy": 0.5 * out["energy"]}

    for model in (
        external(nanometres, length_unit="nanometer"),
        external(body, rotation_frame="body"),
        external(origin, rotation_about="origin"),
        external(halves, energy_scale=2.0),
    ):
        for found, one in zip(model(POSES, times), want, strict=True):
            np.testing.assert_allclose(found, one, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------ examination


def examine(function=dfmdock_like, strict=False, **changes):
    return external(function, **changes).examine(
        POSES, generator=np.random.default_rng(4), strict=strict, steps=(1e-3, 1e-3)
    )


def test_a_sound_model():
    found = examine(strict=True)
    assert found.failures == ()
    assert found.repeat == 0
    assert max(found.equivariance_tr, found.equivariance_rot, found.invariance) < 1e-9
    assert found.energy_residual < 1e-5
    assert found.curl < 1e-4
    assert found.energy_slope == pytest.approx(1.0, abs=1e-5)
    assert found.verdict == "energy and score belong together: score = -grad E"
    assert "conventions  fit" in str(found)
    assert found.n_calls == 75


def test_curl_needs_the_commutators():
    """Without the correction by the score itself a sound model would look wrong."""
    model = external()
    h, slopes = 1e-4, np.empty((5, 3, 3))
    rot = model(POSES, np.full(5, 0.3))[1]
    for i, e in enumerate(h * np.eye(3)):
        up, down = (model(POSES.perturbed(k * e, np.zeros(3)), np.full(5, 0.3))[1] for k in (1, -1))
        slopes[:, i] = (up - down) / (2 * h)
    naive = slopes - slopes.swapaxes(1, 2)
    np.testing.assert_allclose(naive, so3.hat(rot), atol=1e-6 * np.abs(rot).max())
    assert np.linalg.norm(naive) > 0.05 * np.linalg.norm(slopes)


def test_an_energy_in_another_unit():
    found = examine(lambda r, x, t: {**dfmdock_like(r, x, t), "energy": attraction(r, x, t)[0] / 7})
    assert found.energy_slope == pytest.approx(7.0, rel=1e-4)
    assert found.energy_residual > 0.5
    assert "multiply energy_scale by 7" in found.verdict
    assert found.failures == ()


def test_an_energy_that_is_a_head_of_its_own():
    def function(receptor, ligand, t):
        away = np.linalg.norm(ligand[:, 1].mean(axis=0) - receptor[:, 1].mean(axis=0))
        return {**dfmdock_like(receptor, ligand, t), "energy": np.sin(away)}

    found = examine(function)
    assert found.failures == ()
    assert found.energy_residual_scaled > 0.5
    assert found.verdict.startswith("the score is the gradient of another energy")


def test_a_score_that_is_no_gradient():
    def swirl(receptor, ligand, t):
        out = dfmdock_like(receptor, ligand, t)
        away = ligand[:, 1].mean(axis=0) - receptor[:, 1].mean(axis=0)
        force = out["tr_score"].detach().numpy()[0]
        return {**out, "tr_score": force + 0.5 * np.cross(away, force)}

    found = examine(swirl)
    assert found.failures == ()  # it turns with the complex
    assert found.curl > 0.1
    assert "is not the gradient of any" in found.verdict
    bare = examine(lambda r, x, t: {k: v for k, v in swirl(r, x, t).items() if k != "energy"})
    assert bare.energy_slope is None
    assert bare.invariance is None
    assert bare.verdict.startswith("no energy, and the score is not the gradient of any")
    scores = examine(lambda r, x, t: {k: v for k, v in dfmdock_like(r, x, t).items() if k != "energy"})
    assert scores.verdict.startswith("no energy; the score is the gradient of one")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        # tells the axes of the frame apart
        (
            lambda r, x, t: {
                **dfmdock_like(r, x, t),
                "tr_score": dfmdock_like(r, x, t)["tr_score"].detach() * torch.tensor([1.0, 1.0, 1.2]),
            },
            {},
            "tr_score does not turn with the complex",
        ),
        # about the origin, declared as about the ligand
        (
            lambda r, x, t: {
                **dfmdock_like(r, x, t),
                "rot_score": -np.cross(x[:, 1], attraction(r, x, t)[1]).sum(axis=0),
            },
            {},
            "rot_score does not turn with the complex",
        ),
        # the space frame, declared as the body's
        (dfmdock_like, {"rotation_frame": "body"}, "rot_score does not turn with the complex"),
        # an energy of the position
        (
            lambda r, x, t: {**dfmdock_like(r, x, t), "energy": 5.0 * x[0, 1, 0]},
            {},
            "energy changes by .* kT when the complex is moved",
        ),
    ],
)
def test_conventions_that_do_not_fit_fail_at_the_door(function, changes, message):
    with pytest.raises(ModelError, match=message):
        examine(function, strict=True, **changes)
    assert examine(function, **changes).failures


def test_a_model_with_chance():
    """Random edges: the difference of two calls is reported, and allowed for."""
    generator = np.random.default_rng(5)

    def noisy(size):
        return lambda r, x, t: {
            k: v.detach().numpy() * (1 + size * generator.standard_normal(v.shape))
            for k, v in dfmdock_like(r, x, t).items()
            if k != "energy"
        }

    found = examine(noisy(0.01))
    assert 0.003 < found.repeat < 0.05
    assert found.failures == ()
    assert "two calls differ" in examine(noisy(0.3)).verdict


def test_an_external_model_samples_and_gives_likelihoods():
    """From the function to poses and energies, through the contract alone."""

    def spring(receptor, ligand, t):
        """p_0: the ligand's centre normal about (15, 0, 0) angstrom with 1 angstrom, any orientation."""
        level = 0.1 * 300.0**t
        variance = 1.0 + level**2 - 0.1**2
        away = ligand[:, 1].mean(axis=0) - [15.0, 0.0, 0.0]
        return {"tr_score": -away / variance, "rot_score": np.zeros(3)}

    model = external(spring)
    rng = np.random.default_rng(6)
    mean = np.array([1.5, 0.0, 0.0]) - LIGAND[:, 1].mean(axis=0)
    prior = PosePrior(mean, 0.01 * np.eye(3)).noised(DFMDOCK_SCHEDULE)
    start = prior.sample(60, generator=rng)
    found = sample_poses(model, start, schedule=DFMDOCK_SCHEDULE, generator=rng, n_steps=40).poses
    z = (found.translation - mean) / 0.1
    assert np.abs(z.mean(axis=0)).max() < 4 / np.sqrt(60)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / 180) + 0.05
    energies = pose_path_energy(
        model, found[:3], schedule=DFMDOCK_SCHEDULE, prior=prior, path="standing", n_steps=16
    )
    exact = -0.5 * (z[:3] ** 2).sum(axis=1) - 1.5 * np.log(2 * np.pi * 0.01)
    np.testing.assert_allclose(energies.ln_p0, exact, atol=0.02)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"receptor": RECEPTOR[:, 1]}, r"receptor: expected shape \(n, n_atoms, 3\), found \(8, 3\)"),
        ({"ligand": LIGAND[:, :2]}, "ligand: expected N, CA, C of every residue"),
        ({"ligand": LIGAND[:0]}, "ligand: expected shape"),
        ({"ligand": np.full((4, 3, 3), np.nan)}, "ligand: expected finite numbers"),
        ({"receptor": 10 * RECEPTOR}, "receptor: expected nm, found N-CA bonds of 1.50: angstrom"),
        ({"centre": [0.0, 0.0]}, "centre: expected shape"),
        ({"length_unit": "bohr"}, "length_unit: expected one of"),
        ({"rotation_frame": "ligand"}, "rotation_frame: expected one of"),
        ({"rotation_about": "receptor"}, "rotation_about: expected one of"),
        ({"schedule": None}, "schedule: expected a RigidSchedule, found NoneType"),
        ({"energy_scale": np.nan}, "energy_scale: expected a finite number"),
        ({"function": 3}, "function: expected a callable, found int"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        external(**changes)


def test_bad_calls():
    model = external()
    with pytest.raises(InputError, match="at least one pose"):
        model(POSES[:0], np.zeros(0))
    with pytest.raises(InputError, match=r"diffusion times in \[0, 1\]"):
        model(POSES, np.full(5, 2.0))
    with pytest.raises(InputError, match="steps: expected displacements"):
        model.examine(POSES, generator=np.random.default_rng(0), steps=(0.0, 1e-2))
    with pytest.raises(InputError, match="at least one pose"):
        model.examine(POSES[:0], generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([1, 2], "expected a mapping with tr_score, rot_score and perhaps energy, found list"),
        ({"tr_score": [0, 0, 0]}, r"perhaps energy, found \['tr_score'\]"),
        ({"tr_score": [0, 0], "rot_score": [0, 0, 0]}, r"expected 3 numbers in tr_score, found shape \(2,\)"),
        ({"tr_score": [0, 0, 0], "rot_score": "abc"}, "rot_score is no array of real numbers"),
        ({"tr_score": [0, np.nan, 0], "rot_score": [0, 0, 0]}, "tr_score is not finite"),
        (
            {"tr_score": [0, 0, 0], "rot_score": [0, 0, 0], "energy": [1, 2]},
            r"expected 1 number in energy, found shape \(2,\)",
        ),
    ],
)
def test_functions_that_return_something_else(out, message):
    with pytest.raises(ModelError, match=message):
        evaluate_scores(external(lambda r, x, t: out), POSES, 0.5)


def test_functions_that_fail_or_forget():
    def broken(receptor, ligand, t):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(
        ModelError, match=r"failed at pose 0, t = 0\.5, with RuntimeError: CUDA out of memory"
    ):
        external(broken)(POSES, np.full(5, 0.5))
    count = iter(range(99))

    def forgetful(receptor, ligand, t):
        out = dfmdock_like(receptor, ligand, t)
        return out if next(count) % 2 else {**out, "energy": None}

    with pytest.raises(ModelError, match="energy for every pose or for none, found 2 of 5"):
        external(forgetful)(POSES, np.full(5, 0.5))
    far = POSES.perturbed(np.zeros(3), [1e3, 0.0, 0.0])
    with pytest.raises(ModelError, match="every score is zero at these poses"):
        external().examine(far, generator=np.random.default_rng(0))


def test_moved_is_the_model_of_the_moved_receptor():
    q, b = so3.exp([0.3, -2.0, 0.5]), np.array([1.0, 2.0, -0.5])
    model = external()
    np.testing.assert_allclose(model.moved(q, b).receptor, RECEPTOR @ q.T + b)
    assert model.moved(q, b).centre is model.centre
    assert replace(model, energy_scale=2.0).energy_scale == 2.0
