"""Parameter-efficient sparse training (PST) inside Hugging Face PEFT. Importing this package registers the method."""

from ._registration import register as _register
from ._version import __version__
from .architecture import Projections, find_heads, find_neurons
from .callback import PSTCallback
from .compact import CompactSizes, compact_checkpoint, expand_checkpoint, load_compact
from .comparison import SparsityComparison, compare_sparsity
from .config import PSTConfig
from .distillation import DistillationMixin, DistillationTrainer, distillation_loss
from .heads import prune_heads
from .inference import InferenceReport, dense_again, sparse_inference
from .keeping import merge_keeping_zeros
from .layer import PSTLayer
from .masking import num_pruned
from .model import PSTModel, get_sparsity, update_sparsity
from .model_card import update_model_card
from .one_shot import prune_once
from .optimizer import create_pst_optimizer, parameter_groups
from .patterns import topk_mask
from .report import SparsityReport, report_checkpoint, report_model
from .resuming import last_whole_checkpoint
from .schedule import cubic_sparsity
from .shrinking import ShrinkReport, shrink

_register()


__all__ = [
    "CompactSizes",
    "DistillationMixin",
    "DistillationTrainer",
    "InferenceReport",
    "PSTCallback",
    "PSTConfig",
    "PSTLayer",
    "PSTModel",
    "Projections",
    "ShrinkReport",
    "SparsityComparison",
    "SparsityReport",
    "__version__",
    "compact_checkpoint",
    "compare_sparsity",
    "create_pst_optimizer",
    "cubic_sparsity",
    "dense_again",
    "distillation_loss",
    "expand_checkpoint",
    "find_heads",
    "find_neurons",
    "get_sparsity",
    "last_whole_checkpoint",
    "load_compact",
    "merge_keeping_zeros",
    "num_pruned",
    "parameter_groups",
    "prune_heads",
    "prune_once",
    "report_checkpoint",
    "report_model",
    "shrink",
    "sparse_inference",
    "topk_mask",
    "update_model_card",
    "update_sparsity",
]
