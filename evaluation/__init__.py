"""Benchmarks, scores, the LLM judge and the `fastlongspeech evaluate` command (extra `eval`)."""
