"""The schema of a recipe: every field with its type, default, bounds and description.

The string below a field is its description. docs/recipes.md and docs/recipe.schema.json are generated from these
strings. A test fails for a field that no code reads.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, model_validator

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
REMOTE_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s?#@]+", re.IGNORECASE)  # no credentials, no query
FRACTION = Annotated[float, Field(gt=0, lt=1)]
COUNT = Annotated[int, Field(gt=0, le=1_000_000_000)]
SECONDS = Annotated[float, Field(gt=0, le=1e9)]
BOUND = Annotated[float, Field(gt=0, le=1e30)]  # representable in float32
FORMAT = Literal[
    "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference", "unpaired", "unpaired-messages"
]
SOURCE_NAME = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
LAYERS = Annotated[int, Field(ge=0, lt=10_000)] | Annotated[str, Field(pattern=r"^[0-9]{1,4}-[0-9]{1,4}$")]
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # not allowed in paths, names and columns


class Section(BaseModel):
    """A section of a recipe. Sections are immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        for name, value in self:
            parts = (
                [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
            )
            if any(isinstance(part, str) and CONTROL.search(part) for part in parts):
                raise ValueError(f"{name} is {value!r}, which contains a control character")
        return self


class Base(Section):
    """The base model, whose weights stay frozen."""

    repo: str
    """A Hub name, a local folder, or `builtin:base` for the tiny model in lora_kit."""
    revision: str | None = None
    """A branch, tag or commit of the Hub repository. The run records the commit that it resolves to."""
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Quantisation of the frozen linear layers: nf4 (4 bits, with quantised scales) or int8, which need
    `lora_kit[bnb]`; or fp8 for a base that was published so (a scale for each block of weights). The adapter itself is
    never quantised."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype of the base's weights and activations. The adapter's master weights are always float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation. auto computes attention separately for each packed example if a test of the model
    at start-up shows the same logits as without packing; otherwise it uses the model's default in transformers. A run
    keeps the implementation that it started with."""
    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Where the base's weights are: replicated keeps all of them on every process; sharded divides them over the
    processes and gathers each layer while it computes. auto shards a base that is estimated not to fit otherwise. The
    adapter is whole on every process, and a resume may change the placement. A single process holds the whole base."""
    stop_token: str | None = None
    """The token that ends an answer; null takes the tokenizer's end-of-sequence token. Choose a token that the base saw
    in pretraining: the adapter cannot learn to stop with a token whose frozen embedding was never trained."""
    trust_remote_code: bool = False
    """Allow transformers to run Python files from the model's repository."""

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes quantises the base."""
        return self.quantization in ("nf4", "int8")


class Source(Section):
    """A source of examples with its own settings; null takes the setting of the section `data`."""

    source: str
    """A file, a folder, a Hub dataset or a builtin file, as for `data.train`."""
    format: FORMAT | None = None
    """The format of its records."""
    columns: dict[str, str] | None = None
    """The file's name for a column of the format."""
    template: str | None = None
    """A Jinja file with the chat template of this source. `generate` and `chat` use `data.template`."""
    max_examples: COUNT | None = None
    """Read only its first N records. null takes `data.max_examples` for sources of `train`, and reads all records of
    sources of `validation`."""


class TrainSource(Source):
    """An entry of `data.train`: a source of a mixture. Without weights, the sources are joined: an epoch sees each
    example as often as the `epochs` of its source says."""

    name: SOURCE_NAME | None = None
    """The source's name in logs and tables; null takes it from the file's or the dataset's name."""
    weight: BOUND | None = None
    """Its share of the examples of the run, relative to the weights of the other sources. Either all sources have a
    weight or none; with weights, set `train.steps` and not `train.epochs`."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """How often its examples are seen in one epoch of the mixture; null is once. Needs `train.epochs`, and excludes
    weights."""


def name_of(source: str) -> str:
    """Return the name of a source that has none in the recipe, e.g. `code` for `data/code.jsonl`."""
    path = re.sub(r"^[a-z][a-z0-9+.-]*://", "", source.removeprefix("builtin:"), flags=re.IGNORECASE)
    plain = re.split(r"[:@\[]", path, maxsplit=1)[0].rstrip("/")
    stem = re.sub(
        r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt)(\.\w+)?$", "", plain.rpartition("/")[2], flags=re.IGNORECASE
    )
    return re.sub(r"[^\w.-]", "-", stem)[:64] or "source"


def _tag(value: Any) -> str:
    """Return the tag of the type that a value is validated as, so that an error is about this type only."""
    if isinstance(value, Mapping | Source):
        return "<mapping>"
    return "<list>" if isinstance(value, list | tuple) else "<plain>"


CHOICE = Discriminator(lambda value: _tag(value))
SOURCES = Annotated[
    Annotated[str, Tag("<plain>")]
    | Annotated[
        tuple[Annotated[Annotated[str, Tag("<plain>")] | Annotated[TrainSource, Tag("<mapping>")], CHOICE], ...],
        Field(strict=False),
        Tag("<list>"),
    ],
    CHOICE,
]
HELD_OUT = Annotated[
    Annotated[str | FRACTION | None, Tag("<plain>")]
    | Annotated[
        dict[SOURCE_NAME, Annotated[Annotated[str, Tag("<plain>")] | Annotated[Source, Tag("<mapping>")], CHOICE]],
        Tag("<mapping>"),
    ],
    CHOICE,
]


class Data(Section):
    """The training and validation examples."""

    train: SOURCES
    """A file (JSON, JSON Lines, CSV, TSV, text, Parquet or Arrow, also compressed), a folder of such files, a folder of
    `Dataset.save_to_disk`, a Hub dataset `name:config@revision[split]`, a URL of a file or folder
    (`s3://bucket/data`), or `builtin:quickstart.train.jsonl`. A list is a mixture of sources
    ([data.md](data.md#mixtures))."""
    validation: HELD_OUT = None
    """A source as for `train`; or a fraction, between 0 and 1, of each source of `train` to hold out; or a mapping of
    names to sources. With a mapping, or a fraction of a list, the held-out loss is also measured for each of them."""
    format: FORMAT | None = None
    """The format of the records; null detects it from their column names."""
    columns: dict[str, str] = {}
    """The file's name for a column of the format, e.g. `{prompt: question}` reads prompts from the column question."""
    template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    sequence_length: int = Field(2048, gt=1, le=1_000_000_000)
    """Maximum length of an example, in tokens."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with an example longer than `sequence_length`: stop with an error, leave it out, or cut it. split cuts
    plain text (the format text) into pieces, so that each of its tokens is trained once, and takes a .txt file as
    one text; with it, longer examples of other formats are an error."""
    overlap: int = Field(1, ge=1, le=1_000_000_000)
    """With `overlong: split`, the number of tokens at the start of a piece that repeat the end of the piece before it.
    They are context and are not trained again."""
    bad_records: Literal["error", "drop"] = "error"
    """What to do with records that cannot be read, do not fit the format or cannot be rendered: stop with an error that
    lists the first 20, or leave them out; a note then gives their number and names the first ten."""
    max_examples: COUNT | None = None
    """Read only the first N records of `train`, or of each of its sources; null reads all of them."""

    @property
    def mixture(self) -> tuple[TrainSource, ...]:
        """The entries of `train` if it is a list, otherwise nothing."""
        listed = () if isinstance(self.train, str) else self.train
        return tuple(TrainSource(source=entry) if isinstance(entry, str) else entry for entry in listed)

    @property
    def train_sources(self) -> dict[str, TrainSource]:
        """The sources of `train` by their names, in the order of the recipe."""
        entries = (TrainSource(source=self.train),) if isinstance(self.train, str) else self.mixture
        return {entry.name or name_of(entry.source): entry for entry in entries}

    @property
    def validation_sources(self) -> dict[str, Source]:
        """The sources of `validation` by their names; empty for a fraction of `train`, or if there are none."""
        if isinstance(self.validation, str):
            return {name_of(self.validation): Source(source=self.validation)}
        sets = self.validation if isinstance(self.validation, dict) else {}
        return {name: Source(source=given) if isinstance(given, str) else given for name, given in sets.items()}

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """The sources of the validation examples, which are those of `train` for a fraction of it."""
        held_out = self.train_sources if isinstance(self.validation, float) else self.validation_sources
        return tuple(held_out.values())

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources of `train` and `validation`."""
        return (*self.train_sources.values(), *self.validation_sources.values())

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.train == () or self.validation == {}:
            raise ValueError("train and validation need at least one source")
        fields = Source.model_fields.keys() & (self.validation if isinstance(self.validation, dict) else {})
        if fields:
            raise ValueError(f"validation maps names to sources, not {min(fields)}; write NAME: {{source: ...}}")
        names, mixture = [entry.name or name_of(entry.source) for entry in self.mixture], self.mixture
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train has {names.count(name)} sources named {name}; give each a `name` of its own")
        without = [name for name, entry in zip(names, mixture, strict=True) if entry.weight is None]
        if without and len(without) < len(names):
            raise ValueError(f"train: {', '.join(without)} without a weight; give every source a weight, or no source")
        if mixture and not without and any(entry.epochs is not None for entry in mixture):
            raise ValueError("train: weight and epochs both decide how often a source is seen; use only one of them")
        return self


class Adapter(Section):
    """The LoRA adapter: a pair of trained matrices A and B for each target layer."""

    rank: COUNT = 16
    """Rank of the update BA."""
    alpha: COUNT = 32
    """Scaling: the adapter's output is multiplied by alpha / rank."""
    scaling: Literal["plain", "rslora"] = "plain"
    """rslora multiplies by alpha / sqrt(rank) instead of alpha / rank, so that a large rank does not need a larger
    alpha or learning rate ([variants.md](variants.md))."""
    variant: Literal["lora", "dora"] = "lora"
    """dora also trains the norm of each row of the adapted weights, separately from their direction (DoRA). It takes
    more time than lora; layers with `dropout` are then left to peft, which computes each of them twice."""
    init: Literal["default", "pissa", "olora", "eva"] = "default"
    """The start of A and B. default: A random, B zero. pissa and olora: the strongest directions of the base's weights,
    by singular values or QR; they are subtracted again, so that the base stays unchanged, and the saved adapter has
    twice the rank. eva: A from the strongest directions of the layers' inputs in the first step, B zero."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A. All randomness of the base (dropout, layer drop, noise of routers)
    is switched off."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """The layers that get an adapter. all-linear selects every linear layer except the output head and, in a
    mixture-of-experts model, the routers and the experts. A list selects layers by name or pattern, e.g.
    `[q_proj, "layers.1?.mlp.*_proj"]`, and experts by parameter name, e.g. `experts.gate_up_proj`. In a base with a
    vision or audio tower, only the language model is adapted."""
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Layers that `targets` selects and that get no adapter, by name or pattern."""
    layers: Annotated[tuple[LAYERS, ...], Field(strict=False, min_length=1)] | None = None
    """The decoder layers that get adapters, as numbers from 0 or ranges, e.g. `[0, 1, 16-31]`; null takes all. A target
    outside of the decoder layers, such as lm_head, is adapted in any case."""
    rank_pattern: dict[str, COUNT] = {}
    """The rank of layers by name or pattern, e.g. `{down_proj: 32}`; the first pattern that matches counts."""
    alpha_pattern: dict[str, COUNT] = {}
    """The alpha of layers by name or pattern; the first pattern that matches counts. A layer that only `rank_pattern`
    names keeps `alpha`, so its scaling changes with its rank."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_copies_of_modules(cls, section: Any) -> Any:
        if isinstance(section, Mapping) and section.get("modules_to_save"):
            raise ValueError(
                "modules_to_save trains whole copies of modules: 16 bytes of memory and 12 of each snapshot for every "
                "parameter, so 12.6 GB in each checkpoint for embedding and head of an 8B Llama (1.05 billion "
                "parameters), whose adapter takes 0.5 GB. It is not supported; put lm_head into adapter.targets"
            )
        return section

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.variant == "dora" and self.init != "default":
            raise ValueError(f"variant dora starts from the base's own norms; remove init: {self.init}")
        for entry in self.layers or ():
            first, _, last = str(entry).partition("-")
            if last and int(last) < int(first):
                raise ValueError(f"layers: the range {entry} is empty; write {last}-{first}")
        return self


class SftObjective(Section):
    """`kind: sft`, supervised fine-tuning: the mean cross-entropy over the trained tokens of a batch."""

    kind: Literal["sft"] = "sft"
    """The objective: sft, or one of the preference objectives dpo, orpo, simpo and kto, which
    [objectives.md](objectives.md) explains. It also decides the formats of the data."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """The trained tokens: those of the assistant's answers including the token that ends each answer, those of the last
    answer only, or all tokens. A message with `weight: 0` is never trained."""
    reasoning: Literal["train", "mask"] = "train"
    """Whether the reasoning of a trained answer (`reasoning_content`, or `<think>` in its content) is trained, or is
    only context. The chat template decides which reasoning is in the text; most templates leave out the reasoning
    before the last question."""


POSITIVE = Annotated[float, Field(gt=0, le=1e6)]
WEIGHT = Annotated[float, Field(ge=0, le=1e6)]


class DpoObjective(Section):
    """`kind: dpo`, direct preference optimisation on pairs of a chosen and a rejected answer, relative to a reference:
    the base, or the adapter that the run begins with (`--from`). The loss is the mean over the pairs of a batch."""

    kind: Literal["dpo"]
    """Direct preference optimisation (Rafailov et al. 2023)."""
    beta: POSITIVE = 0.1
    """How strongly the model is kept near the reference: the factor of the log-ratios, and tau of IPO."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair's margin: that of DPO, the hinge loss of SLiC, or the squared error of IPO."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs whose sides are assumed to be exchanged (conservative DPO); only for the loss sigmoid."""
    length_normalised: bool = False
    """Divide the log-ratio of an answer by its number of tokens. IPO always does."""
    sft_weight: WEIGHT = 0.0
    """Weight of an added cross-entropy of the chosen answer, the mean over its tokens."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing needs the loss sigmoid, not {self.loss}; leave out one of the two")
        return self


class OrpoObjective(Section):
    """`kind: orpo`: the cross-entropy of the chosen answer plus a penalty on the odds of the rejected answer. There is
    no reference. The loss is the mean over the pairs of a batch."""

    kind: Literal["orpo"]
    """Odds ratio preference optimisation (Hong et al. 2024)."""
    beta: POSITIVE = 0.1
    """Weight of the odds ratio, lambda in the paper."""


class SimpoObjective(Section):
    """`kind: simpo`: the mean log-probability of a token of the chosen answer shall exceed that of the rejected answer
    by a margin. There is no reference. The loss is the mean over the pairs of a batch."""

    kind: Literal["simpo"]
    """Simple preference optimisation (Meng et al. 2024)."""
    beta: POSITIVE = 2.0
    """The factor of the mean log-probabilities."""
    gamma: WEIGHT = 1.0
    """The margin between the two sides, after the multiplication by beta."""


class KtoObjective(Section):
    """`kind: kto`: answers that are each labelled as desirable or undesirable, without pairs, relative to a reference
    as for dpo. The loss is the mean over the answers of a batch."""

    kind: Literal["kto"]
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024)."""
    beta: POSITIVE = 0.1
    """The factor of the log-ratios."""
    desirable_weight: WEIGHT = 1.0
    """Weight of the loss of desirable answers. The paper advises to choose both weights so that the desirable and the
    undesirable answers together weigh about the same."""
    undesirable_weight: WEIGHT = 1.0
    """Weight of the loss of undesirable answers."""


PairObjective = DpoObjective | OrpoObjective | SimpoObjective
PreferenceObjective = PairObjective | KtoObjective
OBJECTIVES: dict[str, type[Section]] = {
    "sft": SftObjective,
    "dpo": DpoObjective,
    "orpo": OrpoObjective,
    "simpo": SimpoObjective,
    "kto": KtoObjective,
}
"""The section `objective` for each of its kinds."""


def kind_of(objective: Any) -> str:
    """Return the kind of a section `objective`; `sft` if it names none, and an empty text if it is no text."""
    kind = objective.get("kind", "sft") if isinstance(objective, Mapping) else getattr(objective, "kind", "sft")
    return kind if isinstance(kind, str) else ""


OBJECTIVE = Annotated[
    Annotated[SftObjective, Tag("sft")]
    | Annotated[DpoObjective, Tag("dpo")]
    | Annotated[OrpoObjective, Tag("orpo")]
    | Annotated[SimpoObjective, Tag("simpo")]
    | Annotated[KtoObjective, Tag("kto")],
    Discriminator(kind_of),
]


class Optim(Section):
    """AdamW and the learning-rate schedule."""

    name: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit keeps AdamW's two moments in 8 bits, with a scale for every 256 values: a checkpoint then has 6 bytes
    for each trained value instead of 12."""

    learning_rate: float = Field(2e-4, gt=0, le=1000)
    """Peak learning rate. LoRA usually needs about ten times the rate of full fine-tuning."""
    betas: Annotated[tuple[FRACTION, FRACTION], Field(strict=False)] = (0.9, 0.999)
    """AdamW beta1 and beta2."""
    b_ratio: float = Field(1.0, gt=0, le=1e4)
    """The learning rate of B relative to that of A (LoRA+); `learning_rate` is the rate of A."""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    """AdamW weight decay, applied to A and B."""
    max_grad_norm: BOUND | None = 1.0
    """Clip the gradient to this L2 norm; null does not clip."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """The learning rate after the warm-up: constant; a linear or cosine decay to zero at the last step; or wsd
    (warm-up, stable, decay), which is constant and falls linearly to zero over the last part of the run."""
    decay: FRACTION = 0.2
    """With `schedule: wsd`, the length of the decay, as a fraction of the run's examples."""
    warmup: float = Field(0.03, ge=0, le=1)
    """Length of the linear warm-up, as a fraction of the run's examples."""


class Train(Section):
    """Length of the run, batch sizes, memory and limits."""

    steps: COUNT | None = None
    """Number of optimizer steps. Set either steps or epochs."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Number of passes over the training data. Set either steps or epochs."""
    batch_size: int = Field(16, gt=0, le=1_000_000)
    """Examples per optimizer step, summed over all processes. Gradient accumulation follows from it."""
    micro_batch_tokens: Literal["auto"] | COUNT = "auto"
    """Maximum number of tokens in one forward and backward pass of one process; several examples are packed into a
    pass. auto takes 2,048 on a CPU, and on a GPU the largest power of two that is estimated to fit, up to 8,192, or
    16,384 for a base narrower than 4,096; but at least `data.sequence_length`, and twice that for pairs. A run keeps
    the value that it started with."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute each layer's activations in the backward pass instead of keeping them: less memory, about a third more
    time. auto does so only if fewer than 4,096 tokens would fit otherwise."""
    kernels: Literal["auto", "none"] = "auto"
    """Use lora_kit's own kernels. auto replaces the parts of the model whose kernels reproduce its results; none
    computes everything with transformers and peft."""
    share_prompts: Literal["auto", "never"] = "auto"
    """For dpo, orpo and simpo: compute the common beginning of both sides of a pair once
    ([objectives.md](objectives.md#shared-prompts)). auto does so if the base allows it, which is tested at the start; a
    run keeps what it started with. never computes two complete sequences."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed for example order, the held-out fraction, LoRA A initialisation and dropout."""
    step_timeout: SECONDS | None = None
    """Restart the processes if one makes no progress for this many seconds; null takes ten times the longest step so
    far, and at least 60."""
    max_loss: BOUND | None = None
    """Skip a step whose loss is higher than this. A step whose loss is NaN or infinite is always skipped."""
    max_norm: BOUND | None = None
    """Skip a step whose gradient norm before clipping is larger than this. A NaN or infinite norm is always skipped."""

    @model_validator(mode="after")
    def _check_length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self


class Launch(Section):
    """How long training processes wait for each other before they end with an error. On several machines this decides
    how soon the loss of a machine or of the network is noticed ([launching.md](launching.md#several-machines))."""

    rendezvous_timeout: SECONDS = 300.0
    """Seconds until all processes that a launcher has started must have met."""
    start_timeout: SECONDS = 1800.0
    """Seconds that a process waits for another one outside of steps, e.g. while process 0 downloads the base, tokenises
    the data or generates answers."""
    collective_timeout: SECONDS = 300.0
    """Seconds that a process waits for another one in a step. It must be longer than the longest step, and than a
    checkpoint takes to be written."""


class Checkpoint(Section):
    """When to write checkpoints, and which of them to keep."""

    every_steps: COUNT = 100
    """Write a checkpoint every N steps, and after the last step."""
    every_seconds: SECONDS = 30.0
    """Also write a checkpoint in the background at least every N seconds. Training does not wait for it."""
    keep: int = Field(3, ge=2, le=1_000_000_000)
    """Keep the newest N checkpoints and delete older ones."""
    keep_every: COUNT | None = None
    """Also keep the checkpoints whose step is a multiple of N. Add a file named `pinned` to a checkpoint to keep it."""
    best: bool = False
    """Also keep the checkpoint with the best held-out figure (`evaluate.metric`). Needs `evaluate.every_steps`."""
    remote: str | None = None
    """A URL to which the newest checkpoint is copied in the background, so that the run survives the loss of the
    machine: `s3://bucket/run` (needs `lora_kit[remote]`), `gs://...`, `file:///mnt/run` and whatever else fsspec
    reaches, or `hf://user/name@branch` for a private repository on the Hub. Each run needs a URL of its own. If `--out`
    has no checkpoint, the run goes on from the newest one there. Credentials come from the environment."""

    @model_validator(mode="after")
    def _check_remote(self) -> "Checkpoint":
        url = self.remote
        if url is None:
            return self
        if url.startswith("hf://"):
            name, _, branch = url.removeprefix("hf://").partition("@")
            if not HUB_NAME.fullmatch(name) or not re.fullmatch(r"[\w./-]*", branch):
                raise ValueError(f"remote is {url!r}; expected hf://user/name or hf://user/name@branch")
        elif not REMOTE_URL.fullmatch(url) or (url.startswith("file://") and not url.startswith("file:///")):
            raise ValueError(
                f"remote is {url!r}; expected a URL such as s3://bucket/run, file:///mnt/run or hf://user/name"
            )
        return self


LOSS = "loss"
FORGETTING = ("forgetting", "text_loss")  # figures of `evaluate.forgetting`
LOWER_IS_BETTER = (LOSS, *FORGETTING)
REWARDS = ("rewards/accuracies", "rewards/margins")  # figures of a preference objective
EXACT_MATCH = "exact_match"
ANSWER_METRIC = Literal["contains", "regex", "json", "tool_names", "tool_arguments", "rouge", "bleu"]


class Evaluate(Section):
    """Measurements on the validation data. After the last step, the held-out loss of base and adapter is measured.
    [evaluation.md](evaluation.md) explains the figures."""

    every_steps: COUNT | None = None
    """Measure the held-out loss of the adapter every N steps and write a checkpoint; null measures at the end only."""
    generate: int = Field(0, ge=0, le=1_000_000_000)
    """Number of validation prompts to answer after the last step, to measure exact match. The first few answers are
    also logged at every evaluation during training."""
    metrics: Annotated[tuple[ANSWER_METRIC, ...], Field(strict=False)] = ()
    """What is measured of the generated answers besides exact match. rouge and bleu need `lora_kit[metrics]`."""
    regex: str | None = Field(None, min_length=1)
    """The regular expression (of Python) that the metric regex looks for in each answer."""
    forgetting: str | None = Field(None, min_length=1)
    """A text file, e.g. of what the base was pretrained on. The loss on it is measured together with the held-out loss;
    forgetting is the adapter's loss on it minus the base's."""
    metric: str = LOSS
    """The figure that decides `checkpoint.best` and `patience`: loss, loss/NAME for a named validation set,
    rewards/accuracies or rewards/margins of a preference objective, exact_match or one of `metrics`, forgetting or
    text_loss. The lowest loss, forgetting or text_loss is the best, and the highest value of any other figure."""
    patience: COUNT | None = None
    """End the run after N evaluations in a row without a better `metric`; null never ends it early."""
    least_gain: float = Field(0.0, ge=0, le=1e30)
    """With `patience`, by how much a figure must be better than the best one so far to count."""

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if self.metrics and not self.generate:
            raise ValueError(f"metrics ({', '.join(self.metrics)}) are of generated answers; set generate")
        if ("regex" in self.metrics) != (self.regex is not None):
            raise ValueError("regex and the metric regex need each other; set both or neither")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex is {self.regex!r}, which is not a regular expression: {error}") from None
        return self


SHARE = Annotated[float, Field(ge=0, le=1)]


class Preflight(Section):
    """Limits for the checks of all tokens before step 1, which `lora-kit check` also runs. A field is the largest share
    of the training or of the validation examples that may have a finding. If more examples have it, the run stops
    before step 1 (exit code 2). Otherwise it is a warning, with the number of examples and the first file and line."""

    masked: SHARE = 0.0
    """Examples without a trained token."""
    unstopped: SHARE = 0.5
    """Examples with an answer that does not end with the stop token, e.g. because `data.overlong: truncate` cuts it."""
    endless: SHARE = 1.0
    """Examples that are trained as a whole and contain no stop token. Pieces of a longer text do not count."""
    doubled_bos: SHARE = 1.0
    """Examples with two BOS tokens at the beginning."""
    missing_bos: SHARE = 1.0
    """Examples without the BOS token that the tokenizer puts before a text."""
    unknown: SHARE = 1.0
    """Examples with the tokenizer's unknown token."""
    empty_thoughts: SHARE = 1.0
    """Examples with a trained thought without content, such as `<think></think>`."""
    prompted: SHARE = 1.0
    """Examples with trained tokens of the generation prompt, which generation supplies and never predicts."""
    duplicates: SHARE = 1.0
    """Examples with the same tokens as an earlier training example or, in the validation data, validation example."""
    leaked: SHARE = 1.0
    """Validation examples with the same tokens as a training example."""


class Hub(Section):
    """Upload of the last checkpoint to the Hugging Face Hub. A failed upload does not fail the run; repeat it with
    `lora-kit push`."""

    repo: str | None = None
    """The repository to upload to, `user/name`; it is created if it does not exist. null uploads nothing."""
    private: bool = False
    """Create the repository as private. An existing public repository is an error."""
    revision: str | None = None
    """The branch to upload to; it is created if it does not exist. null takes the default branch."""
    licence: str | None = None
    """The adapter's licence in the model card, as the Hub spells it, e.g. `apache-2.0`."""

    @model_validator(mode="after")
    def _check_repo(self) -> "Hub":
        if self.repo is not None and not HUB_NAME.fullmatch(self.repo):
            raise ValueError(f"repo is {self.repo!r}; expected user/name, e.g. me/first-adapter")
        return self


class Track(Section):
    """Experiment trackers that receive the lines of metrics.jsonl. Each reads its own environment variables and
    configuration files for servers and credentials."""

    names: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Field(strict=False)] = ()
    """The trackers to use. `lora_kit[trackers]` installs their packages."""
    project: str = Field("lora_kit", min_length=1)
    """The project (wandb, trackio) or experiment (MLflow) that the run belongs to."""
    run: str | None = Field(None, min_length=1)
    """The run's name in the tracker; null takes the name of the run's folder."""


