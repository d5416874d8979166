"""What several stages share: sources, documents, chat, prompts, samples, and the target with its tokenizer."""
