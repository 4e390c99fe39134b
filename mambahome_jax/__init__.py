"""Mamba-HoME in JAX: 3D medical image segmentation with Mamba layers and hierarchical soft mixtures of experts.

Names load when they are first used, so that importing this package costs nothing; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

del lazy_loader
