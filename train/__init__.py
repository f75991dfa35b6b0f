"""The two training stages: `ctc` teaches content density, `dct` is dynamic compression training."""
