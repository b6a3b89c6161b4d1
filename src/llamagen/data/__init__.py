"""Images from folders, and the codes that a tokenizer makes of them."""
