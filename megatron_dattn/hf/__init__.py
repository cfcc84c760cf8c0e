"""The model for Hugging Face's transformers, on one device and in plain PyTorch.

These files are copied beside exported weights and run without this package: they import torch,
transformers and each other, nothing else of ours.
"""
