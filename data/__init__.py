"""What a run reads: labelled tables, backbones and tokenizers, the built-in grammar and the tiny GPT-2 that learned it."""
