"""The schema of a recipe: every field, its meaning and its bounds.

A field stands here only if the code reads it. The strings below the fields are their documentation: they make
docs/recipes.md and the JSON Schema.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
FRACTION = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe; frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Base(Section):
    """The frozen model."""

    repo: str
    """A Hub name, a folder, or `builtin:base` for the embedded one."""
    revision: str | None = None
    """A branch, tag or commit of the Hub repository; the commit is recorded."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the frozen weights of linear layers are held: nf4 (4 bits, with quantised scales) and int8 need
    `lora_kit[bnb]`. The adapter is trained in full precision all the same."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the base computes in; the adapter's master weights are always fp32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation of transformers; auto attends to each packed example by itself where a probe of the
    model finds that right, and is the model's own default elsewhere. A run keeps what was chosen."""
    stop_token: str | None = None
    """The token that ends an answer; by default the tokenizer's end of sequence. A base that never saw that token in
    pretraining cannot learn to stop with it."""
    trust_remote_code: bool = False
    """Run the Python files of the base's repository."""


class Data(Section):
    """The examples."""

    train: str
    """A file (JSON, JSONL, CSV, Parquet), a folder of them, a Hub name `name:config@revision[split]`, or
    `builtin:quickstart.train.jsonl`."""
    validation: str | FRACTION | None = None
    """Held-out examples: a source like `train`, or the share of `train` to hold out."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"] | None = None
    """How a record is laid out; found out from the columns when not named."""
    columns: dict[str, str] = {}
    """Renames: the format's column name to the file's, e.g. `{prompt: question}`."""
    template: str | None = None
    """A jinja file that replaces the tokenizer's chat template."""
    sequence_length: int = Field(2048, gt=1)
    """The most tokens an example may have."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer example."""
    max_examples: int | None = Field(None, gt=0)
    """Read only the first so many records of `train`."""


class Adapter(Section):
    """The trained low-rank matrices."""

    rank: int = Field(16, gt=0)
    """Columns of B, rows of A."""
    alpha: int = Field(32, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A; the only live dropout of the run."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Which layers get an adapter: all linear ones (not the head, and in a mixture neither routers nor experts), or a
    list of names; experts are named like `experts.gate_up_proj`."""


class Objective(Section):
    """The loss: cross-entropy of the trained tokens (supervised fine-tuning)."""

    train_on: Literal["assistant", "all"] = "assistant"
    """Train the answers with the token that ends them, or every token."""


class Optim(Section):
    """AdamW and its learning rate."""

    learning_rate: float = Field(2e-4, gt=0)
    """The highest of the run; LoRA wants about ten times that of full fine-tuning."""
    betas: Annotated[tuple[FRACTION, FRACTION], Field(strict=False)] = (0.9, 0.999)
    """How slowly the two moments move."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; of the adapter's weights."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Where the gradient's norm is clipped; null leaves it."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls to zero after the warm-up."""
    warmup: float = Field(0.03, ge=0, le=1)
    """The share of the run, in examples, over which the rate rises."""


class Train(Section):
    """How long, and in which portions."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps of the whole run; or name epochs."""
    epochs: float | None = Field(None, gt=0)
    """Visits of every example; or name steps."""
    batch_size: int = Field(16, gt=0)
    """Examples an optimizer step, over ALL processes; accumulation follows from it."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """The most tokens that one process computes at once; examples are packed into it. auto takes 2,048 on a CPU, and on
    a GPU the most of 2,048 to 16,384 that fits, but never less than `data.sequence_length`. A run keeps what was
    chosen."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Compute each layer's activations twice instead of keeping them: less memory, a third more time. auto does so only
    where fewer than 4,096 tokens would fit without."""
    kernels: Literal["auto", "none"] = "auto"
    """Which parts of a step lora_kit computes by its own fast code: auto takes those that give this model's own
    numbers, none leaves all to transformers and peft."""
    seed: int = Field(0, ge=0)
    """Of the order of the examples, of A's start and of dropout."""
    step_timeout: float | None = Field(None, gt=0)
    """Seconds without a sign of life that are a hang, which ends in a restart; by default ten times the longest so far,
    and at least 60."""
    max_loss: float | None = Field(None, gt=0)
    """A step with a higher loss is skipped, as one whose loss is no number always is."""
    max_norm: float | None = Field(None, gt=0)
    """A step whose gradient has a larger norm, before clipping, is skipped."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("name exactly one of steps and epochs")
        return self


class Checkpoint(Section):
    """What is kept on disk."""

    every_steps: int = Field(100, gt=0)
    """A durable checkpoint after every so many steps, and after the last."""
    every_seconds: float = Field(30.0, gt=0)
    """In between, the newest finished step becomes durable whenever the last write is so long ago; no step waits."""
    keep: int = Field(3, ge=2)
    """How many of the newest stay."""
    keep_every: int | None = Field(None, gt=0)
    """Those of every so many steps stay too; a file named `pinned` in a checkpoint keeps that one."""
    best: bool = False
    """Keep the one with the lowest held-out loss too; takes `evaluate.every_steps`."""


class Evaluate(Section):
    """What is measured on held-out examples: at the end of base and adapter, and on the way of the adapter."""

    every_steps: int | None = Field(None, gt=0)
    """Measure the held-out loss after every so many steps, and keep a checkpoint there."""
    generate: int = Field(0, ge=0)
    """How many validation examples are answered by generation at the end, for exact match; the first answers are also
    logged at every evaluation on the way."""


class Hub(Section):
    """Where the last checkpoint is published when the run has ended; a push that fails never fails the run, and
    `lora-kit push` repeats it."""

    repo: str | None = None
    """A Hub repository, `user/name`, made if there is none; null pushes nothing."""
    private: bool = False
    """Make the repository private; refused if it is there and public."""
    revision: str | None = None
    """A branch, made if there is none; by default the main one."""
    licence: str | None = None
    """The adapter's licence as the Hub names it, e.g. `apache-2.0`, for the model card."""

    @model_validator(mode="after")
    def _name(self) -> "Hub":
        if self.repo is not None and not HUB_NAME.fullmatch(self.repo):
            raise ValueError(f"repo is {self.repo!r}; expected user/name, e.g. me/first-adapter")
        return self


class Track(Section):
    """Trackers that follow metrics.jsonl. They find their servers and credentials where they always do."""

    names: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Field(strict=False)] = ()
    """Which; their packages come with `lora_kit[trackers]`."""
    project: str = Field("lora_kit", min_length=1)
    """What groups runs: project of wandb and trackio, experiment of MLflow."""
    run: str | None = Field(None, min_length=1)
    """The run's name there; by default that of its folder."""


class Recipe(Section):
    """A whole recipe."""

    base: Base
    data: Data
    adapter: Adapter = Adapter()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    hub: Hub = Hub()
    track: Track = Track()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """Where relative paths start: the recipe file's folder."""
        return self._folder

    @model_validator(mode="after")
    def _fields_that_need_each_other(self) -> "Recipe":
        tokens = self.train.micro_batch_tokens
        if isinstance(tokens, int) and tokens < self.data.sequence_length:
            raise ValueError(
                f"train.micro_batch_tokens is {tokens}, less than data.sequence_length "
                f"({self.data.sequence_length}); an example is never split, so raise the one or lower the other"
            )
        if self.evaluate.every_steps and self.data.validation is None:
            raise ValueError("evaluate.every_steps needs held-out examples; set data.validation")
        if self.checkpoint.best and not self.evaluate.every_steps:
            raise ValueError("checkpoint.best needs losses to compare; set evaluate.every_steps")
        return self
