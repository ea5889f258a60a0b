"""A classifier of labels, held to ensembles whose g is known exactly."""

import json

import numpy as np
import pytest

from openmm_diffforce.audit import LABEL_GATES, Audit, audit_labels
from openmm_diffforce.errors import InputError
from openmm_diffforce.labels import LabelReadout, fit_labels

DISTANCE, WIDTH = 2.0, 0.6
"""The toy of theory: N(0, 1) becomes N(2, 0.6^2)."""


def gaussians(n_0: int, n_1: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((n_0, 1)),
        DISTANCE + WIDTH * generator.standard_normal((n_1, 1)),
    )


def powers(y: np.ndarray) -> np.ndarray:
    return np.concatenate([y, y**2], axis=1)


def exact(sigma: float = 0.0) -> tuple[float, float]:
    """Centered Delta f and scale at a noise level: from the divergences of the two Gaussians."""
    v, w = 1 + sigma**2, WIDTH**2 + sigma**2
    forward = 0.5 * ((v + DISTANCE**2) / w - 1 + np.log(w / v))  # <ln p_0/p_1>_0
    backward = 0.5 * ((w + DISTANCE**2) / v - 1 + np.log(v / w))
    return 0.5 * (backward - forward), forward + backward


def true_g(x: np.ndarray) -> np.ndarray:
    return (0.5 * ((x - DISTANCE) / WIDTH) ** 2 + np.log(WIDTH) - 0.5 * x**2)[:, 0]


def operator(x: np.ndarray, delta_f: float = 7.0) -> np.ndarray:
    """S_1 - S_0 with a constant that no label can tell."""
    return true_g(x) + delta_f


def fitted(n_0: int = 3000, n_1: int = 3000, seed: int = 1, **options) -> LabelReadout:
    options = {"sigmas": (0.0, 0.1, 0.2, 0.3, 1.0)} | options
    return fit_labels(*gaussians(n_0, n_1, seed), powers, generator=np.random.default_rng(seed), **options)


def test_the_toy_has_the_numbers_of_theory():
    assert [round(exact(s)[0], 2) for s in (0.0, 0.3, 1.0)] == [-1.87, -1.36, -0.24]


@pytest.mark.parametrize(("n_0", "n_1"), [(3000, 3000), (6000, 1500), (1000, 5000)])
def test_the_readout_and_its_curve(n_0, n_1):
    """Neither the sign nor the sizes of the classes may move it."""
    found = fitted(n_0, n_1, seed=2)
    for level in found.curve:
        centered, scale = exact(level.sigma)
        assert abs(level.centered - centered) < 3 * level.d_centered < 0.6
        assert abs(level.scale - scale) < 3 * level.d_scale < 1.5
    assert found.extrapolated is not None
    assert found.extrapolated == pytest.approx((found.centered, found.scale), abs=0.5)
    x_0, x_1 = gaussians(n_0, n_1, 2)
    g = found.classifier(np.concatenate([x_0[::50], x_1[::50]]))
    assert np.corrcoef(g, np.concatenate([found.g_0[::50], found.g_1[::50]]))[0, 1] > 0.995


def test_g_is_the_exact_one_up_to_noise():
    found = fitted(4000, 2000, seed=3, sigmas=(0.0,))
    x = np.linspace(0.3, 2.5, 30)[:, None]
    assert np.abs(found.classifier(x) - true_g(x)).max() < 0.25  # ln 2 = 0.69 with the class sizes forgotten
    assert found.curve == (found.curve[0],)
    assert found.extrapolated is None


def test_the_result_is_json():
    found = fitted(500, 500)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["delta_f"] is None


def test_swapped_ends_change_the_sign():
    x_0, x_1 = gaussians(2000, 2000, 4)
    there = fit_labels(x_0, x_1, powers, generator=np.random.default_rng(0), sigmas=(0.0,))
    back = fit_labels(x_1, x_0, powers, generator=np.random.default_rng(0), sigmas=(0.0,))
    assert back.centered == pytest.approx(-there.centered, abs=1e-6)
    assert back.scale == pytest.approx(there.scale, abs=1e-6)
    assert there.scale > 0


def test_features_may_come_as_arrays():
    x_0, x_1 = gaussians(1000, 1000, 5)
    arrays = fit_labels(powers(x_0), powers(x_1), generator=np.random.default_rng(0))
    called = fit_labels(x_0, x_1, powers, generator=np.random.default_rng(0), sigmas=(0.0,))
    assert arrays.centered == pytest.approx(called.centered)


