"""Keras-style networks: the layers, blocks and graph of a recipe's `model.layers`, as one ordinary torch module.

`read_network` reads and checks, without building anything; `Network.build` builds.
"""

from kw_lightning.keras.layer import LAYERS
from kw_lightning.keras.network import Network, SummaryRow, read_network

__all__ = ["LAYERS", "Network", "SummaryRow", "read_network"]
