"""What kind of module owns a weight, and how it stores it."""

from __future__ import annotations

from torch import Tensor, nn

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes the logits of a Hugging Face model, if there is one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def is_matrix(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight matrix (2-D, a convolution, stacked experts), not a bias."""
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    return (
        parameter.ndim > 1
        and parameter.is_floating_point()
        and not name.endswith("bias")
        and not isinstance(owner, nn.Embedding)
    )


def is_transposed(owner: nn.Module) -> bool:
    """Whether a Linear stores its weight as (in, out)."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")  # GPT-2: (in, out)


def in_features(owner: nn.Module, weight: Tensor) -> int:
    """Return the width of the input that a Linear's, or stacked experts', weight multiplies."""
    return weight.shape[0] if is_transposed(owner) else weight.shape[-1]


def is_stacked(owner: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is that of Linears of stacked experts, (experts, out, in).

    Others, gpt-oss among them, store (experts, in, out).
    """
    turned = getattr(owner, "is_transposed", False)
    return weight.ndim == 3 and not isinstance(owner, CONVOLUTIONS) and not turned


def is_linear_module(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b."""
    return isinstance(module, nn.Linear) or is_transposed(module)
