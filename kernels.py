"""The layer that MT-GAN spends its time in: y = leaky_relu(x Wᵀ + b + addend), in pure PyTorch.

Differentiable to any order, on any device, with weights shared by all tasks or one per task.
"""
import torch
import torch.nn.functional as F


def fused_linear(x, weight, bias, slope=0.2, *, addend=None, backend="auto"):
    """Linear layer followed by LeakyReLU: y = leaky_relu(x Wᵀ + b + addend, slope).

    x       [B, K] or [T, B, K]; T is the axis of tasks
    weight  [N, K], shared by all tasks, or [T, N, K]
    bias    [N] or [T, N]
    addend  None or the shape of y, added before the activation
    slope   >= 0; 0 is ReLU, 1 a plain linear layer
    backend "auto" or "torch"; "triton" is refused until the Triton kernel exists
    Returns y [B, N] or [T, B, N].
    Raises ValueError for a negative slope or an unknown backend, RuntimeError for backend="triton".
    """
    if backend == "triton":
        raise RuntimeError("backend 'triton' is not available; use 'auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"unknown backend {backend!r}; use 'auto', 'torch' or 'triton'")
    if not slope >= 0:
        raise ValueError(f"slope must be >= 0, got {slope}")
    if weight.dim() == 2:
        y = F.linear(x, weight, bias)
    else:
        y = torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
    if addend is not None:
        y = y + addend
    return y if slope == 1 else F.leaky_relu(y, slope)
