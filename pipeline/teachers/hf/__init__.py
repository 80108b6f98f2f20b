"""Teachers from Hugging Face's transformers."""
