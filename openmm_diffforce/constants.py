"""Names that several modules share: context parameters, force groups, file names."""

DEFAULT_PREFIX = "diffforce_"
"""Prefix of the context parameters of a learned force; two forces in a System need two prefixes."""

LAMBDA = "lambda"
"""``<prefix>lambda``: the alchemical coordinate in [0, 1]."""

NOISE = "noise"
"""``<prefix>noise``: the diffusion time t in [0, 1]; 0 is exactly clean."""

SCALE = "scale"
"""``<prefix>scale``: factor on the whole learned energy (1 = as learned)."""

INTERPOLATE = "lambda_interpolate"
"""Crossing over of :func:`openmm_diffforce.force.mix`: 0 classical, 1 learned (openmm-ml's name)."""

CLASSICAL_GROUP = 0
"""Force group of the classical terms (OpenMM's default group)."""

LEARNED_GROUP = 7
"""Force group of a learned force, so that its energy can be read alone."""

RESTRAINT_GROUP = 8
"""Force group of restraints that this package adds."""

U_NK_FILE = "u_nk.parquet"
"""Reduced potentials of a window run, alchemlyb standard form."""

DHDL_FILE = "dHdl.parquet"
"""dH/dlambda of a window run, alchemlyb standard form, reduced units."""

EXCHANGE_FILE = "exchange.npz"
"""Energies and states of every walker of an exchange run; its presence says that it is finished."""

RECORD_FILE = "record.json"
"""What was run: versions, seeds, settings, hashes."""

BRIDGE_FILE = "bridge.json"
"""Result of a noisy operator bridge, its audit and provenance: a record that is a page too."""
