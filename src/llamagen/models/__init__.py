"""The two models: the image tokenizer and the transformer over its codes."""
