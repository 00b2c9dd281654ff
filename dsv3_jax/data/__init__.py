"""Corpus -> tokenizer -> packed, shuffled, resumable batches."""
