"""What several stages share: documents, prompts, samples, and the target with its tokenizer."""
