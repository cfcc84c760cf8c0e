"""Kernels that compute one part of the attention, behind one small interface."""
