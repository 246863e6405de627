"""Experts and linear maps with int8 or bfloat16 weights, for inference."""
