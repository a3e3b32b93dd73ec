"""The matrices of a layer in the form that products with them are fastest in, for layers fused and not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from helixnet.engine.products import Product, column_wise
from helixnet.engine.quantized import Quantized, joined

Kept = Mapping[nn.Linear, Quantized]
"""Linear layers of which there are no dense matrices."""


class Joined:
    """Linear layers as one product. Until it is settled their own parameters stay, as views of one matrix."""

    def __init__(self, linears: Sequence[nn.Linear], kept: Kept) -> None:
        self._linears = linears
        found = [kept.get(linear) for linear in linears]
        there = [one for one in found if one is not None]
        if not there:
            self._products = [self._dense()]
        elif len(there) == len(linears) and len({one.form for one in there}) == 1:
            self._products = [Product(joined(there), _biases(linears))]
        else:
            whole = zip(linears, found, strict=True)
            self._products = [Product(linear.weight if one is None else one, linear.bias) for linear, one in whole]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [tokens, inputs] to [tokens, sum of outputs]."""
        if len(self._products) == 1:
            return self._products[0](rows)
        return torch.cat([product(rows) for product in self._products], dim=1)

    def settle(self) -> None:
        """It has proved right: free the matrices that products have in a form of their own."""
        of_each = self._products if len(self._products) > 1 else self._products * len(self._linears)
        for linear, product in zip(self._linears, of_each, strict=True):
            if product.is_copy:
                free(linear)

    def _dense(self) -> Product:
        """One matrix, of which the linear layers' own parameters become views."""
        weight, bias = column_wise(torch.cat([linear.weight for linear in self._linears])), _biases(self._linears)
        start = 0
        for linear in self._linears:
            stop = start + linear.out_features
            linear.weight = nn.Parameter(weight[start:stop], requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias[start:stop], requires_grad=False)
            start = stop
        return Product(weight, bias)


class KeptLinear(nn.Module):
    """Stands in for a linear layer of a module that is run by its own code."""

    def __init__(self, linear: nn.Linear, weight: torch.Tensor | Quantized) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = Product(weight, linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = hidden.reshape(-1, self.in_features)
        return self.product(rows).view(*hidden.shape[:-1], self.out_features)


class Replaced:
    """The linear layers of one layer, with others in their places; `restore` puts them back."""

    def __init__(self, layer: nn.Module, kept: Kept) -> None:
        self._places: list[tuple[nn.Module, str, nn.Linear]] = []
        for owner, name, linear in _linears(layer):
            weight = kept.get(linear)
            stand = KeptLinear(linear, linear.weight if weight is None else weight)
            if weight is not None or stand.product.is_copy:
                setattr(owner, name, stand)
                self._places.append((owner, name, linear))
                free(linear)

    def restore(self) -> None:
        """The layer is as it was made, with no weights."""
        for owner, name, linear in self._places:
            setattr(owner, name, linear)


def free(linear: nn.Linear) -> None:
    """Its own matrix goes."""
    linear.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta"), False)


def _biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases: list[torch.Tensor | None] = [linear.bias for linear in linears]
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None


def _linears(layer: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Linear]]:
    """Where in the layer each linear layer is; only such as are run as they are."""
    owners: list[Any] = list(layer.modules())
    for owner in owners:
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear:
                yield owner, name, child
