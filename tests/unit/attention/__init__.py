"""Tests of megatron_dattn.attention."""
