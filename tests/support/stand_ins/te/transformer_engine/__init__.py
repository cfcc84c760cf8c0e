"""Stands for Transformer Engine: its names, arguments, parameters, state and refusals, on the host.

What megatron-core imports of it and a model of ours calls, by the sources of 2.6. Products are
torch's in the dtype of their factors, also where they would be FP8; which sizes FP8 takes, and what
state it keeps, is Transformer Engine's.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"
