"""What `import mambahome_jax` offers: `__init__.py` loads these names when they are first used."""

from .config import MODEL_SIZES as MODEL_SIZES, DataProperties as DataProperties, ModelConfig as ModelConfig
from .errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DatasetError as DatasetError,
    MambaHomeError as MambaHomeError,
    OutputError as OutputError,
    ScanWarning as ScanWarning,
    TrainingError as TrainingError,
)
from .evaluation.evaluate import Evaluated as Evaluated, evaluate as evaluate
from .evaluation.metrics import assd as assd, dice as dice, hd95 as hd95, nsd as nsd
from .imaging.geometry import reorient as reorient, resample as resample, resample_to as resample_to
from .imaging.pictures import show as show
from .imaging.volume import (
    Volume as Volume,
    read_labels as read_labels,
    read_volume as read_volume,
    write_volume as write_volume,
)
from .inference.batch import Inferred as Inferred, infer as infer
from .inference.postprocess import volumes_ml as volumes_ml
from .inference.segment import segment as segment
from .inference.sliding_window import sliding_window as sliding_window
from .model.baselines.segmamba import SegMamba as SegMamba
from .model.baselines.unet import PlainUNet as PlainUNet, ResEncUNet as ResEncUNet
from .model.home import HoME as HoME, SoftMoE as SoftMoE
from .model.layers import Numerics as Numerics
from .model.mamba import BiMamba as BiMamba, Mamba as Mamba
from .model.network import MambaHoME as MambaHoME
from .preprocessing.dataset import Preprocessed as Preprocessed, preprocess as preprocess
from .preprocessing.examine import Checked as Checked, check as check
from .preprocessing.plan_folder import FolderPlan as FolderPlan, plan as plan
from .reporting.report import Reported as Reported, report as report
from .training.callbacks import Callback as Callback
from .training.disk import Cleaned as Cleaned, clean as clean
from .training.duel import DuelResult as DuelResult, duel as duel
from .training.losses import dice_ce as dice_ce
from .training.runs import TrainResult as TrainResult, train as train
from .training.validation import Validation as Validation
from .version import __version__ as __version__
from .weights.export import Exported as Exported, export as export
from .weights.model_path import load_model as load_model
from .weights.weights import export_official as export_official
