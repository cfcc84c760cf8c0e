"""The label of text tokens that nothing is learned from."""

IGNORED_LABEL = -100
"""PyTorch's own `ignore_index`, and Hugging Face's."""