def test_errors_cover_what_happens():
    """Sixty repeats: z of both numbers has unit width, and no bias."""
    z = []
    for seed in range(60):
        found = fitted(400, 600, seed=100 + seed, sigmas=(0.0,))
        centered, scale = exact()
        z.append([(found.centered - centered) / found.d_centered, (found.scale - scale) / found.d_scale])
    z = np.array(z)
    assert (np.abs(z.mean(axis=0)) < 3.5 / np.sqrt(60)).all(), z.mean(axis=0)
    assert ((z.std(axis=0) > 0.7) & (z.std(axis=0) < 1.4)).all(), z.std(axis=0)


def test_correlated_frames_have_larger_errors():
    x_0, x_1 = gaussians(300, 300, 6)
    options = {"generator": np.random.default_rng(0), "sigmas": (0.0,)}
    one = fit_labels(x_0, x_1, powers, **options)
    ten = fit_labels(np.repeat(x_0, 10, axis=0), np.repeat(x_1, 10, axis=0), powers, **options)
    assert ten.d_centered == pytest.approx(one.d_centered, rel=0.4)
    assert min(ten.inefficiency) > 5


def test_the_same_generator_gives_the_same_numbers():
    assert fitted(500, 500).curve == fitted(500, 500).curve


# ------------------------------------------------------------------------------------ anchors


def test_without_anchors_there_is_no_absolute_number():
    found = fitted(500, 500)
    assert found.delta_f is None
    assert found.d_delta_f is None
    assert found.anchor_spread is None
    assert "spread of anchors [kT]" not in {g.name for g in audit_labels(found).gates}


def test_anchors_close_the_gauge():
    x_0, x_1 = gaussians(40, 40, 7)
    anchors = np.concatenate([x_0, x_1])
    found = fitted(seed=8, sigmas=(0.0,)).anchored(anchors, operator(anchors))
    assert found.delta_f is not None
    assert found.d_delta_f is not None
    assert abs(found.delta_f - 7.0) < 3 * found.d_delta_f < 0.6
    assert found.anchor_spread is not None
    assert found.anchor_spread < 0.5
    assert status(audit_labels(found), "spread of anchors [kT]") == "PASS"
    assert found.delta_f == pytest.approx(np.mean(found.anchor_values))


def test_one_anchor_cannot_be_audited():
    x = np.ones((1, 1))
    found = fitted(500, 500).anchored(x, operator(x))
    assert found.delta_f == pytest.approx(7.0, abs=1)
    assert status(audit_labels(found), "spread of anchors [kT]") == "FAIL"


# -------------------------------------------------------------------------------------- gates


def status(audit: Audit, name: str) -> str:
    return {g.name: g.status for g in audit.gates}[name]


def test_a_good_readout_passes_every_gate():
    x = np.concatenate(gaussians(40, 40, 7))
    audit = audit_labels(fitted(4000, 4000, seed=11, sigmas=(0.0, 0.1, 0.2, 0.3)).anchored(x, operator(x)))
    assert audit.verdict == "PASS", audit
    assert {g.name for g in audit.gates} == set(LABEL_GATES)


def test_separable_labels_fail():
    """The ends never meet: any size of g separates them."""
    x_0, x_1 = gaussians(1000, 1000, 12)
    found = fit_labels(x_0, x_1 + 20, powers, generator=np.random.default_rng(0), sigmas=(0.0,))
    audit = audit_labels(found)
    assert np.isinf(found.calibration)
    for name in (
        "overlap of the ends",
        "contested frames",
        "calibration of the logit, |slope - 1|",
    ):
        assert status(audit, name) == "FAIL"


def test_ends_that_are_alike_fail():
    generator = np.random.default_rng(13)
    found = fit_labels(*generator.standard_normal((2, 1000, 1)), powers, generator=generator, sigmas=(0.0,))
    assert status(audit_labels(found), "gain over chance [SE]") == "FAIL"
    assert abs(found.centered) < 0.1
    assert found.overlap == pytest.approx(1, abs=0.02)


