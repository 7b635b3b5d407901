"""What is trained: the transformers, the tokenizer, and their configurations."""
