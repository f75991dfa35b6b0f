"""The two training stages: `fastlongspeech.train.ctc` (content density) and `fastlongspeech.train.dct` (dynamic compression)."""
