"""Stands for apex: the names that megatron-core looks for, with their arguments, on the host."""
