"""`cast eval`: perplexity, agreement with the dense teacher, zero-shot tasks."""
