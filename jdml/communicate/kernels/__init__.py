"""Fused kernels, where the plain JAX form reads memory more often than it must."""
