r"""The one model contract: a scalar action S(x, t, lam), from which everything else follows.

.. math::

    s = -\nabla S, \qquad O_{t,\lambda} = \partial S / \partial\lambda, \qquad
    \nabla O_{t,\lambda} = \partial^2 S / \partial x\, \partial\lambda

====================  =========================================  =====================
symbol                code                                       unit
====================  =========================================  =====================
S                     ``model(x, t, lam)``                       kT (dimensionless)
s                     ``-model.fields(x, t, lam)[1]``            1/nm
O                     ``model.fields(x, t, lam)[2]``             kT
grad O                ``operator_gradient(model, x, t, lam)``    kT/nm
====================  =========================================  =====================

Your own ``torch.nn.Module`` with the signature of the action becomes a model by
:class:`AutogradAction`; a network that gives only a score, by :class:`ScoreModel`.
"""

import os
from typing import Any, Final

import numpy as np
import torch

from ..errors import ModelError

Tensor = torch.Tensor


class ActionModel(torch.nn.Module):
    """Base class of every conservative model.

    A subclass implements :meth:`forward`; it may override :meth:`fields` where explicit
    derivatives are cheaper than autograd. Shapes: ``x`` [n_frames, n_atoms, 3] in nm (noised
    coordinates y where t > 0), ``t`` [n_frames], ``lam`` [n_frames]; S [n_frames] in kT.
    """

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Reduced action S [n_frames]."""
        raise NotImplementedError

    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [n_frames], dS/dx [n_frames, n_atoms, 3] (1/nm) and dS/dlam [n_frames]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            lam = lam.detach().requires_grad_(True)
            action = self(x, t, lam)
            grad_x, grad_lam = torch.autograd.grad(action.sum(), (x, lam), allow_unused=True)
        grad_x = torch.zeros_like(x) if grad_x is None else grad_x
        grad_lam = torch.zeros_like(lam) if grad_lam is None else grad_lam
        return action.detach(), grad_x, grad_lam


class AutogradAction(ActionModel):
    """Your own module as a model: derivatives by autograd, inside TorchScript too.

    Parameters
    ----------
    module : torch.nn.Module
        ``module(x, t, lam) -> S`` with the shapes and units of :class:`ActionModel`; it compiles
        in TorchScript (a module that does not can be passed through ``torch.jit.trace`` first,
        with more than one frame).
    has_operator : bool
        Whether S depends on lam. False leaves mode "add" only.

    Notes
    -----
    Autograd must be on where :meth:`fields` is called (it is, unless ``torch.no_grad`` is used);
    :func:`model_fields` sees to it. Explicit derivatives are faster: override ``fields``.

    Examples
    --------
    >>> class Spring(torch.nn.Module):
    ...     def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    ...         return 50.0 * (1 + lam) * ((x[:, 1] - x[:, 0]) ** 2).sum(1)
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]], dtype=torch.float64)
    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> action, gradient, operator = AutogradAction(Spring()).fields(x, zero, zero)
    >>> [round(v, 9) for v in (action.item(), gradient[0, 1, 0].item(), operator.item())]
    [0.5, 10.0, 0.5]
    """

    uses_autograd: Final[bool]
    has_operator: Final[bool]

    def __init__(self, module: torch.nn.Module, *, has_operator: bool = True) -> None:
        super().__init__()
        self.module = module
        self.uses_autograd = True
        self.has_operator = bool(has_operator)

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Reduced action S [n_frames]."""
        action: Tensor = self.module(x, t, lam)
        return action

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [n_frames], dS/dx [n_frames, n_atoms, 3] (1/nm) and dS/dlam [n_frames]."""
        if not torch.is_grad_enabled():
            raise RuntimeError("this model needs autograd: call it outside torch.no_grad()")
        # Leaves of their own: freezing drops detach(), and two calls would share one graph.
        x = x.detach().clone().requires_grad_(True)
        lam = lam.detach().clone().requires_grad_(True)
        action: Tensor = self.module(x, t, lam)
        slopes = torch.autograd.grad([action.sum()], [x, lam], allow_unused=True)
        grad_x, grad_lam = slopes[0], slopes[1]
        if grad_x is None:
            grad_x = torch.zeros_like(x)
        if grad_lam is None:
            grad_lam = torch.zeros_like(lam)
        return action.detach(), grad_x, grad_lam


class ScoreModel(torch.nn.Module):
    r"""A bare score network s(x, t) as a model: a force, never an energy.

    Nothing makes s the gradient of a scalar: the model is declared non-conservative. Its action
    is NaN, so that no energy can be read from it by mistake; whatever needs one (lambda windows,
    MBAR, exchange, a barostat) refuses it with :class:`~openmm_diffforce.errors.NotConservativeError`.

    Parameters
    ----------
    module : torch.nn.Module
        ``module(x, t) -> s``, s = grad log p of the noised coordinates [n_frames, n_atoms, 3],
        in 1/nm; it compiles in TorchScript.
    """

    conservative: Final[bool]
    has_operator: Final[bool]

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.conservative = False
        self.has_operator = False

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """NaN [n_frames]: a bare score has no action."""
        return torch.full_like(lam, float("nan"))

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """NaN [n_frames], minus the score [n_frames, n_atoms, 3] (1/nm), and 0 [n_frames]."""
        score: Tensor = self.module(x, t)
        return torch.full_like(lam, float("nan")), -score, torch.zeros_like(lam)


def model_fields(model: torch.nn.Module, x: Any, *, t: Any = 0.0, lam: Any = 0.0) -> tuple[np.ndarray, ...]:
    """S, dS/dx and dS/dlam of frames as numpy arrays.

    Parameters
    ----------
    model : ActionModel, ScoreModel or TorchScript of one
        Fresh, or ``load_artefact(path).model``.
    x : float array [n_frames, n_atoms, 3]
        [nm]; noised coordinates where t > 0.
    t, lam : float or array [n_frames]

    Returns
    -------
    S [n_frames] in kT, dS/dx [n_frames, n_atoms, 3] in 1/nm, dS/dlam [n_frames] in kT

    Notes
    -----
    Evaluated in the dtype of the model's own weights. Deterministic if the model is.
    """
    dtype = model_dtype(model)
    frames = torch.as_tensor(np.ascontiguousarray(x), dtype=dtype)
    scalars = [torch.as_tensor(np.broadcast_to(v, len(frames)).copy(), dtype=dtype) for v in (t, lam)]
    with torch.set_grad_enabled(bool(getattr(model, "uses_autograd", False))):
        out = model.fields(frames, *scalars)  # type: ignore[operator]
    return tuple(v.detach().numpy().astype(np.float64) for v in out)


def load_module(path: str | os.PathLike[str]) -> torch.nn.Module:
    """A module saved with ``torch.jit.save``.

    Raises
    ------
    ModelError
        If the file is missing, or holds no TorchScript.
    """
    try:
        module: torch.nn.Module = torch.jit.load(os.fspath(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as err:
        raise ModelError(
            f"{path}: expected a TorchScript module (torch.jit.script(module).save(...)), found "
            f"{str(err).strip().splitlines()[0]}."
        ) from err
    return module


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The one floating-point dtype of a model's weights; float64 if it has none."""
    for values in (model.buffers(), model.parameters()):
        for v in values:
            if v.is_floating_point():
                return v.dtype
    return torch.float64


def operator_gradient(model: torch.nn.Module, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """Gradient of the noised operator, d2S/dx dlam [n_frames, n_atoms, 3], in kT/nm.

    Notes
    -----
    The model's own method of this name, if it has one; otherwise two passes of autograd, which
    need a model whose action is twice differentiable. Deterministic.
    """
    if hasattr(model, "operator_gradient"):
        with torch.no_grad():
            gradient: Tensor = model.operator_gradient(x, t, lam)  # type: ignore[operator]
        return gradient
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        lam = lam.detach().requires_grad_(True)
        (operator,) = torch.autograd.grad(model(x, t, lam).sum(), lam, create_graph=True)
        if not operator.requires_grad:  # O does not depend on x
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(operator.sum(), x)
    return gradient
