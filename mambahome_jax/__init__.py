"""Mamba-HoME in JAX: 3D medical image segmentation with Mamba layers and hierarchical soft mixtures of experts.

Names load when they are first used, so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["MODEL_SIZES", "DataProperties", "ModelConfig"],
        "errors": [
            "CheckpointError",
            "ConfigError",
            "DatasetError",
            "MambaHomeError",
            "OutputError",
            "ScanWarning",
            "TrainingError",
        ],
        "imaging.volume": ["Volume", "read_labels", "read_volume", "write_volume"],
        "imaging.geometry": ["reorient", "resample", "resample_to"],
        "evaluation.evaluate": ["evaluate"],
        "evaluation.metrics": ["assd", "dice", "hd95", "nsd"],
        "preprocessing.dataset": ["preprocess"],
        "preprocessing.examine": ["check"],
        "preprocessing.plan_folder": ["plan"],
        "reporting.report": ["report"],
        "inference.batch": ["infer"],
        "inference.postprocess": ["volumes_ml"],
        "inference.segment": ["segment"],
        "inference.sliding_window": ["sliding_window"],
        "model.home": ["HoME", "SoftMoE"],
        "model.layers": ["Numerics"],
        "model.mamba": ["BiMamba", "Mamba"],
        "model.baselines.segmamba": ["SegMamba"],
        "model.network": ["MambaHoME"],
        "weights.weights": ["export_official", "load_model"],
        "training.disk": ["clean"],
        "training.losses": ["dice_ce"],
        "training.runs": ["train"],
        "version": ["__version__"],
    },
)

del lazy_loader
