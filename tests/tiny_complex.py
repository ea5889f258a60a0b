"""Small made-up complexes for the tests of docking: bundles of ideal helices, no file of anyone's."""

import numpy as np

from openmm_diffforce.docking.complex import RESIDUES, Complex, Partner, place_cb


def next_atom(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, bond: float, angle: float, torsion: float
) -> np.ndarray:
    """The atom d of a-b-c-d from its internal coordinates (nm, degrees)."""
    angle, torsion = np.radians(angle), np.radians(torsion)
    u = (c - b) / np.linalg.norm(c - b)
    n = np.cross(b - a, u)
    n /= np.linalg.norm(n)
    local = [-np.cos(angle), np.sin(angle) * np.cos(torsion), np.sin(angle) * np.sin(torsion)]
    return c + bond * np.stack([u, np.cross(n, u), n], axis=1) @ np.array(local)


def helix(n: int, phi: float = -57.0, psi: float = -47.0) -> dict[str, np.ndarray]:
    """N, CA, C, O, CB [n, 3] of a helix along z, centred."""
    chain = [np.zeros(3), np.array([0.1458, 0, 0]), np.array([0.1458 + 0.0551, 0.142, 0])]
    for _ in range(n - 1):
        for bond, angle, torsion in ((0.1329, 116.6, psi), (0.1458, 121.7, 180.0), (0.1525, 111.2, phi)):
            chain.append(next_atom(*chain[-3:], bond, angle, torsion))
    x = np.array(chain).reshape(n, 3, 3)
    after = np.array([next_atom(*r, 0.1329, 116.6, psi) for r in x])
    oxygen = np.array([next_atom(*r, 0.1229, 120.5, psi + 180.0) for r in x])
    x = np.concatenate(
        [x, oxygen[:, None], place_cb(x[:, 0], x[:, 1], x[:, 2])[:, None], after[:, None]], axis=1
    )
    x -= x[:, 1].mean(axis=0)
    _, _, vt = np.linalg.svd(x[:, 1])
    turn = np.stack([vt[1], np.cross(vt[0], vt[1]), vt[0]])  # a proper rotation onto z
    x = x @ turn.T
    return dict(zip(("N", "CA", "C", "O", "CB", "OXT"), np.swapaxes(x, 0, 1), strict=True))


def bundle(places: list[tuple[float, float]], n: int, types: np.ndarray, chain: str) -> Partner:
    """Parallel helices of n residues at places (x, y) [nm]."""
    one = helix(n)
    sites, atoms, names, owners, labels = [], [], [], [], []
    for k, (x, y) in enumerate(places):
        turn = 1.3 * k
        spin = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        at = {name: v @ spin.T + [x, y, 0.0] for name, v in one.items()}
        for r in range(n):
            owner = len(labels)
            glycine = RESIDUES[types[owner]] == "GLY"
            sites.append([at["N"][r], at["CA"][r], at["C"][r], at["CB"][r]])
            for name in (
                "N",
                "CA",
                "C",
                "O",
                *(() if glycine else ("CB",)),
                *(("OXT",) if r == n - 1 else ()),
            ):
                atoms.append(at[name][r])
                names.append(name)
                owners.append(owner)
            labels.append(f"{chain}:{100 * k + r + 1}")
    return Partner(
        np.asarray(types), np.array(sites), tuple(labels), np.array(atoms), tuple(names), np.array(owners)
    )


def tiny_complex(seed: int = 0, *, n: int = 12, name: str | None = None) -> Complex:
    """Four helices and two, side by side, 0.95 nm apart; leucine where they face each other."""
    generator = np.random.default_rng(seed)
    sheet = [(0.0, 0.0), (0.95, 0.0), (0.0, 0.95), (0.95, 0.95)]
    pair = [(1.9, 0.1), (1.9, 1.05)]
    receptor = bundle(sheet, n, generator.integers(0, 20, 4 * n), "A")
    ligand = bundle(pair, n, generator.integers(0, 20, 2 * n), "B")
    d = np.linalg.norm(receptor.sites[:, None, 3] - ligand.sites[None, :, 3], axis=-1)
    leucine = RESIDUES.index("LEU")
    receptor.types[d.min(axis=1) < 0.65] = leucine
    ligand.types[d.min(axis=0) < 0.65] = leucine
    return Complex(name or f"tiny{seed}", receptor, ligand)
