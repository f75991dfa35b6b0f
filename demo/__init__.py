"""The demo: a synthetic corpus, a small base model trained on it from scratch, and the held-out evaluation."""
