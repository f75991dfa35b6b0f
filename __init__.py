"""FastLongSpeech: ask questions about recordings of any duration."""
