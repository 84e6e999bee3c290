"""From text to token ids on disk: the demo's corpus, tokenizers, and files of text to Megatron's .bin/.idx files."""
