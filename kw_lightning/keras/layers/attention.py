"""What a vision transformer needs, and ConvNeXt's LayerScale. Sequences are [tokens, features], as in Keras.

ClassToken, SelectToken, PositionEmbedding and LayerScale are no layers of Keras itself: with Keras they are written as
Python classes (KerasHub has the last two), which a recipe cannot have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kw_lightning.errors import sentence
from kw_lightning.keras import modules
from kw_lightning.keras.arguments import Shape, argument, flag, number, optional, whole
from kw_lightning.keras.initializers import initialize
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.layers.activation import Elementwise
from kw_lightning.keras.layers.dense import INITIALIZER, WAREHOUSE
from kw_lightning.keras.shapes import ShapeError, feature_axis, written


def need_tokens(shape: Shape) -> None:
    """Raise ShapeError unless the shape is [tokens, features]."""
    if len(shape) != 2:
        hint = "Reshape and Permute make tokens of positions"
        raise ShapeError(sentence(f"an input {written(shape)}", "[tokens, features]", hint))


@register
@dataclass(frozen=True, kw_only=True)
class MultiHeadAttention(Layer):
    """Attention over [tokens, features]; inputs: one (self-attention), or query and value, or query, value and key.

    `warehouse` makes the value projection dynamic, as the paper does; query and key projections stay static.
    """

    most_inputs = 3
    dynamic: ClassVar[Mapping[str, str]] = {"warehouse": "value"}

    num_heads: int = argument(whole())
    key_dim: int = argument(whole())
    value_dim: int | None = argument(optional(whole()), None)
    dropout: float = argument(number(0, below=1), 0.0)
    use_bias: bool = argument(flag(), True)
    kernel_initializer: str = argument(INITIALIZER, "glorot_uniform")
    bias_initializer: str = argument(INITIALIZER, "zeros")
    warehouse: str | None = argument(WAREHOUSE, None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [tokens of the query, features of the query]."""
        for shape in inputs:
            need_tokens(shape)
        if len(inputs) == 3 and inputs[1][0] != inputs[2][0]:
            found = f"value {written(inputs[1])} and key {written(inputs[2])}"
            raise ShapeError(sentence(found, "as many tokens in both"))
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make the attention with its four linear layers."""
        query, value, key = (*inputs, *[inputs[-1]] * 2)[:3]
        module = modules.MultiHeadAttention(
            query[1],
            key[1],
            value[1],
            heads=self.num_heads,
            key_dim=self.key_dim,
            value_dim=self.key_dim if self.value_dim is None else self.value_dim,
            output_features=query[1],
            bias=self.use_bias,
            dropout=self.dropout,
        )
        for linear in (module.query, module.key, module.value, module.output):
            initialize(linear.weight, self.kernel_initializer)
            initialize(linear.bias, self.bias_initializer)
        return Parts(module)


@register
@dataclass(frozen=True, kw_only=True)
class Embedding(Layer):
    """A learnt vector for each whole number under `input_dim`: [tokens] → [tokens, output_dim]."""

    input_dim: int = argument(whole())
    output_dim: int = argument(whole())

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [*, output_dim]."""
        return (*inputs[0], self.output_dim)

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Embedding` that starts uniform in ±0.05; PyTorch's starts normal."""
        module = modules.Embedding(self.input_dim, self.output_dim)
        initialize(module.weight, "random_uniform")
        return Parts(module)


@register
@dataclass(frozen=True)
class PositionEmbedding(Elementwise):
    """A learnt vector added to each token; starts from `initializer`, glorot uniform as in KerasHub."""

    initializer: str = argument(INITIALIZER, "glorot_uniform")

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        need_tokens(inputs[0])
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make the embedding for as many tokens as the input has."""
        module = modules.PositionEmbedding(*inputs[0])
        initialize(module.position, self.initializer)
        return Parts(module)


@register
@dataclass(frozen=True)
class ClassToken(Layer):
    """A learnt token before the others: [tokens, features] → [tokens + 1, features]; starts from 0."""

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [tokens + 1, features]."""
        need_tokens(inputs[0])
        return (inputs[0][0] + 1, inputs[0][1])

    def build(self, *inputs: Shape) -> Parts:
        """Make the token."""
        return Parts(modules.ClassToken(inputs[0][1]))


@register
@dataclass(frozen=True)
class SelectToken(Layer):
    """One token of the sequence: [tokens, features] → [features]; the class token is the first, index 0."""

    index: int = argument(whole(0), 0)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [features]."""
        need_tokens(inputs[0])
        if self.index >= inputs[0][0]:
            found = f"the index {self.index} of an input {written(inputs[0])}"
            raise ShapeError(sentence(found, f"0 to {inputs[0][0] - 1}"))
        return inputs[0][1:]

    def build(self, *inputs: Shape) -> Parts:
        """Make the selection."""
        return Parts(modules.SelectToken(self.index))


@register
@dataclass(frozen=True)
class LayerScale(Elementwise):
    """A learnt factor for each channel or feature, from `init_values` (CaiT, ConvNeXt)."""

    init_values: float = argument(number(), 1e-6)

    def build(self, *inputs: Shape) -> Parts:
        """Make the factors."""
        axis = feature_axis(inputs[0])
        shape = [inputs[0][axis - 1], *[1] * (len(inputs[0]) - axis)]
        return Parts(modules.LayerScale(shape, self.init_values))
