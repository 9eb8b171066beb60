"""`TopDownConfig`: what a user can choose."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from .config_checks import TRAINABLE_PARTS, check_combinations, check_values, parts_of, warn_of_no_effect
from .saved_adapter import SavedAdapter

# How the official code trains each of its stages. It has no pre-tuning for ViT; the weight is that in its `var_loss`.
OFFICIAL_STAGES: dict[str, dict[str, Any]] = {
    "vit-pretuning": {"trainable_parts": ["prompt", "linear1", "linear2"], "variational_weight": 0.1},
    "vit-tuning": {"trainable_parts": ["prompt", "linear1", "linear2"]},
    "vit-lite": {"trainable_parts": ["prompt", "transform", "linear1", "linear2"], "r": 4, "lora_alpha": 1},
    "convnext-tuning": {"trainable_parts": ["prompt", "linear1", "linear2"]},
    "llama-pretuning": {"trainable_parts": ["prompt", "linear1", "linear2"], "variational_weight": 0.01},
    "llama-tuning": {"trainable_parts": ["prompt", "linear2"]},
    "llama-lite": {"trainable_parts": ["prompt", "linear1", "linear2"], "r": 4, "lora_alpha": 1},
}
# What `TopDownConfig.for_images` sets.
_FOR_IMAGES: dict[str, Any] = {
    "r": 8,
    "pass2_target_modules": "all-linear",
    "pass2_lora_alpha": 16,
    "pass2_bias": "all",
}

# Where a new adapter starts from. For this run only: neither saved, nor taken from a file, which could name anything.
_RUNTIME_OPTIONS: dict[str, Any] = {
    "pretrained_feedback": None,
    "pretrained_revision": None,
    "pretrained_subfolder": None,
    "share_pretrained_feedback": False,
}
_BASE_FEEDBACK: dict[str, Any] = dict.fromkeys(
    ["base_feedback", "base_feedback_revision", "base_feedback_subfolder", "base_feedback_sha256"]
)


@dataclass
class TopDownConfig(PeftConfig):
    """Configuration of TOAST, top-down attention steering (https://arxiv.org/abs/2305.15542).

    The frozen model runs once. Every token of its output is weighted by how similar it is to a learned *prompt* and
    its channels go through a learned linear map, the *transform*. A chain of linear layers carries the result from the
    last block to the first: `linear1` of a block passes it on downwards, `linear2` turns it into what is added to the
    input of that block's value projection when the model runs a second time. The second output is the result.
    In a ConvNet the blocks are the stages, and the feedback is added to the input of the stage; for the first one, to
    the image.

    `TopDownConfig.official_stage("vit-tuning")` trains what the official code trains; `OFFICIAL_STAGES` lists all.

    Args:
        r: rank of the feedback layers. 0 trains full `d x d` matrices; above 0 (TOAST-Lite) each is a fixed matrix
            plus a trained product of rank `r`.
        lora_alpha: the low-rank product is scaled by `lora_alpha / r`. The official code uses `lora_alpha=1`, `r=4`.
        lora_dropout: dropout on the input of the low-rank product.
        transform_r: rank of the channel transform. 0 trains a full `d x d` matrix, which in TOAST-Lite is most of the
            adapter; above 0 it is the identity plus a product of that rank.
        feedback_from: the feedback starts from the output of block `feedback_from - 1`; later blocks run only in the
            second pass. A block index (in a ConvNet, of a stage), or a fraction of the depth as a float. Default: the
            last block.
        feedback_to: the feedback reaches down to block `feedback_to`; earlier blocks run only in the first pass. A
            block index, or a fraction of the depth as a float. A forward costs
            `(feedback_from + L - feedback_to) / L` times that of the base model with its `L` blocks.
        trainable_parts: which of "prompt", "transform", "linear1", "linear2", with `pass2_target_modules` "pass2"
            and with `feedback_to_output` "output" are trained. Default: all that there are.
        init_weights: True starts as an exact no-op (`linear1` identity, in a ConvNet the nearest to it, and `linear2`
            zero). False is the random initialisation of the official code, from which the adapted output differs from
            the base model's.
        init_prompt: "features" starts the prompt at the mean normalised feature of one short forward with random
            tokens or a noise image, always the same ones; it is similar to nearly all tokens of real data. With
            `init_weights=False` it chooses the sign of the official random prompt. Where the model cannot run by
            itself the prompt is random and a warning says so. "random" cuts off half of the tokens, or all.
        target_modules: names or a regular expression of the value projections, one in each block. Found by the model
            type when not given. What is known or looks to compute something else than values is refused.
        exclude_modules: names or a regular expression of value projections to leave alone.
        layers_to_transform: indices of the blocks that receive feedback. Default: all from `feedback_to` to
            `feedback_from - 1`.
        modules_to_save: modules besides the feedback that are trained and saved, for example a new classifier.
        trainable_token_indices: indices of tokens whose embeddings are trained too, as in `LoraConfig`.
        normalize_features: whether the feedback starts from the features after the model's final norm. Default: by the
            model type (yes for ViT-like models, no for LLaMA-like models). In a ConvNet it is about what the prompt is
            compared with; the feedback itself starts from the features as they are. There the default is yes if the
            model has a final norm and the feedback starts from its last stage, which is the one the norm fits.
        double_value_bias: add the bias of the value projection once more in the second pass, as the official ViT code
            does. Needed for converted official checkpoints; it makes the output differ from the base model's even when
            the feedback is zero.
        skip_closed_rows: in inference (under `torch.no_grad()`) run pass 2 only for the rows of a batch of which the
            prompt selects some token. The others get the output of pass 1, and if there is no such row the forward
            costs what one of the base model does. With a key-value cache pass 2 is left out for a row until some token
            of it is selected, with some kinds of caches for the whole batch until then. Not in a compiled model.
        gate: whether the adapter is closed for inputs that it is not for, so that these get the output of the base
            model, bit for bit. "sequence" looks at a row up to each token (at the whole row in a model whose tokens
            see those after them, and for images), "token" at each token alone. It is open everywhere until
            `toast_peft.fit_gate` is called. Default: None, no gate.
        feedback_scale: what the feedback is multiplied by, as the scale of a LoRA. A new or loaded adapter starts with
            it; `model.set_feedback_scale(...)` changes it later, and leaves this option, which is saved, as it is.
        feedback_to_output: whether the selected features also go to the output of the backbone, in pass 2, by one more
            `d x d` matrix (Lite: of rank `r`) that starts at zero: `final_norm(h) + W z`. Default: no.
        pass2_target_modules: linear layers of the blocks that get LoRA in pass 2, under the gate; pass 1 stays that of
            the base model. Names, as the ends of full names; a regular expression; or "all-linear" for all, but those
            of cross-attention. Only blocks from `feedback_to` on run in pass 2. Default: None, no LoRA.
        pass2_r: its rank. 0 with `pass2_bias="all"` adds the biases alone.
        pass2_lora_alpha: its product is scaled by `pass2_lora_alpha / pass2_r`.
        pass2_lora_dropout: dropout on its input.
        pass2_bias: "all" adds a bias to each of these layers as well, in pass 2 only. Default: "none".
        variational_weight: how much the variational loss counts in training: the mean squared difference between the
            input of a block and `linear1` of its output, summed over the blocks. It is added to `outputs.loss`; where
            the loss is computed outside of the model, add `model.variational_loss()` to it. For pre-tuning; the
            official code uses 0.1 for ViT and 0.01 for LLaMA and ConvNeXt. Default: 0, not computed.
        variational_ignore_padding: leave tokens with `attention_mask` 0 out of it. The official code does not.
        pretrained_feedback: path or Hub id of a saved TOAST adapter whose feedback the new one starts with, instead of
            `init_weights`; what is trained is as this config says. Both may be full or Lite, of any rank and
            `lora_alpha`. For this run only, as are the next three: it is not saved, and ignored in a file.
        pretrained_revision: branch, tag or commit of `pretrained_feedback` on the Hub.
        pretrained_subfolder: folder in `pretrained_feedback` that has the adapter.
        share_pretrained_feedback: whether the fixed matrices of a Lite adapter that starts from a full one are left
            out of its file, which then needs the other to be loaded: `base_feedback` says where that is.
            Default: no, the file has everything.
        base_feedback, base_feedback_revision, base_feedback_subfolder, base_feedback_sha256: the full adapter that the
            fixed matrices are from, and their hash. Filled in by `share_pretrained_feedback`. In the file of an
            adapter from the Hub, `base_feedback` can only be a Hub id; of one in a local folder, any path as well.
        gate_is_causal, gate_report: for each list of blocks, whether its tokens see only those before them; and how
            well the gate separates. Filled in by `fit_gate`; leave them alone.
        backbone_type, num_blocks, hidden_size: the model the adapter was made for. Filled in when it is made and
            compared when it is loaded; leave them alone.

    Raises:
        ValueError: for a value that makes no sense, naming it.
    """

    r: int = field(default=0, metadata={"help": "Rank of the feedback layers; 0 trains full matrices, > 0 is Lite."})
    lora_alpha: float = field(default=8, metadata={"help": "Lite: the low-rank product is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Lite: dropout on the input of the low-rank product."})
    transform_r: int = field(
        default=0,
        metadata={"help": "Rank of the channel transform; 0 trains a full matrix, > 0 the identity plus a product."},
    )
    feedback_from: int | float | None = field(
        default=None,
        metadata={
            "help": "The feedback starts from the output of block feedback_from - 1: a block index, or a fraction of "
            "the depth as a float. Default: the last block. Smaller ('early' feedback) is cheaper."
        },
    )
    feedback_to: int | float = field(
        default=0,
        metadata={
            "help": "The feedback reaches down to this block: a block index, or a fraction of the depth as a float. "
            "Larger ('late' feedback) is cheaper."
        },
    )
    trainable_parts: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Which of 'prompt' (weighs the tokens), 'transform' (maps the channels), 'linear1' (carries the "
            "feedback from block to block), 'linear2' (turns it into a change of the values), with "
            "pass2_target_modules 'pass2' and with feedback_to_output 'output' are trained. Default: all."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as an exact no-op, False with the official random initialisation."},
    )
    init_prompt: Literal["features", "random"] = field(
        default="features",
        metadata={
            "help": "'features' starts the prompt at the mean feature of one short forward with random inputs, so "
            "that tokens get through; 'random' at random."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or a regular expression of the value projections, one in each block. Found by the model "
            "type when not given."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of value projections to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks that receive feedback. Default: all of the loop."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the feedback that are trained and saved, for example ['classifier']."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Indices of tokens whose embeddings are trained too; a dict names the embedding layer, for "
            "example {'embed_tokens': [0, 1]}."
        },
    )
    normalize_features: bool | None = field(
        default=None,
        metadata={"help": "Start from the features after the model's final norm. Default: by the model type."},
    )
    double_value_bias: bool = field(
        default=False,
        metadata={"help": "Add the value bias once more in the second pass, as the official ViT code does."},
    )
    skip_closed_rows: bool = field(
        default=False,
        metadata={"help": "In inference run the second pass only for rows of which some token is selected."},
    )
    feedback_scale: float = field(
        default=1.0,
        metadata={"help": "What the feedback is multiplied by when the adapter is made or loaded; 0 is none."},
    )
    gate: Literal["sequence", "token"] | None = field(
        default=None,
        metadata={
            "help": "Leave inputs alone that the adapter is not for: 'sequence' looks at a row up to each token, "
            "'token' at each token alone. Fitted by `toast_peft.fit_gate`. Default: no gate."
        },
    )
    gate_is_causal: dict[str, bool] | None = field(
        default=None,
        metadata={"help": "For each list of blocks, whether tokens see only those before them. Filled in."},
    )
    gate_report: dict[str, float] | None = field(
        default=None, metadata={"help": "How well the gate separates. Filled in."}
    )
    feedback_to_output: bool = field(
        default=False,
        metadata={"help": "Add the selected features, by one more matrix, to the output of the second pass."},
    )
    pass2_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or a regular expression of linear layers that get LoRA in the second pass only, or "
            "'all-linear' for all in the blocks that run in it. Default: none."
        },
    )
    pass2_r: int = field(default=8, metadata={"help": "Rank of the LoRA of pass2_target_modules; 0: biases only."})
    pass2_lora_alpha: float = field(
        default=8, metadata={"help": "Its product is scaled by pass2_lora_alpha / pass2_r."}
    )
    pass2_lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of that product."})
    pass2_bias: Literal["none", "all"] = field(
        default="none",
        metadata={"help": "'all' adds a bias to each of pass2_target_modules, in the second pass only."},
    )
    variational_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the variational loss in training (pre-tuning), by which `linear1` learns to compute "
            "the input of a block from its output. Officially 0.1 for ViT, 0.01 for LLaMA and ConvNeXt."
        },
    )
    variational_ignore_padding: bool = field(
        default=False, metadata={"help": "Leave tokens with attention_mask 0 out of the variational loss."}
    )
    pretrained_feedback: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of a saved TOAST adapter whose feedback this one starts from."},
    )
    pretrained_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of pretrained_feedback on the Hub."}
    )
    pretrained_subfolder: str | None = field(
        default=None, metadata={"help": "Folder in pretrained_feedback that has the adapter."}
    )
    share_pretrained_feedback: bool = field(
        default=False,
        metadata={"help": "Lite: store a reference to pretrained_feedback instead of its matrices, which stay fixed."},
    )
    base_feedback: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the full adapter that the fixed matrices are from. Filled in."},
    )
    base_feedback_revision: str | None = field(default=None, metadata={"help": "Its commit. Filled in."})
    base_feedback_subfolder: str | None = field(default=None, metadata={"help": "Its folder. Filled in."})
    base_feedback_sha256: str | None = field(default=None, metadata={"help": "Hash of the matrices. Filled in."})
    backbone_type: str | None = field(
        default=None, metadata={"help": "Model type the adapter was made for. Filled in, not to be set."}
    )
    num_blocks: int | list[int] | None = field(
        default=None,
        metadata={
            "help": "Number of blocks the adapter was made for, a list if encoder and decoder get feedback. Filled "
            "in, not to be set."
        },
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden size the adapter was made for. Filled in, not to be set."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only a file gives the type as a plain string. It may be downloaded, and so cannot name any folder to be read.
        is_from_file = self.peft_type is not None and not isinstance(self.peft_type, PeftType)
        self.reference_in_file = (self.base_feedback, self.base_feedback_subfolder) if is_from_file else None
        if is_from_file:
            self._drop_runtime_options()
        self.peft_type = PeftType("TOPDOWN")
        if isinstance(self.pretrained_feedback, os.PathLike):
            self.pretrained_feedback = os.fspath(self.pretrained_feedback)
        check_values(self, [*TopDownConfig.__annotations__, "inference_mode"])
        # Only a config that was saved with an adapter is made with these facts about the base model.
        self.is_of_saved_adapter = self.num_blocks is not None
        self.saved_adapter: SavedAdapter | None = None  # where it was read from, until it is used; never saved
        for name in ("target_modules", "exclude_modules", "pass2_target_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.trainable_parts = _in_order(self)
        check_combinations(self)
        if not self.is_of_saved_adapter:
            warn_of_no_effect(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "TopDownConfig":
        """Read the config of a saved adapter. PEFT calls this first when it loads one.

        When the adapter is added to a model with this config, its weights are checked before the model is changed.
        `PeftConfig.from_pretrained` reads the config without its weights being looked at. Only in a local folder
        `base_feedback` may be a path as well.

        Args:
            pretrained_model_name_or_path: path or Hub id.
            subfolder: folder in it.
            kwargs: those of `hf_hub_download`.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, TopDownConfig):
            arguments, _, _ = cls._split_kwargs(kwargs)
            arguments |= {} if subfolder is None else {"subfolder": subfolder}
            config.saved_adapter = SavedAdapter(pretrained_model_name_or_path, arguments, config.to_dict())
            if os.path.isdir(pretrained_model_name_or_path):
                config.reference_in_file = None
        return config

    @classmethod
    def official_stage(cls, name: str, **options: Any) -> "TopDownConfig":
        """A config that trains as the official code does in one of its stages.

        Args:
            name: a key of `OFFICIAL_STAGES`, for example "llama-pretuning".
            options: other options of the config, or other values for those that the stage sets.

        Raises:
            ValueError: if there is no such stage.
        """
        if name not in list(OFFICIAL_STAGES):
            raise ValueError(f"There is no stage {name!r}; expected one of {list(OFFICIAL_STAGES)}.")
        return cls(**OFFICIAL_STAGES[name] | options)

    @classmethod
    def for_images(cls, **options: Any) -> "TopDownConfig":
        """The most accurate variant for classifiers of images: TOAST-Lite with LoRA and biases in pass 2.

        It is for models that are a list of blocks, such as ViT, and was measured in `docs/results.md`.

        Args:
            options: other options of the config, or other values for those that this sets.
        """
        return cls(**_FOR_IMAGES | options)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The options in a file.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            options = super().from_json_file(path_json_file, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{str(path_json_file)!r} is no JSON ({error}); expected the config of an adapter as "
                "`save_pretrained` writes it. Save or download the adapter again."
            ) from error
        if not isinstance(options, dict) or not isinstance(options.get("peft_type"), str):
            raise ValueError(
                f"{str(path_json_file)!r} does not say its `peft_type`; expected the config of an adapter as "
                "`save_pretrained` writes it. Save or download the adapter again."
            )
        return options

    def to_dict(self) -> dict[str, Any]:
        """The options that are saved."""
        return {name: value for name, value in super().to_dict().items() if name not in _RUNTIME_OPTIONS}

    def _drop_runtime_options(self) -> None:
        for name, default in _RUNTIME_OPTIONS.items():
            if getattr(self, name) != default:
                warnings.warn(
                    f"`{name}={getattr(self, name)!r}` in the file of an adapter is ignored; to start from another "
                    "adapter, set it on the config in your own code.",
                    stacklevel=4,
                )
                setattr(self, name, default)

    def clear_pretrained(self) -> None:
        """Forget where the adapter starts from: its weights are then its own."""
        for name, default in (_RUNTIME_OPTIONS | _BASE_FEEDBACK).items():
            setattr(self, name, default)

    def feedback_range(self, num_blocks: int) -> tuple[int, int]:
        """The blocks of the feedback loop, `feedback_to <= l < feedback_from`, in a model with `num_blocks` blocks.

        Returns:
            `feedback_from` and `feedback_to` as block indices.

        Raises:
            ValueError: if the loop is empty or exceeds the model.
        """
        bounds = [num_blocks if self.feedback_from is None else self.feedback_from, self.feedback_to]
        first, last = (round(b * num_blocks) if isinstance(b, float) else b for b in bounds)
        if not 0 <= last < first <= num_blocks:
            raise ValueError(
                f"The feedback from block {first} (`feedback_from={self.feedback_from}`) down to block {last} "
                f"(`feedback_to={self.feedback_to}`) does not fit a model with {num_blocks} blocks; expected "
                f"0 <= feedback_to < feedback_from <= {num_blocks}. A fraction, as a float, fits any depth."
            )
        return first, last


def _in_order(config: TopDownConfig) -> list[str]:
    """The parts that are trained, by default all that there are."""
    parts = config.trainable_parts
    chosen = [parts] if isinstance(parts, str) else parts_of(config) if parts is None else parts
    return [part for part in TRAINABLE_PARTS if part in chosen]
