"""TOAST, transfer learning by top-down attention steering, as a method of Hugging Face PEFT.

Importing the package registers the method; from then on `TopDownConfig` works wherever PEFT takes a config, and saved
adapters load with `PeftModel.from_pretrained`.
"""

from .callback import FeedbackCallback, feedback_statistics
from .config import OFFICIAL_STAGES, TopDownConfig
from .drafting import draft_with_first_pass
from .explanation.explain import explain
from .explanation.explanation import Explanation
from .explanation.swap import swapped_features
from .gate_fitting import fit_gate
from .initialization import initialize_feedback
from .model import TopDownModel
from .official import from_official_checkpoint
from .registration import register
from .requested_prompt import prompt_from
from .stored_features import StoredFeatures, store_features

__version__ = "0.1.0"
__all__ = [
    "OFFICIAL_STAGES",
    "Explanation",
    "FeedbackCallback",
    "StoredFeatures",
    "TopDownConfig",
    "TopDownModel",
    "draft_with_first_pass",
    "explain",
    "feedback_statistics",
    "fit_gate",
    "from_official_checkpoint",
    "initialize_feedback",
    "prompt_from",
    "store_features",
    "swapped_features",
]

register(TopDownConfig, TopDownModel)
