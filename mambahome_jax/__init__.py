"""Mamba-HoME in JAX: 3D medical image segmentation."""
