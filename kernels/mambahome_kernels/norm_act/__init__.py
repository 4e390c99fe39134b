"""Sum of instance norms, and activation."""

from mambahome_kernels.norm_act.api import norm_act

__all__ = ["norm_act"]
