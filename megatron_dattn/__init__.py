"""megatron_dattn: distributed pretraining of vision-language models with Decomposed Attention."""

__version__ = "0.1.0"
