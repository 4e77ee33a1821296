"""The policy network: decoder, caches, checkpoints and tokenizer."""
