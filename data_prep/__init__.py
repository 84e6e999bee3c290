"""From text to token ids on disk: the demo's corpus, tokenizers, and parquet shards to Megatron's .bin/.idx files."""
