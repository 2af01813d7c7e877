"""Training: parameter groups, and the Hugging Face ``Trainer``."""
