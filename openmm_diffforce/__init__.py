"""A diffusion model of a molecule, used as a force in OpenMM."""

__version__ = "0.1.0"
