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
"""

import torch

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
        (gradient,) = torch.autograd.grad(operator.sum(), x)
    return gradient
