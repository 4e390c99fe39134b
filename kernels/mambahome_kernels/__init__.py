"""Kernels of Mamba-HoME that are useful beyond it."""

from mambahome_kernels.backends import Unsupported
from mambahome_kernels.conv3d.api import conv3d
from mambahome_kernels.norm_act.api import norm_act
from mambahome_kernels.selective_scan.api import choose_backend, selective_scan

__all__ = ["Unsupported", "choose_backend", "conv3d", "norm_act", "selective_scan"]