def test_too_few_independent_frames_fail():
    x_0, x_1 = gaussians(15, 15, 14)
    found = fit_labels(
        np.repeat(x_0, 40, axis=0), np.repeat(x_1, 40, axis=0), powers,
        generator=np.random.default_rng(0), sigmas=(0.0,),
    )  # fmt: skip
    audit = audit_labels(found)
    assert status(audit, "independent frames per end") == "FAIL"
    assert status(audit, "contested frames") == "FAIL"
    assert status(audit, "stated error [kT]") == "FAIL"


def test_a_run_that_drifts_fails():
    x_0, x_1 = gaussians(2000, 2000, 15)
    x_1 = x_1 + np.linspace(-1.5, 1.5, 2000)[:, None]
    found = fit_labels(x_0, x_1, powers, generator=np.random.default_rng(0), sigmas=(0.0,))
    assert status(audit_labels(found), "spread over folds [kT]") == "FAIL"


def test_more_features_than_labels_can_teach_fail():
    x_0, x_1 = gaussians(200, 200, 16)
    noise = np.random.default_rng(17).standard_normal((400, 120))
    found = fit_labels(
        np.concatenate([powers(x_0), noise[:200]], axis=1),
        np.concatenate([powers(x_1), noise[200:]], axis=1),
        generator=np.random.default_rng(0),
    )
    assert found.calibration < 0.6
    assert status(audit_labels(found), "calibration of the logit, |slope - 1|") == "FAIL"


def test_a_curve_that_leads_elsewhere_fails():
    """Noise far above the width of the ends: what it shows is not the way to the clean end."""
    found = fitted(2000, 2000, seed=18, sigmas=(0.0, 2.0, 3.0))
    assert status(audit_labels(found), "clean against extrapolated [kT]") == "FAIL"


def test_an_operator_that_labels_did_not_teach_fails_at_its_anchors():
    x = np.concatenate(gaussians(20, 20, 19))
    found = fitted(2000, 2000, sigmas=(0.0,))
    wrong = found.anchored(x, 2 * operator(x))
    assert status(audit_labels(wrong), "spread of anchors [kT]") == "FAIL"


# --------------------------------------------------------------------------------------- door


class Odd:
    ridge = np.eye(2)

    def __call__(self, y):
        return y


def nan_at(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[3] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_0": np.zeros((39, 1))}, "expected at least 40 frames"),
        ({"x_1": np.zeros((100, 2))}, "frames of one shape"),
        ({"x_1": nan_at(np.zeros((100, 1)))}, "1 that are not finite"),
        ({"x_0": "frames"}, "array of real numbers"),
        ({"features": lambda y: y[:-1]}, r"features: expected shape \(200, n_features\)"),
        ({"features": Odd()}, r"features.ridge: expected shape \(1, 1\), found \(2, 2\)"),
        ({"features": lambda y: y / 0.0 * 0.0}, "features: expected finite"),
        ({"sigmas": (0.1, 0.2)}, "increase from 0"),
        ({"sigmas": (0.0, 0.2, 0.1)}, "increase from 0"),
        ({"sigmas": ("a",)}, "sigmas: expected numbers"),
        ({"features": None, "sigmas": (0.0, 0.1)}, "without features"),
        ({"noise_atoms": [0]}, "noise_atoms: expected different atoms"),
        ({"n_folds": 1}, "n_folds: expected an integer of at least 2"),
        ({"generator": 3}, "expected numpy.random.Generator"),
    ],
)
def test_bad_input(change, message):
    x_0, x_1 = gaussians(100, 100, 22)
    arguments = {"x_0": x_0, "x_1": x_1, "features": powers, "generator": np.random.default_rng(0)} | change
    with pytest.raises(InputError, match=message), np.errstate(all="ignore"):
        fit_labels(arguments.pop("x_0"), arguments.pop("x_1"), arguments.pop("features"), **arguments)


@pytest.mark.parametrize(
    ("x", "o", "message"),
    [
        (np.zeros((0, 1)), np.zeros(0), "anchors: expected finite"),
        (np.zeros((2, 1)), np.zeros(3), "one value for each of 2 anchors"),
        (np.zeros((2, 1)), [0.0, np.nan], "operator: expected finite"),
        (np.zeros((2, 2)), [0.0, 1.0], "x: expected 2 features, found 4"),
    ],
)
def test_bad_anchors(x, o, message):
    with pytest.raises(InputError, match=message):
        fitted(100, 100, sigmas=(0.0,)).anchored(x, o)
