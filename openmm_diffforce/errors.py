"""The error tree. Every message says what was expected, what was found, and what to do."""


class DiffForceError(Exception):
    """Base class of every error that openmm_diffforce raises on purpose."""


class InputError(DiffForceError, ValueError):
    """An argument, file or table has the wrong shape, type, order or content."""


class UnitsError(InputError):
    """A quantity has the wrong dimension, or a unit label does not fit."""


class ModelError(DiffForceError):
    """A model or artefact cannot be used: truncated, altered, foreign, or for another molecule."""


class IncompatibleSystemError(DiffForceError):
    """An OpenMM System cannot be used as asked: constraints, unknown forces, other particles."""


class NotConservativeError(DiffForceError):
    """An energy was asked of a force that has none."""


class PoorOverlapError(DiffForceError):
    """Two ensembles overlap too little for the estimator that was asked for."""


class ConvergenceError(DiffForceError):
    """A fit or estimator did not converge, or was given too little data."""


class DomainError(DiffForceError):
    """A simulation left the range of geometries that its model was trained on."""


class ResumeError(DiffForceError):
    """A run on disk cannot be resumed: it was made with other inputs or settings."""


class WorkerError(DiffForceError):
    """A worker process ended without a result: killed, out of memory, or unable to start."""


class MissingDependencyError(DiffForceError, ImportError):
    """An optional package or compiled part is absent; the message has the command that mends it."""
