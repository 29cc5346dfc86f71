"""Floor 3: the edge where models and tokenizers come in and text goes out."""
