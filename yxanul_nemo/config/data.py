"""`conf/tokenizer` and `conf/data`: from text to token ids on disk."""

from typing import Literal

from pydantic import Field, model_validator

from yxanul_nemo.config.base import PathText, PathValue, Section

CHARS_PER_TOKEN = {"superbpe_t80k": 6.9, "superbpe_t180k": 6.3}
"""Characters per token of English web text, by the tokenizer's name; measured."""
ASSUMED_CHARS_PER_TOKEN = 4.0
"""For other tokenizers, until the corpus is prepared."""


class HubFiles(Section):
    """Files of a data set on the Hugging Face hub, which `stage=fetch` gets."""

    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    """OWNER/NAME of the data set."""
    revision: str = "main"
    """Commit, so that the same files come every time. The commit behind a branch or tag is written down when it is fetched."""
    files: str = Field(min_length=1)
    """File inside the data set, or a glob; files come in the order of their names. Parquet, or one JSON object per line
    (.json.gz, .jsonl)."""
    license: str = Field(min_length=1)
    """Licence in the words of the data set's page; it is shown before anything is fetched."""


class TokenizerConfig(Section):
    """Where the tokenizer comes from. It is built once, into `run.dir/tokenizer`, and its fingerprint travels with data and checkpoints."""

    name: str
    """Name for people."""
    kind: Literal["train_superbpe", "train_bpe", "superbpe", "huggingface", "sentencepiece"]
    """`train_superbpe`/`train_bpe`: train on the run's own corpus; `superbpe`: build from vocab.json and merges.txt;
    `huggingface`: a folder with tokenizer.json; `sentencepiece`: a .model file."""
    path: PathValue | None = None
    """Folder or file to load from (kinds superbpe, huggingface, sentencepiece)."""
    hub_id: str | None = None
    """Name on the Hugging Face hub, fetched when `path` is absent and there is network."""
    hub_revision: str = "main"
    """Commit, branch or tag of `hub_id`."""
    hub_license: str | None = None
    """Licence of `hub_id` in the words of its page; it is shown before it is fetched."""
    eos_token: str = "<|endoftext|>"
    """Token that ends each document; its text inside a document is encoded as plain text."""
    pad_token: str | None = None
    """Padding token, where the tokenizer has one of its own."""
    vocab_size: int | None = Field(default=None, ge=300)
    """Size to train to, special tokens included (training kinds only)."""
    transition: int | None = Field(default=None, ge=300)
    """Vocabulary size at which training goes from merges inside words to merges across them (train_superbpe)."""
    max_words_per_token: int = Field(default=4, ge=1)
    """Longest superword, in words (train_superbpe)."""
    cross_newline: bool = False
    """Allow text after a newline within a token (train_superbpe)."""
    cross_colon: bool = False
    """Allow ': text' within a token (train_superbpe)."""
    train_bytes: int = Field(default=100_000_000, ge=1000)
    """Text used for training the tokenizer, in bytes of UTF-8."""

    @model_validator(mode="after")
    def _kind_needs(self) -> "TokenizerConfig":
        if self.kind.startswith("train_"):
            if self.vocab_size is None:
                raise ValueError(f"kind={self.kind} needs vocab_size")
            if self.kind == "train_superbpe" and (self.transition is None or self.transition >= self.vocab_size):
                raise ValueError(
                    f"kind=train_superbpe needs transition below vocab_size={self.vocab_size}, got {self.transition}"
                )
        elif self.path is None and self.hub_id is None:
            raise ValueError(f"kind={self.kind} needs path (a local folder or file) or hub_id")
        return self

    @property
    def needs_hub(self) -> bool:
        """Whether its files come from the hub."""
        return self.path is None and not self.kind.startswith("train_")


class SourceConfig(Section):
    """One corpus: files with text or token ids, your own (`path`) or fetched (`hub`)."""

    path: PathText | None = None
    """A folder, a glob or one file: *.parquet, *.jsonl (.json with an object on each line), *.txt or *.md, all but parquet also packed as
    .gz or .zst. Relative paths are taken from where the command is run. Unset: `hub` is fetched."""
    hub: HubFiles | None = None
    """Data set on the Hugging Face hub, used when `path` is unset; as many of its files as the curriculum's tokens need."""
    text_column: str = "text"
    """Column, or key of JSON lines, with the text; others are ignored."""
    ids_column: str | None = None
    """Column with token ids (list<int>) to use instead of text."""

    @model_validator(mode="after")
    def _has_an_origin(self) -> "SourceConfig":
        if self.path is None and self.hub is None:
            raise ValueError("set path (a folder, a glob or a file) or hub (a data set to fetch)")
        return self

    @property
    def is_fetched(self) -> bool:
        """Whether its files come from the hub."""
        return self.path is None

    @property
    def files(self) -> str:
        """Folder, glob or file with its shards; `RunConfig.corpus_sources` knows that of fetched ones, too."""
        assert self.path is not None, "a source of corpus_sources"
        return self.path


class DataConfig(Section):
    """The corpora, how they are split, and where their tokens go."""

    name: str
    """Name for people."""
    demo_corpus: bool = False
    """Make the demo's corpus from the documentation of the installed packages; its sources are prose, reference and code."""
    demo_bytes: int = Field(default=4_000_000, ge=100_000)
    """Size of the demo's corpus, in bytes of UTF-8, over its three sources."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Name -> corpus. Names are what `curriculum.phases[].blend` speaks of."""
    heldout_fraction: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of documents, chosen by hash of their text, that is never trained on."""
    dir: PathValue | None = None
    """Folder for the prepared tokens; unset: `run.dir/data`. Set it to share one corpus between runs."""
    workers: int = Field(default=0, ge=0)
    """Processes that tokenize; 0: all cores."""
    seed: int = 1234
    """Seed of the order in which text is read."""
    chunk_tokens: int = Field(default=6144, ge=1)
    """Tokens of the pieces into which each source is cut and which are read in random order; no window crosses the end of one. At least the
    longest `seq_len`; a multiple of each, or a share of the tokens waits for another epoch."""
    shuffle_tokens: int = Field(default=4_194_304, ge=0)
    """Tokens of each source within which windows come in random order, so that a step has windows from many documents; 0: the pieces one
    window after another."""
    document_mask: bool = False
    """Keep attention in training inside documents: a token sees those of its window from the EOS in front of its document on. `false`: all
    those before it."""
    max_epochs: float = Field(default=1.0, gt=0)
    """How often a source may be read through; a curriculum that needs more is refused before training."""

    @model_validator(mode="after")
    def _has_sources(self) -> "DataConfig":
        if self.demo_corpus == bool(self.sources):
            raise ValueError("set either demo_corpus=true or at least one entry in sources")
        return self

    @property
    def window_order(self) -> str:
        """The order of windows in words, for the ledger; runs with other words read other windows."""
        return f"chunks of {self.chunk_tokens} tokens, shuffled over {self.shuffle_tokens}"

    @property
    def fetched_licenses(self) -> dict[str, str]:
        """Data sets of the hub among the sources -> their licences."""
        fetched = (source.hub for source in self.sources.values() if source.is_fetched)
        return {hub.repo: hub.license for hub in fetched if hub is not None}

    @property
    def source_names(self) -> tuple[str, ...]:
        """Sources in the order that fixes their place in blends."""
        return DEMO_SOURCES if self.demo_corpus else tuple(self.sources)


DEMO_SOURCES = ("prose", "reference", "code")