class Recipe(Section):
    """A recipe is a YAML 1.2 file (so `1e-4` is a number and `no` is a string). An unknown key, a repeated key or a
    value of the wrong type is an error; all errors are reported at once. `--set SECTION.FIELD=VALUE` overrides a field.

    Relative paths start in the recipe's folder. `builtin:NAME` names a file or model that ships with lora_kit. A Hub
    dataset is written `name:config@revision[split]`; config, revision and split are optional.

    For completion and checks in an editor, put this on the first line of a recipe:
    `# yaml-language-server: $schema=../docs/recipe.schema.json`
    """

    base: Base
    data: Data
    adapter: Adapter = Adapter()
    objective: OBJECTIVE = SftObjective()
    optim: Optim = Optim()
    train: Train
    launch: Launch = Launch()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    preflight: Preflight = Preflight()
    hub: Hub = Hub()
    track: Track = Track()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder of the recipe file; relative paths in the recipe start there."""
        return self._folder

    @property
    def longest_example(self) -> int:
        """The most tokens that an example may have: `data.sequence_length` for each side of a pair."""
        return self.data.sequence_length * (1 if self.objective.kind == "sft" else 2)

    @model_validator(mode="after")
    def _check_fields_against_each_other(self) -> "Recipe":
        tokens = self.train.micro_batch_tokens
        if isinstance(tokens, int) and tokens < self.longest_example:
            pairs = " for each side of a pair" if self.longest_example > self.data.sequence_length else ""
            raise ValueError(
                f"train.micro_batch_tokens is {tokens}, less than data.sequence_length "
                f"({self.data.sequence_length}){pairs}; an example is never split, so raise the first or lower the "
                "second"
            )
        if self.data.overlong == "split" and self.data.overlap >= self.data.sequence_length:
            raise ValueError(
                f"data.overlap is {self.data.overlap}, and a piece has data.sequence_length "
                f"({self.data.sequence_length}) tokens; lower the first"
            )
        published = f"hf://{self.hub.repo}" + (f"@{self.hub.revision}" if self.hub.revision else "")
        if self.checkpoint.remote == published:
            raise ValueError(
                f"checkpoint.remote and hub.repo are the same branch of {self.hub.repo}; add a branch to the first, "
                f"e.g. hf://{self.hub.repo}@checkpoints"
            )
        mixture = self.data.mixture
        if self.train.steps is None and any(entry.weight is not None for entry in mixture):
            raise ValueError(
                "data.train: a mixture with weights has no epochs, since its sources end at different times; set "
                "train.steps instead of train.epochs"
            )
        if self.train.epochs is None and any(entry.epochs is not None for entry in mixture):
            raise ValueError(
                "data.train: epochs of a source count inside an epoch of the mixture; set train.epochs instead of "
                "train.steps, or use weight"
            )
        if self.evaluate.every_steps and self.data.validation is None:
            raise ValueError("evaluate.every_steps needs validation data; set data.validation")
        if self.checkpoint.best and not self.evaluate.every_steps:
            raise ValueError("checkpoint.best compares held-out losses; set evaluate.every_steps")
        if self.evaluate.patience and not self.evaluate.every_steps:
            raise ValueError("evaluate.patience counts evaluations; set evaluate.every_steps")
        if self.evaluate.forgetting and self.data.validation is None:
            raise ValueError("evaluate.forgetting is measured with the validation data; set data.validation")
        if self.evaluate.metric not in self.figures:
            raise ValueError(
                f"evaluate.metric is {self.evaluate.metric!r}, which this recipe does not measure; it measures "
                f"{', '.join(self.figures)}"
            )
        return self

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures that an evaluation of this recipe measures, under the names of `evaluate.metric`."""
        sets: tuple[str, ...] = ()
        if isinstance(self.data.validation, dict):
            sets = tuple(self.data.validation)
        elif isinstance(self.data.validation, float) and self.data.mixture:
            sets = tuple(self.data.train_sources)
        return (
            LOSS,
            *(f"{LOSS}/{name}" for name in sets),
            *(() if self.objective.kind == "sft" else REWARDS),
            *((EXACT_MATCH, *self.evaluate.metrics) if self.evaluate.generate else ()),
            *(FORGETTING if self.evaluate.forgetting else ()),
        )
